"""The one graph: forward, backward, clipping, ``opt.step()`` and zeroing in one compiled function, with PyTorch's bits.

Most of it is compiled by ``aot_eager``, whose bits are those of PyTorch without a compiler.
"""

from __future__ import annotations

import gc
import logging
import re
import weakref

import pytest
import torch
from graph_models import book
from in_backward_runs import same
from interpreted import interpreted
from storing import fast_directory
from torch import nn
from torch.nn import functional as F
from whole_steps import (
    Mlp,
    Whole,
    accumulated,
    adamw,
    batch,
    clipped,
    kept_as_zeros,
    plain,
    sgd,
    whole_steps,
    zeroed_first,
)

import fxckpt

__all__ = ["book", "interpreted"]  # fixtures

STEPS = range(5)
QUICK = {"inner": "aot_eager"}


@pytest.fixture(autouse=True)
def traced(book, one_thread):
    """Dynamo traces ``backward()``."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def check(loop, optimizer=adamw, compiles=1, steps=STEPS, **options):
    """The compiled function ends with the bits of the same one that is not compiled; returns it."""
    expected = Whole(loop, optimizer, **{k: v for k, v in options.items() if k == "build"}).train(*steps)
    found = Whole(loop, optimizer, compiled=QUICK, **options).train(*steps)
    assert found.losses == expected.losses and same(found.bits(), expected.bits())
    assert len(found.graphs) == compiles
    assert found.opt.ckpt.statistics()["steps"] == len(found.losses)
    return found


# ---- one op --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [plain, clipped], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("optimizer", [adamw, sgd], ids=lambda optimizer: optimizer.__name__)
def test_a_whole_step_is_one_graph_with_the_bits_of_plain_pytorch(optimizer, loop):
    found = check(loop, optimizer)
    [graph] = found.graphs
    assert whole_steps(graph) == 1 and any(node.target is torch.autograd.grad for node in graph.graph.nodes)
    assert all(p.grad is None for p in found.model.parameters())


def test_each_step_is_checkpointed_as_it_was(tmp_path):
    expected = Whole(clipped)
    kept = [expected.train(step).bits() for step in STEPS]
    with fast_directory(tmp_path) as directory:
        found = Whole(clipped, compiled=QUICK, directory=directory / "d")
        fxckpt.load()
        found.train(*STEPS).opt.ckpt.flush()
        assert found.opt.ckpt.statistics()["checkpoints_committed"] == len(STEPS)
        for step in reversed(STEPS):
            fxckpt.load(step=step + 1)
            assert same(found.bits(), kept[step])


def test_what_is_loaded_goes_on_with_the_same_bits(tmp_path):
    expected = Whole(clipped).train(*STEPS).bits()
    with fast_directory(tmp_path) as directory:
        first = Whole(clipped, compiled=QUICK, directory=directory / "d")
        fxckpt.load()
        first.train(*STEPS[:3]).opt.ckpt.shutdown()
        second = Whole(clipped, compiled=QUICK, directory=directory / "d")
        assert fxckpt.load().step == 3
        assert same(second.train(*STEPS[3:]).bits(), expected)
        second.opt.ckpt.shutdown()


def test_a_scheduler_is_followed_without_another_compile():
    def scheduled(optimizer, before):
        found = Whole(clipped, optimizer, compiled=QUICK if before is not None else None)
        schedule = torch.optim.lr_scheduler.ExponentialLR(found.opt, 0.5)
        for step in STEPS:
            found.train(step)
            schedule.step()
        return found

    def with_one(model):
        made = adamw(model)
        torch.optim.lr_scheduler.ConstantLR(made, 1.0)  # one that was made before compile_step
        return made

    expected = scheduled(adamw, None).bits()
    for optimizer in (adamw, with_one):
        found = scheduled(optimizer, True)
        assert len(found.graphs) == 1 and same(found.bits(), expected)


def looked_at_behind(model, opt, x, y):
    """Reads parameters, an activation and the optimizer's state behind the step, in place of the loss."""
    out = model(x)
    F.cross_entropy(out, y).backward()
    opt.step()
    opt.zero_grad()
    with torch.no_grad():
        return model.up.weight.sum() + (out.argmax(-1) == y).float().mean()


def two_steps(model, opt, x, y):
    for part in range(2):
        loss = F.cross_entropy(model(x[part::2]), y[part::2])
        loss.backward()
        opt.step()
        opt.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("updates", ["after_backward", "in_backward"])
def test_two_steps_of_one_function_are_two_steps(interpreted, updates):
    found = Whole(two_steps, compiled={}, updates=updates).train(*STEPS)
    after = Whole(two_steps, compiled={}).train(*STEPS)
    assert [whole_steps(graph) for graph in found.graphs] == [2] and found.opt.ckpt.statistics()["steps"] == 2 * len(STEPS)
    assert same(found.bits(), after.bits())
    assert same(Whole(two_steps, compiled=QUICK).train(*STEPS).bits(), Whole(two_steps).train(*STEPS).bits())


def state_looked_at(model, opt, x, y):
    F.cross_entropy(model(x), y).backward()
    opt.step()
    opt.zero_grad()
    return sum(state["exp_avg"].sum() for state in opt.state.values())


def zeroed_by_the_model(model, opt, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.001)
    opt.step()
    model.zero_grad()
    return loss.detach()


def mixed_precision(model, opt, x, y):
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("loop", [zeroed_by_the_model, mixed_precision], ids=lambda loop: loop.__name__)
def test_other_loops_are_one_graph_with_the_bits_of_plain_pytorch(loop):
    check(loop)


def test_steps_are_recorded_in_a_journal_and_made_again(tmp_path):
    with fast_directory(tmp_path) as directory:
        found = Whole(clipped, compiled=QUICK, directory=directory / "d", journal=3)
        fxckpt.load()
        kept = [found.train(step).bits() for step in STEPS]
        found.opt.ckpt.flush()
        assert found.opt.ckpt.statistics()["records_committed"] > 0
        for step in (4, 3):
            fxckpt.load(step=step)
            assert same(found.bits(), kept[step - 1])
        found.opt.ckpt.shutdown()


@pytest.mark.parametrize(
    ("loop", "compiles"),
    [(kept_as_zeros, 2), (zeroed_first, 2), (accumulated, 1), (looked_at_behind, 1)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gradients_kept_added_up_or_looked_at_are_as_in_plain_pytorch(loop, compiles):
    """A second compile is for gradients that the first call did not find."""
    check(loop, compiles=compiles, steps=range(6))


def test_state_that_is_read_behind_the_step_is_as_the_step_leaves_it():
    expected, found = Whole(state_looked_at), Whole(state_looked_at, compiled=QUICK)
    with pytest.raises(fxckpt.SetupError, match="its first call makes the first"):
        found.train(0)
    for each in (expected, found):
        F.cross_entropy(each.model(batch(0)[0]), batch(0)[1]).backward()
        each.opt.step()
        each.opt.zero_grad()
        each.train(1, 2)
    assert found.losses == expected.losses and same(found.bits(), expected.bits())


class Noisy(nn.Module):
    """With buffers, random numbers, a weight that is used twice, and one that never is."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.unused = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(2, 2)
        self.head = nn.Linear(8, 4)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.norm(F.linear(F.dropout(self.a(x), 0.5), self.a.weight)))


def test_buffers_random_numbers_ties_and_unused_parameters_are_as_in_plain_pytorch(tmp_path):
    with fast_directory(tmp_path) as directory:
        found = check(clipped, sgd, build=Noisy, directory=directory / "d", fresh=True)
        found.opt.ckpt.flush()
        kept = [*found.bits(), *[b.clone() for b in found.model.buffers()]]
        found.train(9)
        fxckpt.load(step=len(STEPS))
        assert same([*found.bits(), *found.model.buffers()], kept)


def test_a_parameter_that_is_added_later_is_stepped_too():
    def grown(compiled):
        found = Whole(plain, lambda m: torch.optim.SGD(m.up.parameters(), lr=0.1, foreach=False), compiled=compiled)
        found.train(0, 1)
        found.opt.add_param_group({"params": list(found.model.down.parameters())})
        return found.train(2, 3)

    expected, found = grown(None), grown(QUICK)
    assert same(found.bits(), expected.bits()) and all(map(whole_steps, found.graphs))


def test_groups_that_were_changed_by_hand_are_an_error():
    found = Whole(plain, lambda m: torch.optim.SGD(m.up.parameters(), lr=0.1), compiled=QUICK).train(0)
    found.opt.param_groups.append({**found.opt.param_groups[0], "params": [found.model.down.weight]})
    with pytest.raises(fxckpt.SetupError, match="not those that this function was compiled for"):
        found.train(1)


def test_one_function_steps_the_optimizers_of_one_run_after_another():
    """Dynamo takes a number that it has seen change for a symbol, and with ``dynamic=True`` any number."""
    for dynamic in (None, True):
        torch._dynamo.reset()
        function = torch.compile(plain, backend=fxckpt.backend, options=QUICK, fullgraph=True, dynamic=dynamic)
        for _ in range(3):
            torch.manual_seed(0)
            model = Mlp()
            opt = fxckpt.compile_step(adamw(model), model=model, writer="mock")
            for step in STEPS:
                function(model, opt, *batch(step))
            assert opt.ckpt.statistics()["steps"] == len(STEPS)
            assert same([p.detach() for p in model.parameters()], Whole(plain).train(*STEPS).bits()[: len([*model.parameters()])])
            opt.ckpt.shutdown()


def test_a_refusal_of_one_function_is_none_of_another():
    found = Whole(zeroed_first, compiled=QUICK)
    other = torch.compile(zeroed_first, backend="eager")
    other(found.model, found.opt, *batch(0))
    assert same(found.train(1, 2).bits(), Whole(zeroed_first).train(0, 1, 2).bits())
    assert all(map(whole_steps, found.graphs))


def test_the_first_batch_is_not_kept():
    found = Whole(plain, compiled=QUICK)
    x, y = batch(0)
    found.step(x, y)
    first = weakref.ref(x)
    del x, y
    found.graphs.clear()
    gc.collect()
    assert first() is None


def test_hooks_on_parameters_that_come_later_are_an_error():
    found = Whole(plain, compiled=QUICK).train(0)
    found.model.up.weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(fxckpt.SetupError, match="hooks were put on parameters"):
        found.train(1)


def two_losses(model, opt, x, y):
    first = F.cross_entropy(model(x), y)
    first.backward()
    opt.step()
    opt.zero_grad()
    second = F.cross_entropy(model(x), y)
    second.backward()
    opt.step()
    opt.zero_grad()
    return first.detach() + second.detach()


def test_a_loss_that_is_detached_behind_the_next_step_is_no_backward_over_it(caplog):
    expected, found = Whole(two_losses).train(*STEPS), Whole(two_losses, compiled=QUICK).train(*STEPS)
    assert same(found.bits(), expected.bits()) and found.losses == expected.losses
    assert "runs as PyTorch without a compiler" not in caplog.text


def test_after_shutdown_it_trains_on():
    found = Whole(clipped, compiled=QUICK).train(0, 1)
    found.opt.ckpt.shutdown()
    assert same(found.train(2).bits(), Whole(clipped).train(0, 1, 2).bits())


# ---- where it cannot be --------------------------------------------------------------------------------------------------


def hooked_before(model):
    made = adamw(model)
    made.register_step_pre_hook(lambda *_: None)
    return made


def hooked_gradients(model):
    model.up.weight.register_hook(lambda gradient: gradient * 2)
    return adamw(model)


class OfMine(torch.optim.SGD):
    """No class of torch.optim."""


def closure(model, opt, x, y):
    def evaluate():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return opt.step(evaluate).detach()


def rate_set_in_it(model, opt, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    for group in opt.param_groups:
        group["lr"] = 0.02
    opt.step()
    opt.zero_grad()
    return loss.detach()


def without_gradients(model, opt, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    with torch.no_grad():
        opt.step()
        opt.zero_grad()
    return loss.detach()


def scaled(model, opt, x, y):
    opt.grad_scale = torch.tensor(1.0)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.detach()


def not_detached(model, opt, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss


def broken(model, opt, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    torch._dynamo.graph_break()
    opt.step()
    opt.zero_grad()
    return loss.detach()


NO_BACKWARD = "no backward in its graph.*trace_autograd_ops"
REFUSED = {
    "no trace_autograd_ops": (plain, adamw, {}, NO_BACKWARD),
    "the loss is not detached": (not_detached, adamw, {}, NO_BACKWARD),
    "a graph break": (broken, adamw, {}, NO_BACKWARD),
    "a closure": (closure, sgd, {}, "a closure"),
    "a scale": (scaled, adamw, {}, "a GradScaler"),
    "a rate": (rate_set_in_it, adamw, {}, "a setting of the optimizer is changed before it"),
    "gradients off": (without_gradients, adamw, {}, "gradients off"),
    "a hook": (plain, hooked_before, {}, "hooks in front of"),
    "a hook on a parameter": (plain, hooked_gradients, {}, "hooks on parameters"),
    "another class": (plain, lambda m: OfMine(m.parameters(), lr=0.1, foreach=False), {}, "OfMine is no class of torch.optim"),
    "another backend": (plain, adamw, {"backend": lambda gm, inputs, options: gm}, "not compiled with backend=fxckpt.backend"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_cannot_be_in_the_graph_goes_as_ever_and_says_why_once(name, caplog):
    loop, optimizer, options, why = REFUSED[name]
    with (
        torch._dynamo.config.patch(trace_autograd_ops=name != "no trace_autograd_ops"),
        caplog.at_level(logging.WARNING, "fxckpt"),
    ):
        found = Whole(loop, optimizer, compiled=QUICK, fullgraph=False, **options).train(*STEPS)
    assert same(found.bits(), Whole(loop, optimizer).train(*STEPS).bits())
    assert not any(map(whole_steps, found.graphs))
    assert found.opt.ckpt.statistics()["steps"] == len(STEPS)
    said = [each.message for each in caplog.records if "is no op of a compiled function's graph" in each.message]
    assert len(said) == 1 and re.search(why, said[0])
    assert re.search(why, found.opt.ckpt.graph.why["up"].unarmed)


def test_a_graph_that_may_not_break_is_an_error_where_the_step_cannot_be_in_it(caplog):
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fxckpt's log says why"):
        Whole(plain, hooked_before, compiled=QUICK).train(0)
    assert "hooks in front of opt.step()" in caplog.text


def test_several_optimizers_of_one_run_are_stepped_as_ever(caplog):
    def both(compiled):
        def loop(model, opts, x, y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()
            return loss.detach()

        found = Whole(loop, lambda m: [sgd(m.up), adamw(m.down)], compiled=compiled, fullgraph=False)
        return found.train(*STEPS).model.parameters()

    assert same([p.detach() for p in both(QUICK)], [p.detach() for p in both(None)])
    assert "several optimizers make one run" in caplog.text


def test_turned_off_all_is_as_ever(monkeypatch, caplog):
    monkeypatch.setenv("FXCKPT_DISABLE", "1")
    found = Whole(plain, compiled=QUICK, fullgraph=False).train(*STEPS)
    assert (
        not any(map(whole_steps, found.graphs))
        and caplog.text.count("is no op of a compiled function's graph: FXCKPT_DISABLE") == 1
    )
    assert same(found.bits(), Whole(plain).train(*STEPS).bits())


def test_a_step_that_is_compiled_by_itself_is_told_so_once(caplog):
    found = Whole(plain, compiled=QUICK)
    step = torch.compile(found.opt.step, backend=fxckpt.backend)
    for at in STEPS:
        x, y = batch(at)
        F.cross_entropy(found.model(x), y).backward()
        step()
        found.opt.zero_grad()
    assert caplog.text.count("torch.compile(opt.step) compiles nothing") == 1
    assert "compiles nothing" in found.opt.ckpt.graph.why["up"].unarmed
    assert same(found.bits(), Whole(plain).train(*STEPS).bits())


def second_backward_behind(model, opt, x, y):
    aside = model.norm.weight.square().sum() * 0.5
    loss = model.up(x).square().mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
    aside.backward()
    return loss.detach()


def test_a_backward_that_reaches_over_the_step_runs_as_without_a_compiler_and_says_so(caplog):
    def some(model):
        return torch.optim.SGD(model.up.parameters(), lr=0.1, foreach=False)

    found = Whole(second_backward_behind, some, compiled=QUICK).train(*STEPS)
    expected = Whole(second_backward_behind, some).train(*STEPS)
    assert same(found.bits(), expected.bits()) and torch.equal(found.model.norm.weight.grad, expected.model.norm.weight.grad)
    assert "a backward behind opt.step() goes through what was computed before it" in caplog.text
