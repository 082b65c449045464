"""Updates inside the backward in loops of all shapes: armed where nothing can tell, with the bits of plain PyTorch."""

from __future__ import annotations

import threading

import pytest
import torch
from graph_models import book
from in_backward_runs import WARM_UP, Pair, adamw, batch, begun, bits_of_plain, same
from interpreted import interpreted
from storing import fast_directory
from torch import nn
from torch.utils.data import DataLoader

import fxckpt
from fxckpt.optim.spent import SpentGradient

__all__ = ["book", "interpreted"]  # fixtures

STEPS = WARM_UP + 3
ALL = [0] * WARM_UP + [4] * 3
"""What the backwards of ``Pair`` use up, if nothing is in the way."""


@pytest.fixture(autouse=True)
def small(book, one_thread):
    """One thread, and a book of the test's own."""


# ---- boundaries ----------------------------------------------------------------------------------------------------------


def test_epochs_and_batches_are_armed_and_each_boundary_is_checkpointed(interpreted, tmp_path):
    loader = DataLoader(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), batch_size=4, shuffle=True)
    kept = []

    def turn(run, x):
        run.step(x)
        kept.append([t.clone() for t in run.bits()])

    with fast_directory(tmp_path) as directory:
        run = begun("in_backward", Pair, directory=directory / "d")
        fxckpt.load()
        for _ in fxckpt.epochs(3):
            for x in fxckpt.batches(loader):
                turn(run, x)
            run.opt.param_groups[0]["lr"] /= 2
        run.opt.ckpt.flush()
        assert run.armed == [0] * WARM_UP + [4] * 5
        assert run.opt.ckpt.statistics()["checkpoints_committed"] == 9
        for step in (9, 8):
            fxckpt.load(step=step)
            assert same(kept[step - 1], run.bits())
            assert run.opt.param_groups[0]["lr"] == 1e-2 / 4


# ---- graphs of gradients -------------------------------------------------------------------------------------------------


def a_graph_of_gradients(run, step):
    run.compiled(batch(step)).backward(create_graph=True)
    run.opt.step()
    run.opt.zero_grad()


def a_graph_of_gradients_once(run, step):
    run.compiled(batch(step)).backward(create_graph=step == WARM_UP + 1)
    if hasattr(run.opt, "ckpt"):
        run.armed.append(run.used_up())
    run.opt.step()
    run.opt.zero_grad()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_backward_that_makes_a_graph_of_its_own_updates_nothing(interpreted):
    run = begun("in_backward", Pair)
    for step in range(STEPS):
        a_graph_of_gradients(run, step)
        assert not run.used_up()
    assert "create_graph=True" in run.opt.ckpt.graph.why["fc1"].unarmed
    assert same(run.bits(), bits_of_plain(run, adamw, STEPS, a_graph_of_gradients))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_one_such_backward_in_a_loop_that_is_armed_is_left_to_the_step(interpreted):
    with torch._functorch.config.patch(donated_buffer=False):  # else PyTorch refuses it
        run = begun("in_backward", Pair)
        for step in range(STEPS + 2):
            a_graph_of_gradients_once(run, step)
        assert run.armed == [0] * WARM_UP + [4, 0, 0, 0, 4][: STEPS + 2 - WARM_UP]
        assert same(run.bits(), bits_of_plain(run, adamw, STEPS + 2, a_graph_of_gradients_once))


# ---- who calls step ------------------------------------------------------------------------------------------------------


class Handing(torch.optim.Optimizer):
    """Hands everything on, as Accelerate's does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_steps_through_a_wrapper_of_the_optimizer_end_armed_backwards(interpreted):
    wrappers = {}

    def loop(run, step):
        outer = wrappers.setdefault(id(run), Handing(run.opt))
        run.compiled(batch(step)).backward()
        if hasattr(run.opt, "ckpt"):
            run.armed.append(run.used_up())
        outer.step()
        run.opt.zero_grad()

    run = begun("in_backward", Pair)
    for step in range(STEPS):
        loop(run, step)
    assert run.armed == ALL
    wrappers.clear()
    assert same(run.bits(), bits_of_plain(run, adamw, STEPS, loop))


# ---- layers and shapes ---------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Two blocks of two layers, and one outside of them."""

    def __init__(self):
        super().__init__()
        self.h, self.head = nn.ModuleList([Pair(), Pair()]), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.h:
            x = x + block.fc2(torch.relu(block.fc1(x)))
        return self.head(x).square().mean()


def test_blocks_as_layers_are_updated_when_the_last_of_their_gradients_is_final(interpreted):
    run, seen = begun("in_backward", Blocks, layer="block"), []
    executor = run.opt.ckpt._run.steppers[0].executor
    real = executor.section
    for step in range(STEPS):
        if step == STEPS - 1:
            executor.section = lambda place: (seen.append(executor.arranged.graph.layers[place].name), real(place))
        run.step(batch(step))
    assert run.armed == [0] * WARM_UP + [10] * 3
    assert seen == ["head", "h.1", "h.0"] == list(run.opt.ckpt.graph.standing)
    assert same(run.bits(), bits_of_plain(run, adamw, STEPS))


def test_another_input_shape_is_another_region_which_is_armed_too(interpreted):
    sizes = [4] * (WARM_UP + 1) + [6, 6, 4, 5, 4]

    def loop(run, step):
        run.step(torch.randn(sizes[step], 8, generator=torch.Generator().manual_seed(step)))

    run = begun("in_backward", Pair)
    for step in range(len(sizes)):
        loop(run, step)
    assert len(interpreted) >= 4, "it was not compiled anew"
    assert run.armed == [0] * WARM_UP + [4] * (len(sizes) - WARM_UP)
    assert same(run.bits(), bits_of_plain(run, adamw, len(sizes), loop))


def test_what_is_compiled_while_used_up_gradients_stand_there_is_compiled_as_ever(interpreted):
    """Dynamo looks at the gradients of what it is given: in a loop that drops them late, at those without memory."""
    sizes = [4] * (WARM_UP + 1) + [6, 5, 4]

    def loop(run, step):
        loss = run.compiled(torch.randn(sizes[step], 8, generator=torch.Generator().manual_seed(step)))
        run.opt.zero_grad()
        loss.backward()
        run.opt.step()
        if hasattr(run.opt, "ckpt"):
            run.armed.append(sum(isinstance(p.grad, SpentGradient) for p in run.model.parameters()))
        run.model.eval()
        with torch.no_grad():
            run.losses.append(run.compiled(batch(step)).item())
        run.model.train()

    run = begun("in_backward", Pair)
    for step in range(len(sizes)):
        loop(run, step)
    assert run.armed == [0] * WARM_UP + [4] * (len(sizes) - WARM_UP)
    assert same(run.bits(), bits_of_plain(run, adamw, len(sizes), loop))


# ---- compiled autograd ---------------------------------------------------------------------------------------------------


def compiled_autograd():
    from torch._dynamo.compiled_autograd import _enable

    return _enable(torch.compile(backend="eager"))


def all_under_it(run, step):
    with compiled_autograd():
        run.step(batch(step))


def the_backward_under_it(run, step):
    loss = run.compiled(batch(step))
    with compiled_autograd():
        loss.backward()
    assert not hasattr(run.opt, "ckpt") or not run.used_up()
    run.opt.step()
    run.opt.zero_grad()


@pytest.mark.parametrize("loop", [all_under_it, the_backward_under_it])
def test_what_compiled_autograd_runs_is_never_armed_and_our_hooks_are_not_traced(interpreted, loop, recwarn):
    run = begun("in_backward", Pair)
    for step in range(WARM_UP + 1):
        loop(run, step)
    assert not any(run.armed) and run.opt.ckpt.graph.why["fc1"].unarmed
    assert not [each for each in recwarn if "/fxckpt/" in str(each.message).rpartition("File")[2]], "Dynamo looks at our code"
    assert same(run.bits(), bits_of_plain(run, adamw, WARM_UP + 1, loop))


# ---- a whole step in one compiled function -------------------------------------------------------------------------------


class Whole:
    """Makes the steps of runs by one compiled function each, whose losses it keeps."""

    def __init__(self, **options):
        self._options, self._functions = options, {}

    def __call__(self, run, step):
        function = self._functions.get(id(run))
        if function is None:
            function = self._functions[id(run)] = torch.compile(self._made(run), backend=fxckpt.backend, **self._options)
        run.losses.append(function(batch(step)).item())

    def _made(self, run):
        model, opt, armed = run.model, run.opt, run.armed

        def train_step(x):
            loss = model(x)
            loss.backward()
            opt.step()
            armed.append(sum(type(p.grad) is SpentGradient for p in model.parameters()))
            opt.zero_grad()
            return loss.detach()

        return train_step


def test_a_step_that_is_one_compiled_function_in_parts_is_armed_as_a_loop_is(interpreted):
    run, loop = begun("in_backward", Pair), Whole()
    for step in range(STEPS):
        loop(run, step)
    assert run.armed == ALL
    assert same(run.bits(), bits_of_plain(run, adamw, STEPS, Whole()))


# ---- other threads -------------------------------------------------------------------------------------------------------


def elsewhere(function):
    """Call it in another thread; returns what it raised."""
    raised = []

    def call():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits"
    return raised[0] if raised else None


def warmed_up(directory):
    """A run over a store whose next backward is armed."""
    run = begun("in_backward", Pair, directory=directory)
    fxckpt.load()
    for step in range(WARM_UP):
        run.step(batch(step))
    return run


def test_another_thread_that_flushes_or_saves_in_an_armed_backward_changes_nothing(interpreted, tmp_path):
    with fast_directory(tmp_path) as directory:
        run = warmed_up(directory / "d")
        executor, handle, raised = run.opt.ckpt._run.steppers[0].executor, run.opt.ckpt, []
        real = executor.section

        def section(place):
            real(place)
            raised.extend([elsewhere(handle.flush), elsewhere(handle.save)])

        executor.section = section
        run.compiled(batch(WARM_UP)).backward()
        del executor.section
        raised.extend([elsewhere(handle.flush), elsewhere(handle.save)])
        assert raised[0::2] == [None] * 3
        assert ["some layers are updated and some are not" in str(each) for each in raised[1::2]] == [True] * 3
        run.opt.step()
        run.opt.zero_grad()
        assert elsewhere(handle.flush) is None
        assert handle.statistics()["checkpoints_committed"] == WARM_UP + 1
        kept = [t.clone() for t in run.bits()]
        fxckpt.load(step=WARM_UP + 1)
        assert same(kept, run.bits())
        run.step(batch(WARM_UP + 1))
        assert same(run.bits(), bits_of_plain(run, adamw, WARM_UP + 2))


# ---- a load --------------------------------------------------------------------------------------------------------------


def test_behind_a_load_between_backward_and_step_another_backward_is_asked_for(interpreted, tmp_path):
    with fast_directory(tmp_path) as directory:
        run = warmed_up(directory / "d")
        run.opt.ckpt.flush()
        kept = [t.clone() for t in run.bits()]
        run.compiled(batch(9)).backward()
        assert run.used_up() == 4
        fxckpt.load()
        assert same(kept, run.bits()), "nothing of the backward is left"
        with pytest.raises(fxckpt.SetupError, match=r"another state was loaded before opt.step\(\), when .* another backward"):
            run.opt.step()
        assert same(kept, run.bits())
        run.step(batch(WARM_UP))
        assert same(run.bits(), bits_of_plain(run, adamw, WARM_UP + 1))
