"""The one graph with ``updates="in_backward"``: each layer is updated in it as soon as its gradient is final, behind a norm, too.

Most of it runs on the graphs that Inductor would compile, eagerly, once they went through the passes; see ``interpreted``.
"""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch
from expecttest import assert_expected_inline
from graph_models import book
from in_backward_runs import deterministic, same
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
    zeroed_first,
)

import fxckpt

__all__ = ["book", "interpreted"]  # fixtures

STEPS = range(6)
INDUCTOR = {}
LAYERS = {"up", "norm", "down"}
FULL = os.environ.get("FXCKPT_MODELS") == "full"


@pytest.fixture(autouse=True)
def traced(book, one_thread):
    """Dynamo traces ``backward()``."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


def inside(loop=clipped, optimizer=adamw, **options):
    return Whole(loop, optimizer, compiled=INDUCTOR, updates="in_backward", **options)


def check(loop, optimizer=adamw, steps=STEPS, **options):
    """Updates in the graph end with the bits of those behind it, which are those of PyTorch's optimizer on the same code."""
    found = inside(loop, optimizer, **options).train(*steps)
    after = Whole(loop, optimizer, compiled=INDUCTOR, **options).train(*steps)
    assert found.losses == after.losses and same(found.bits(), after.bits())
    assert not after.updated_in_graph()
    return found


# ---- updated in the graph ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [plain, clipped], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("optimizer", [adamw, sgd], ids=lambda optimizer: optimizer.__name__)
def test_all_layers_are_updated_in_the_graph_with_the_same_bits(interpreted, optimizer, loop):
    found = check(loop, optimizer)
    assert set(found.updated_in_graph()) == LAYERS and len(found.graphs) == 1
    assert all(p.grad is None for p in found.model.parameters())


def test_the_second_step_is_made_in_the_graph_already(interpreted):
    found = inside().train(0)
    assert not found.updated_in_graph()
    assert set(found.train(1).updated_in_graph()) == LAYERS


def test_each_step_that_is_made_in_the_graph_is_checkpointed_as_it_was(interpreted, tmp_path):
    after = Whole(clipped, compiled=INDUCTOR)
    kept = [after.train(step).bits() for step in STEPS]
    after.opt.ckpt.shutdown()
    with fast_directory(tmp_path) as directory:
        found = inside(directory=directory / "d")
        fxckpt.load()
        found.train(*STEPS).opt.ckpt.flush()
        assert set(found.updated_in_graph()) == LAYERS
        assert found.opt.ckpt.statistics()["checkpoints_committed"] == len(STEPS)
        for step in reversed(STEPS):
            fxckpt.load(step=step + 1)
            assert same(found.bits(), kept[step])
        assert same(found.train(*STEPS[1:]).bits(), kept[-1]), "what is loaded goes on with the same bits"
        found.opt.ckpt.shutdown()


def test_boundaries_and_a_scheduler_are_as_in_any_loop(interpreted, tmp_path):
    def scheduled(found):
        schedule = torch.optim.lr_scheduler.ExponentialLR(found.opt, 0.5)
        for step in fxckpt.steps(len(STEPS)) if hasattr(found.opt, "ckpt") else STEPS:
            found.train(step)
            schedule.step()
        return found

    with fast_directory(tmp_path) as directory:
        found = scheduled(inside(directory=directory / "d", fresh=True))
        assert set(found.updated_in_graph()) == LAYERS and len(found.graphs) == 1
        found.opt.ckpt.flush()
        assert found.opt.ckpt.statistics()["checkpoints_committed"] == len(STEPS)
        bits = found.bits()
        fxckpt.load(step=len(STEPS))
        assert same(found.bits(), bits)
        found.opt.ckpt.shutdown()
    assert same(scheduled(Whole(clipped, compiled=INDUCTOR, updates="after_backward")).bits(), bits)


def clamped(model, opt, x, y):
    with torch.no_grad():
        model.up.weight.clamp_(-0.2, 0.2)
    return clipped(model, opt, x, y)


def norm_of_one_returned(model, opt, x, y):
    F.cross_entropy(model(x), y).backward()
    opt.step()
    norm = model.up.weight.grad.norm()
    opt.zero_grad()
    return norm


def test_micro_batches_of_one_function_are_added_up_before_a_layer_is_updated(interpreted):
    assert set(check(accumulated).updated_in_graph()) == LAYERS


@pytest.mark.parametrize("loop", [zeroed_first, kept_as_zeros])
def test_gradients_that_stay_behind_the_step_are_left_to_it(interpreted, loop):
    found = check(loop)
    assert not found.updated_in_graph()
    assert "its gradient is used behind the step" in found.opt.ckpt.graph.why["up"].unarmed


def test_a_layer_of_which_a_gradient_is_read_behind_the_step_or_a_weight_is_changed_is_left_to_it(interpreted):
    for loop in (norm_of_one_returned, clamped):
        assert set(check(loop).updated_in_graph()) == LAYERS - {"up"}


def test_another_batch_size_and_evaluation_between_change_nothing(interpreted):
    def looked_at(updates):
        found = Whole(clipped, compiled=INDUCTOR, updates=updates).train(0, 1, 2)
        x, y = batch(7)
        with torch.no_grad():
            found.losses.append(F.cross_entropy(found.model(x), y).item())
        for size in (8, 12, 16):
            found.losses.append(found.step(x[:size], y[:size]).item())
        return found

    found, after = looked_at("in_backward"), looked_at("after_backward")
    assert found.losses == after.losses and same(found.bits(), after.bits())
    assert set(found.updated_in_graph()) == LAYERS


# ---- what an update may do -----------------------------------------------------------------------------------------------


def sections(found, call):
    """Have ``call(members, gradients)`` called at each layer's turn, in place of nothing: ``True`` from it fills the layer."""
    executor, graph = found.opt.ckpt._run.steppers[0].executor, found.opt.ckpt._run.stepping.in_graph()
    real = executor.section

    def section(place):
        members = executor.arranged.owned[place]
        gradients = {m.name: graph._gradients[m.index] for m in members}
        poison = call(members, gradients)
        real(place)
        for m in members if poison else ():
            m.param.fill_(float("nan"))

    executor.section = section


def sums(poison, loop, **options):
    found, seen = inside(loop, **options).train(0, 1), {}

    def note(members, gradients):
        seen.update({name: gradient.sum().item() for name, gradient in gradients.items()})
        return poison

    sections(found, note)
    found.train(2)
    return seen


@pytest.mark.parametrize("loop", [plain, clipped, accumulated], ids=lambda loop: loop.__name__)
def test_what_an_update_writes_reaches_no_other_gradient(interpreted, loop):
    assert sums(True, loop) == sums(False, loop) and len(sums(False, loop)) == 6


def test_the_memory_of_a_gradient_is_given_back_before_the_next_layer(interpreted):
    found, given, seen = inside(plain).train(0, 1), [], []

    def note(members, gradients):
        seen.append([bool(g.untyped_storage().nbytes()) for each in given for g in each])
        given.append(list(gradients.values()))

    sections(found, note)
    found.train(2)
    assert seen == [[], [False] * 2, [False] * 4]


def test_an_error_between_two_updates_is_one_in_the_middle_of_a_step(interpreted, tmp_path):
    with fast_directory(tmp_path) as directory:
        found = inside(directory=directory / "d")
        fxckpt.load()
        found.train(0, 1, 2)
        kept, calls = found.bits(), []

        def fail(members, gradients):
            calls.append(members)
            if len(calls) == 2:
                raise ArithmeticError("in the middle")

        sections(found, fail)
        with pytest.raises(ArithmeticError):
            found.train(3)
        with pytest.raises(fxckpt.SetupError, match="left by an exception in its middle"):
            found.opt.ckpt.save()
        fxckpt.load(step=3)
        assert same(found.bits(), kept)
        found.train(3).opt.ckpt.flush()
        assert same(found.bits(), Whole(clipped, compiled=INDUCTOR).train(*range(4)).bits())
        found.opt.ckpt.shutdown()


def test_hooks_and_settings_that_come_later_are_seen(interpreted):
    def loop(found):
        found.train(0, 1, 2)
        found.opt.param_groups[0]["lr"] = 0.5
        found.train(3)
        found.opt.register_step_pre_hook(doubled)
        return found.train(4)

    def doubled(opt, *_):
        for param in opt.param_groups[0]["params"]:
            param.grad.mul_(2)

    found = loop(inside())
    assert "hooks in front of opt.step()" in found.opt.ckpt.graph.standing["up"]
    assert same(found.bits(), loop(Whole(clipped, compiled=INDUCTOR)).bits())


def test_a_plain_loop_after_whole_steps_goes_on_with_the_same_bits(interpreted):
    def both(updates):
        found = Whole(clipped, compiled=INDUCTOR, updates=updates).train(0, 1, 2)
        for step in (3, 4):
            x, y = batch(step)
            clipped(found.model, found.opt, x, y)
        return found.train(5).bits()

    assert same(both("in_backward"), both("after_backward"))


# ---- killed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("updates", "code"),
    [("after_backward", "interpreted"), ("in_backward", "interpreted"), *([("in_backward", "inductor")] if FULL else [])],
)
def test_killed_between_two_updates_it_ends_with_the_same_bits(updates, code, fork_server, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import whole_life\nwhole_life.live()\n")
    with fast_directory(tmp_path) as stores:
        how = {"UPDATES": updates, "CODE": code, "STORES": str(stores), "STEPS": "7"}
        whole = fork_server.start(script, tmp_path / "whole", **how).succeed()
        starts = []
        for number in (10, 11):  # four layers a step: the third step of the first life, and the third of the second
            run = fork_server.start(script, tmp_path / "killed", KILL=str(number), **how)
            output = run.wait()
            assert run.returncode == -signal.SIGKILL, output
            starts.append(int(output.split("START ")[1].split()[0]))
        again = fork_server.start(script, tmp_path / "killed", **how).succeed()
    assert again["DIGEST bits"] == whole["DIGEST bits"]
    assert starts[0] == 0 < starts[1]
    assert [each["DIGEST inside"] for each in (whole, again)] == ["3" if updates == "in_backward" else "0"] * 2
    assert again["DIGEST warm"] == str(code == "inductor")


# ---- printed -------------------------------------------------------------------------------------------------------------


def ops(graph):
    """Ours and the norm's in a graph, the others counted."""
    lines, collapsed = [], 0
    for node in graph.graph.nodes:
        name = str(getattr(getattr(node.target, "_schema", None), "name", ""))
        if node.op != "call_function" or not (name.startswith("fxckpt::") or "foreach" in name):
            collapsed += node.op == "call_function"
            continue
        lines += [f"... {collapsed} ops"] if collapsed else []
        collapsed = 0
        if name == "fxckpt::layer_ready":
            lines.append(f"layer_ready({node.args[0]}, inputs {node.args[1]}, after {node.args[2]}, layer {node.args[4]})")
        else:
            lines.append(f"{name.rpartition('::')[2]}({node.args[0]})")
    return "\n".join([*lines, f"... {collapsed} ops"])


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_listing_of_an_mlp_that_clips(interpreted):
    found = inside(build=Plain).train(0, 1)
    assert_expected_inline(
        str(found.opt.ckpt.graph),
        """\
def forward(self, run : int, counts, down, up):
    ...  # the whole step of graph 0, until the gradients of 'down' are final
    torch.ops.fxckpt.ckpt_fence(counts, run, 0, 'counts')
    scalars = self.scalars(counts)
    torch.ops.fxckpt.ckpt_emit(counts, run, 0, 'counts')
    torch.ops.fxckpt.ckpt_fence(down, run, 1, 'down')
    update_down = self.update_down(down, scalars)
    torch.ops.fxckpt.ckpt_emit(down, run, 1, 'down')
    ...  # the whole step of graph 0, until the gradients of 'up' are final
    torch.ops.fxckpt.ckpt_fence(up, run, 2, 'up')
    update_up = self.update_up(up, scalars)
    torch.ops.fxckpt.ckpt_emit(up, run, 2, 'up')
    ...  # the rest of graph 0 before the step
    # opt.step()
    return None""",
    )
    assert_expected_inline(
        ops(interpreted[0]),
        """\
... 64 ops
_foreach_norm([mm_2, view_1, mm_1, view])
... 16 ops
_foreach_mul([mm_2, view_1, mm_1, view])
... 4 ops
layer_ready([getitem_6, getitem_7], inputs [3, 4], after [addmm_1, mm], layer 1)
layer_ready([getitem_4, getitem_5], inputs [0, 1], after [addmm], layer 0)
... 0 ops""",
    )


def test_layers_stand_where_their_gradients_are_written_last_if_nothing_is_clipped(interpreted):
    inside(plain).train(0, 1)
    assert_expected_inline(
        ops(interpreted[0]),
        """\
... 11 ops
pin_reader(mul_1)
... 1 ops
pin_reader(add_1)
... 50 ops
layer_ready([mm_1, view], inputs [5, 6], after [addmm_1, mm], layer 2)
... 3 ops
pin_reader(mul_5)
... 12 ops
layer_ready([sum_8, sum_9], inputs [3, 4], after [add_1, mul_1, mul_5], layer 1)
... 7 ops
layer_ready([mm_2, view_1], inputs [0, 1], after [addmm], layer 0)
... 6 ops""",
    )


# ---- Inductor itself -----------------------------------------------------------------------------------------------------


def beside_plain_pytorch():
    """What plain PyTorch ends with: forward, backward and clipping in one graph of Inductor's, and its own optimizer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Mlp()
    opt = adamw(model)

    @torch.compile(fullgraph=True)
    def gradients(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss.detach()

    for step in STEPS:
        gradients(*batch(step))
        opt.step()
        opt.zero_grad()
    return [*(p.detach() for p in model.parameters()), *(v for s in opt.state.values() for v in s.values())]


@pytest.mark.parametrize("updates", ["after_backward", "in_backward"] if FULL else ["in_backward"])
def test_compiled_by_inductor_it_ends_with_the_bits_of_plain_inductor(inductor_cache, updates):
    with deterministic():
        found = Whole(clipped, compiled=INDUCTOR, updates=updates).train(*STEPS)
        assert set(found.updated_in_graph()) == (LAYERS if updates == "in_backward" else set())
        assert same(found.bits(), beside_plain_pytorch())


@pytest.mark.skipif(not FULL, reason="make models: compiles with Inductor once more")
def test_an_op_that_waits_for_nobody_is_caught_in_the_one_graph_too(inductor_cache, monkeypatch, caplog):
    from fxckpt.graph.backward import place

    monkeypatch.setattr(place, "outputs_of", lambda node: [])  # nothing is pinned, and no op waits for a reader
    monkeypatch.setattr("fxckpt.graph.backward.placing.VERSION", "without pins")
    with caplog.at_level(logging.WARNING, "fxckpt"):
        found = inside(plain).train(*STEPS)
    assert "behind its update" in caplog.text and set(found.updated_in_graph()) < LAYERS
    assert same(found.bits(), Whole(plain, compiled=INDUCTOR).train(*STEPS).bits())


@pytest.mark.skipif(not FULL, reason="make models: compiles with Inductor once more")
@pytest.mark.parametrize("loop", [plain, clipped], ids=lambda loop: loop.__name__)
def test_what_an_update_writes_reaches_no_gradient_that_inductor_computes(inductor_cache, loop):
    assert sums(True, loop) == sums(False, loop) and len(sums(False, loop)) == 6
