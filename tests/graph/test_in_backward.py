"""Updates inside the backward: armed only where nothing could tell, otherwise not, with the reason; and always the same bits.

Most of it runs on the graphs that Inductor would compile, eagerly, once they went through the passes; see ``interpreted``.
"""

from __future__ import annotations

import logging
import os
import re
import weakref

import pytest
import torch
from graph_models import book
from in_backward_runs import WARM_UP, Pair, Trained, adamw, batch, begun, bits_of_plain, deterministic, same, sgd, warmed_up
from interpreted import interpreted
from storing import fast_directory
from torch import nn

import fxckpt
from fxckpt.graph.backward.verify import Kernel, verify_backward
from fxckpt.optim.spent import SpentGradient
from fxckpt.run import arming

__all__ = ["book", "interpreted"]  # fixtures

STEPS = WARM_UP + 3


@pytest.fixture(autouse=True)
def small(book, one_thread):
    """One thread, and a book of the test's own."""


# ---- armed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [adamw, sgd, lambda m: torch.optim.RAdam(m.parameters(), lr=1e-2)], ids=["adamw", "sgd", "radam"]
)
def test_armed_ends_with_the_bits_of_unarmed(interpreted, optimizer):
    inside = begun("in_backward", Pair, optimizer, update="native")
    for step in range(STEPS + 3):  # RAdam takes another branch on its way
        inside.step(batch(step))
    assert inside.armed == [0] * WARM_UP + [4] * (STEPS + 3 - WARM_UP)
    assert same(inside.bits(), bits_of_plain(inside, optimizer, STEPS + 3))
    assert set(inside.opt.ckpt.graph.standing.values()) == {""}


def test_a_checkpoint_of_an_armed_step_is_what_is_trained(interpreted, tmp_path):
    with fast_directory(tmp_path) as directory:
        run = begun("in_backward", Pair, directory=directory / "d")
        fxckpt.load()
        for step in range(STEPS):
            run.step(batch(step))
        run.opt.ckpt.flush()
        assert run.armed[-1] == 4 and run.opt.ckpt.statistics()["checkpoints_committed"] == STEPS
        kept = [t.clone() for t in run.bits()]
        run.step(batch(99))
        run.opt.ckpt.flush()
        assert not same(kept, run.bits())
        fxckpt.load(step=STEPS)
        assert same(kept, run.bits())


def test_gradients_give_their_memory_back_one_layer_after_the_other(interpreted):
    run, seen = warmed_up(build=Pair), []
    inside, real = run.opt.ckpt._run.stepping.in_backward.armed, run.opt.ckpt._run.steppers[0].executor.section
    given = []

    def section(place):
        given.append([g for g in inside._gradients if g is not None])
        seen.append([bool(g.untyped_storage().nbytes()) for each in given for g in each])
        real(place)

    run.opt.ckpt._run.steppers[0].executor.section = section
    run.compiled(batch(0)).backward()
    assert seen == [[True, True], [False, False, True, True]]
    run.opt.step()


def test_a_spent_gradient_says_whose_it_was_when_it_is_read_or_added_to(interpreted):
    run = warmed_up(build=Pair)
    run.compiled(batch(0)).backward()
    gradient = run.model.fc1.weight.grad
    assert isinstance(gradient, SpentGradient) and gradient.shape == (8, 8) and "fc1" in repr(gradient)
    readers = [
        gradient.norm, lambda: gradient.mul_(2), lambda: gradient + 1, gradient.tolist, gradient.numpy,
        lambda: torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0),
        lambda: run.model.fc1(batch(0)).sum().backward(),
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(fxckpt.SetupError, match=r"layer 'fc[12]' was used up"):
            read()
    run.opt.step()
    run.opt.zero_grad()
    assert gradient is not run.model.fc1.weight.grad


def test_what_an_update_writes_reaches_no_other_gradient(interpreted):
    def sums(poison):
        run, found = warmed_up(), {}
        inside, executor = run.opt.ckpt._run.stepping.in_backward.armed, run.opt.ckpt._run.steppers[0].executor
        real = executor.section

        def section(place):
            mine = executor.arranged.owned[place]
            found.update({m.name: inside._gradients[m.index].sum().item() for m in mine})
            real(place)
            for m in mine if poison else ():
                m.param.fill_(float("nan"))

        executor.section = section
        run.compiled(batch(0)).backward()
        inside.leave("the test is over")
        return found

    assert sums(True) == sums(False) and len(sums(False)) == 6


def test_layers_outside_of_compiled_regions_are_left_to_the_step(interpreted):
    class Half(Pair):
        def forward(self, x):
            return self.fc2(torch.compile(self.fc1, backend=fxckpt.backend)(x)).square().mean()

    run = begun("in_backward", Half)
    run.compiled = run.model
    for step in range(STEPS):
        run.step(batch(step))
    standing = run.opt.ckpt.graph.standing
    assert standing["fc1"] == "" and "no op of a compiled backward" in standing["fc2"]
    assert run.armed[-1] == 2
    assert same(run.bits(), bits_of_plain(run, adamw, STEPS))


def test_a_graph_break_makes_two_regions_and_both_are_armed(interpreted):
    class Broken(Pair):
        def forward(self, x):
            x = torch.relu(self.fc1(x))
            torch._dynamo.graph_break()
            return self.fc2(x).square().mean()

    run = begun("in_backward", Broken)
    for step in range(STEPS):
        run.step(batch(step))
    assert run.armed[-1] == 4 and len(interpreted) == 4
    assert same(run.bits(), bits_of_plain(run, adamw, STEPS))


def test_a_gradient_that_does_not_come_and_one_that_comes_anew_are_as_without_us(interpreted):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, which):
            x = torch.compile(self.fc1, backend=fxckpt.backend)(x)
            return (self.a(x) if which else self.b(x)).square().mean()

    def loop(run, step):
        run.step(batch(step), step not in (6, 8))

    run = begun("in_backward", Sometimes)
    run.compiled = run.model
    for step in range(11):
        loop(run, step)
    assert [step for step, used_up in enumerate(run.armed) if used_up] == [4, 5, 6, 9], "one with other gradients was armed"
    assert same(run.bits(), bits_of_plain(run, adamw, 11, loop))


# ---- never armed ---------------------------------------------------------------------------------------------------------


def clipping(run, step):
    run.compiled(batch(step)).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    run.opt.step()
    run.opt.zero_grad()


def accumulation(run, step):
    for part in range(2):
        run.compiled(batch(2 * step + part)).backward()
    run.opt.step()
    run.opt.zero_grad()


def gradients_kept_as_zeros(run, step):
    run.compiled(batch(step)).backward()
    run.opt.step()
    run.opt.zero_grad(set_to_none=False)


def two_forwards(run, step):
    (run.compiled(batch(step)) + run.compiled(batch(step + 50))).backward()
    run.opt.step()
    run.opt.zero_grad()


def closure(run, step):
    def evaluate():
        run.opt.zero_grad()
        loss = run.compiled(batch(step))
        loss.backward()
        return loss

    run.opt.step(evaluate)


def scaler(run, step):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(run.compiled(batch(step))).backward()
    scaler.step(run.opt)
    run.opt.zero_grad()


def hooks_on_a_parameter(run, step):
    if not run.model.fc1.weight._backward_hooks:
        run.model.fc1.weight.register_hook(lambda gradient: gradient * 2)
    plain(run, step)


def hooks_before_the_step(run, step):
    if step == 0:
        run.opt.register_step_pre_hook(lambda *_: None)
    plain(run, step)


def a_rate_set_before_the_step(run, step):
    run.compiled(batch(step)).backward()
    run.opt.param_groups[0]["lr"] = 0.01 / (step + 1)
    run.opt.step()
    run.opt.zero_grad()


def a_weight_used_elsewhere(run, step):
    (run.compiled(batch(step)) + run.model.fc1.weight.square().sum() + run.model.fc2.weight.square().sum()).backward()
    run.opt.step()
    run.opt.zero_grad()


def steps_of_the_class_itself(run, step):
    run.compiled(batch(step)).backward()
    torch.optim.AdamW.step(run.opt)
    run.opt.zero_grad()


def a_forward_before_the_step(run, step):
    run.compiled(batch(step)).backward()
    run.losses.append(run.compiled(batch(step)).item())
    run.opt.step()
    run.opt.zero_grad()


def plain(run, step):
    run.step(batch(step))


ILLEGAL = {
    clipping: "'fc.*' is changed between",
    accumulation: "added up over several backwards",
    gradients_kept_as_zeros: "added up over several backwards",
    two_forwards: "ran forward 2 times",
    closure: "was given a closure",
    scaler: "a GradScaler|is changed between",
    hooks_on_a_parameter: "hooks on parameters",
    hooks_before_the_step: "hooks in front of",
    a_rate_set_before_the_step: "a setting of the optimizer is changed",
    a_weight_used_elsewhere: "another one than its backward made|is changed between",
    a_forward_before_the_step: "ran forward 2 times",
    steps_of_the_class_itself: "its steps do not come through opt.step",
}


@pytest.mark.parametrize("loop", ILLEGAL, ids=lambda loop: loop.__name__)
def test_a_loop_that_could_tell_is_never_armed_and_told_why(interpreted, loop, caplog):
    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=loop is not scaler, foreach=False if loop is scaler else None)

    run, used_up = begun("in_backward", Pair, optimizer, update="native"), []
    with caplog.at_level(logging.WARNING, "fxckpt"):
        for step in range(STEPS):
            loop(run, step)
            used_up += [p.grad for p in run.model.parameters() if isinstance(p.grad, SpentGradient)]
    assert not used_up
    graph = run.opt.ckpt.graph
    for why in (graph.why["fc1"].unarmed, graph.why["fc2"].unarmed):
        assert re.search(ILLEGAL[loop], why), why
    assert caplog.text.count("0 of 2 layers are updated inside the backward") == 1
    assert same(run.bits(), bits_of_plain(run, optimizer, STEPS, loop))


def test_blocks_that_share_one_compile_are_never_armed(interpreted):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return torch.relu(self.linear(x))

    run = begun("in_backward", lambda: nn.Sequential(Block(), Block(), Block()))
    for block in run.model:
        block.compile(backend=fxckpt.backend)
    run.compiled = lambda x: run.model(x).square().mean()
    for step in range(STEPS):
        run.step(batch(step))
    standing = run.opt.ckpt.graph.standing
    assert standing["0.linear"] == "" and run.armed[-1] == 2, "the first one's input needs no gradient: it has code of its own"
    assert "share one compile" in standing["1.linear"] and standing["2.linear"]


def test_several_ranks_and_several_optimizers_are_never_armed(interpreted, monkeypatch):
    run = begun("in_backward", Pair)
    monkeypatch.setattr(arming, "world_size", lambda: 2)
    for step in range(STEPS):
        run.step(batch(step))
    assert run.armed == [0] * STEPS and "ranks" in run.opt.ckpt.graph.standing["fc1"]


def test_a_model_compiled_before_the_run_was_made_is_not_armed(interpreted):
    torch.manual_seed(0)
    model = Pair()
    compiled = torch.compile(model, backend=fxckpt.backend)
    compiled(batch(0))
    opt = fxckpt.compile_step(adamw(model), model=model, writer="mock", every=1, updates="in_backward")
    run = Trained(model, opt, compiled)
    for step in range(STEPS):
        run.step(batch(step))
    assert run.armed == [0] * STEPS and "no backward of a region that was compiled for this run" in opt.ckpt.graph.standing["fc1"]


def test_nothing_of_it_is_in_a_graph_or_in_the_way_by_default(interpreted):
    run = begun("after_backward", Pair)
    run.step(batch(0))
    assert run.opt.ckpt._run.stepping.in_backward is None and run.opt.ckpt.graph.standing is None
    assert not [n for graph in interpreted for n in graph.graph.nodes if "fxckpt" in str(n.target)]
    with pytest.raises(fxckpt.SetupError, match="updates='sometimes'"):
        begun("sometimes", Pair)


# ---- a loop that changes its ways once it is armed -----------------------------------------------------------------------


def test_what_the_step_must_not_have_missed_is_an_error_and_no_step(interpreted):
    run = warmed_up(build=Pair)
    run.compiled(batch(0)).backward()
    with pytest.raises(fxckpt.SetupError, match="a forward ran between"):
        run.compiled(batch(0))
    run.opt.param_groups[0]["lr"] *= 2
    with pytest.raises(fxckpt.SetupError, match="a setting of the optimizer was changed"):
        run.opt.step()


def test_gradients_that_are_dropped_before_the_step_are_an_error(interpreted):
    run = warmed_up(build=Pair)
    run.compiled(batch(0)).backward()
    run.opt.zero_grad()
    with pytest.raises(fxckpt.SetupError, match=r"the gradient of 'fc.*' was replaced"):
        run.opt.step()


def test_a_weight_that_is_used_elsewhere_for_the_first_time_is_an_error(interpreted):
    for first in (True, False):
        run = warmed_up(build=Pair)
        both = run.compiled(batch(0)), run.model.fc1.weight.square().sum()
        with pytest.raises(fxckpt.SetupError, match="layer 'fc1' was used up"):
            (both[0] + both[1] if first else both[1] + both[0]).backward()


def test_gradients_asked_for_by_hand_update_nothing(interpreted):
    run = warmed_up(build=Pair)
    before = [p.detach().clone() for p in run.model.parameters()]
    x = batch(0).requires_grad_()
    torch.autograd.grad(run.compiled(x), x)
    assert same(before, [p.detach() for p in run.model.parameters()])


class Failing(torch.autograd.Function):
    """Its backward raises: a tensor's gradient goes through it last."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("in the middle")


def test_an_exception_in_the_backward_is_one_in_the_middle_of_a_step(interpreted, tmp_path):
    with fast_directory(tmp_path) as directory:
        run = begun("in_backward", Pair, directory=directory / "d")
        fxckpt.load()
        for step in range(WARM_UP + 1):
            x = batch(step).requires_grad_()
            run.step(x * 1)
        kept = [t.clone() for t in run.bits()]
        with pytest.raises(ArithmeticError):
            run.compiled(Failing.apply(batch(9).requires_grad_())).backward()
        assert run.used_up() == 4 and not same(kept, run.bits())
        with pytest.raises(fxckpt.SetupError, match="left by an exception in its middle"):
            run.opt.ckpt.save()
        fxckpt.load(step=WARM_UP + 1)
        assert same(kept, run.bits()) and run.model.fc1.weight.grad is None
        run.step(batch(10))
        run.opt.ckpt.flush()
        assert [c.step for c in fxckpt.checkpoints(directory / "d")][-1] == WARM_UP + 2
        assert run.opt.ckpt.statistics()["checkpoints_failed"] == 0


def test_training_goes_on_after_an_exception_in_the_backward(interpreted):
    run = warmed_up(build=Pair)
    with pytest.raises(ArithmeticError):
        run.compiled(Failing.apply(batch(9).requires_grad_())).backward()
    run.opt.zero_grad()
    for step in range(4):
        run.step(batch(step))
    assert run.armed[-4:] == [0, 0, 4, 4][-4:] and run.opt.ckpt.statistics()["checkpoints_failed"] == 0


def test_a_run_with_armed_updates_is_not_kept_by_what_was_compiled(interpreted):
    run = warmed_up(build=Pair)
    gone = weakref.ref(run.opt)
    run.opt.ckpt.shutdown()
    del run.opt
    assert gone() is None
    run.compiled(batch(0)).backward()
    assert run.model.fc1.weight.grad is not None and not isinstance(run.model.fc1.weight.grad, SpentGradient)


# ---- what else a script does between backward and step -------------------------------------------------------------------


def test_what_waits_or_saves_between_backward_and_step_changes_no_bit(interpreted):
    run = warmed_up(build=Pair)
    run.compiled(batch(WARM_UP)).backward()
    assert run.used_up() == 4
    run.opt.ckpt.flush()
    with pytest.raises(fxckpt.SetupError, match="some layers are updated and some are not"):
        run.opt.ckpt.save()
    run.opt.step()
    run.opt.zero_grad()
    run.step(batch(WARM_UP + 1))
    run.opt.ckpt.flush()
    assert run.armed[-1] == 4 and run.opt.ckpt.statistics()["checkpoints_failed"] == 0
    assert same(run.bits(), bits_of_plain(run, adamw, WARM_UP + 2))


def test_a_step_whose_rest_is_gone_is_an_error_and_another_backward_goes_on(interpreted):
    run = warmed_up(build=Pair)
    ways = {
        "state of the optimizer were replaced": lambda: run.opt.load_state_dict(run.opt.state_dict()),
        "a step came another way": lambda: type(run.opt).__mro__[1].step(run.opt),
        "the run was shut down": run.opt.ckpt.shutdown,
    }
    for why, way in ways.items():
        while not run.used_up():
            run.opt.step()
            run.opt.zero_grad()
            run.compiled(batch(0)).backward()
        with pytest.raises(fxckpt.SetupError, match=f"{why}.*had updated"):
            way()
            run.opt.step()
        run.opt.zero_grad()
        run.step(batch(1))


def test_gradients_asked_for_by_hand_and_graphs_of_gradients_are_never_armed(interpreted):
    def by_hand(run, step):
        params = list(run.model.parameters())
        for param, gradient in zip(params, torch.autograd.grad(run.compiled(batch(step)), params)):
            param.grad = gradient
        run.opt.step()
        run.opt.zero_grad()

    run = begun("in_backward", Pair)
    for step in range(STEPS):
        by_hand(run, step)
    assert "does not add to its parameters' gradients" in run.opt.ckpt.graph.standing["fc1"]
    assert same(run.bits(), bits_of_plain(run, adamw, STEPS, by_hand))


def test_several_optimizers_are_never_armed(interpreted):
    torch.manual_seed(0)
    model = Pair()
    both = fxckpt.compile_step([adamw(model.fc1), adamw(model.fc2)], model=model, writer="mock", every=1, updates="in_backward")
    compiled = torch.compile(model, backend=fxckpt.backend)
    for step in range(STEPS):
        compiled(batch(step)).backward()
        assert not any(isinstance(p.grad, SpentGradient) for p in model.parameters())
        for opt in both:
            opt.step()
            opt.zero_grad()
    assert "several optimizers" in both[0].ckpt.graph.standing["fc1"]


def test_iterations_that_make_boundaries_are_armed_and_checkpointed(interpreted, tmp_path):
    with fast_directory(tmp_path) as directory:
        run = begun("in_backward", Pair, directory=directory / "d")
        fxckpt.load()
        for step in fxckpt.steps(STEPS):
            run.step(batch(step))
        run.opt.ckpt.flush()
        assert run.armed == [0] * WARM_UP + [4] * (STEPS - WARM_UP)
        assert run.opt.ckpt.statistics()["checkpoints_committed"] == STEPS
        kept = [t.clone() for t in run.bits()]
        fxckpt.load(step=STEPS)
        assert same(kept, run.bits())


def test_layers_are_shown_to_on_layer_and_the_monitor_inside_the_backward_too(interpreted, tmp_path):
    with fast_directory(tmp_path) as directory:
        seen = []
        run = begun("in_backward", Pair, directory=directory / "d", writer="monitor", on_layer=lambda *a: seen.append(a[:2]))
        fxckpt.load()
        for step in range(STEPS):
            run.step(batch(step))
        run.opt.ckpt.flush()
        assert run.armed[-1] == 4 and {name for name, step in seen if step == STEPS} >= {"fc1", "fc2"}
        kept = [t.clone() for t in run.bits()]
        run.step(batch(99))
        fxckpt.load(step=STEPS)
        assert same(kept, run.bits())
        run.opt.ckpt.shutdown()


# ---- Inductor itself -----------------------------------------------------------------------------------------------------

FULL = os.environ.get("FXCKPT_MODELS") == "full"


@pytest.mark.parametrize("autocast", [False, True] if FULL else [False], ids=lambda on: "bf16" if on else "fp32")
def test_compiled_and_armed_ends_with_the_bits_of_plain_inductor(inductor_cache, autocast):
    bits = {}
    with deterministic():
        for updates in (None, "after_backward", "in_backward") if FULL else (None, "in_backward"):
            run = begun(updates)
            for step in range(STEPS):
                run.step(batch(step), autocast=autocast)
            bits[updates] = run.bits()
    assert run.armed == [0] * WARM_UP + [6] * 3
    assert all(same(bits[None], found) for found in bits.values())


@pytest.mark.skipif(not FULL, reason="make models: compiles with Inductor twice")
def test_an_op_that_waits_for_nobody_is_caught_by_what_verifies_the_schedule(inductor_cache, monkeypatch, caplog):
    from fxckpt.graph.backward import place

    monkeypatch.setattr(place, "outputs_of", lambda node: [])  # nothing is pinned, and no op waits for a reader
    monkeypatch.setattr("fxckpt.graph.backward.placing.VERSION", "without pins")
    with caplog.at_level(logging.WARNING, "fxckpt"):
        run = begun("in_backward")
        for step in range(STEPS):
            run.step(batch(step))
    assert "which reads 'fc2', behind its update" in caplog.text
    assert 2 <= run.armed[-1] <= 4, "fc1 has no reader in the backward, and may stay"
    assert same(run.bits(), bits_of_plain(run, adamw, STEPS))


def kernel(name, before=(), reads=(), layer=None, changes=()):
    return Kernel(frozenset({name}), frozenset(before), frozenset(reads), layer, frozenset(changes))


def test_only_a_reader_that_an_op_does_not_wait_for_is_wrong():
    op = kernel("ready", {"grad", "reader"}, layer=0, changes={3, "buf1"})
    right = [kernel("grad"), kernel("reader", reads={3}), op, kernel("later", reads={4, "buf2"})]
    assert verify_backward(right, ["norm"]) == {}
    for wrong in (kernel("inlined", reads={3}), kernel("other", {"grad"}, reads={"buf1"})):
        assert list(verify_backward([*right, wrong], ["norm"])) == [0]
    assert verify_backward([*right, kernel("fused", reads={3}, before=())][:-1], ["norm"]) == {}
