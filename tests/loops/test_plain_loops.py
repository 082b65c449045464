"""Loops without boundaries: what they change behind a step and before a backward is told apart, or said, and never mixed."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxckpt
from fxckpt.run.run import Run


class Net(nn.Module):
    """Dropout, BatchNorm, and buffers that nothing but a loop changes, one of them in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.register_buffer("shift", torch.zeros(1))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + self.shift + self.hidden


class Life:
    """One life of a script with a plain loop; what it keeps is in the model, ``extra`` and the optimizer."""

    def __init__(self, directory: Path | None):
        torch.manual_seed(0)
        self.net, self.average = Net(), nn.Linear(4, 8).requires_grad_(False)
        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.opt, 0.9)
        self.best, self.ready, self.start = {"loss": 9.0}, {"x": torch.randn(6, 4)}, 0
        if directory is not None:
            extra = {"scheduler": self.scheduler, "best": self.best, "ready": self.ready}
            both = nn.ModuleDict({"net": self.net, "average": self.average})
            fxckpt.compile_step(self.opt, directory, model=both, extra=extra, update="native", every=1, keep=3)
            self.start = fxckpt.load().step

    @property
    def run(self) -> Run:
        return self.opt.ckpt._run

    def backward(self, x: torch.Tensor) -> float:
        loss = (self.net(x) - 1).square().mean()
        loss.backward()
        return loss.item()

    def bits(self) -> list[torch.Tensor]:
        states = [value for state in self.opt.state.values() for value in state.values()]
        kept = [torch.tensor([*self.scheduler.get_last_lr(), self.best["loss"]]), self.ready["x"], self.net.hidden]
        return [t.clone() for t in [*self.net.state_dict().values(), *self.average.state_dict().values(), *states, *kept]]


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def in_step(life: Life, step: int) -> None:
    life.backward(batch(step))
    life.opt.step()
    life.opt.zero_grad()


def prefetched(life: Life, step: int) -> None:
    """The next batch is fetched between forward and backward."""
    loss = (life.net(life.ready["x"]) - 1).square().mean()
    life.ready["x"] = torch.randn(6, 4)
    loss.backward()
    life.opt.step()
    life.opt.zero_grad()


def behind(life: Life, step: int) -> None:
    """All that a loop may change behind its step: extras, buffers, an average, weights."""
    in_step(life, step)
    life.scheduler.step()
    life.best["loss"] = min(life.best["loss"], step / 3)
    with torch.no_grad():
        life.net.shift += 0.1
        life.net.hidden += 0.2
        life.net.layers[3].weight.clamp_(-0.3, 0.3)
        for p, q in zip(life.average.parameters(), life.net.layers[0].parameters()):
            p.lerp_(q, 0.5)


def evaluated(life: Life, step: int) -> None:
    """Now and then an evaluation, whose loader draws a seed."""
    in_step(life, step)
    if step % 5 == 4:
        life.net.eval()
        for (x,) in DataLoader(TensorDataset(batch(step)), batch_size=3):
            life.net(x)
        life.net.train()


def train(life: Life, turn: Callable[[Life, int], None], steps: int) -> None:
    for step in range(life.start, steps):
        turn(life, step)


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Callable[..., Life]]:
    """Lives of scripts in one directory; each ends when the next begins. One that dies is dropped as at SIGKILL, once what it
    handed over is durable."""
    running: list[Life] = []

    def end() -> None:
        for life in running:
            life.run.closing.drop("the process was killed")
            life.opt.ckpt.shutdown()
        running.clear()

    def live(turn: Callable[[Life, int], None], steps: int, where: str = "d") -> Life:
        end()
        life = Life(tmp_path / where)
        running.append(life)
        train(life, turn, steps)
        return life

    yield live
    end()


@pytest.mark.parametrize("turn", [in_step, prefetched, behind, evaluated])
@pytest.mark.parametrize("dies", [[3], [6, 9], [10]])
def test_a_plain_loop_goes_on_with_the_same_bits(turn, dies, lives):
    whole = lives(turn, 14, "whole").bits()
    for steps in dies:
        lives(turn, steps)
    last = lives(turn, 14)
    assert 0 < last.start <= dies[-1]
    assert all(torch.equal(a, b) for a, b in zip(whole, last.bits()))
    stock = Life(None)
    train(stock, turn, 14)
    assert all(torch.equal(a, b) for a, b in zip(whole, stock.bits()))


def test_a_change_behind_the_step_costs_one_checkpoint_at_most(lives):
    life = lives(behind, 8)
    life.opt.ckpt.flush()
    found = life.opt.ckpt.statistics()
    assert (found["checkpoints_failed"], found["checkpoints_committed"]) == (0, 7)


def test_the_checkpoint_before_an_evaluation_is_dropped_and_said(lives, caplog):
    life = lives(evaluated, 6)
    life.opt.ckpt.flush()
    assert [found.step for found in fxckpt.checkpoints(life.opt.ckpt.directory)] == [3, 4, 6]
    assert "after step 5 other random numbers were drawn than usual" in caplog.text and "fxckpt.steps" in caplog.text


def test_a_loader_in_a_plain_loop_is_said_with_the_way_out(tmp_path, caplog):
    """Its iterator draws when it is made: a resumed run makes one where this run goes on with another."""
    life = Life(tmp_path)
    for (x,) in DataLoader(TensorDataset(batch(0)), batch_size=1, shuffle=True):
        life.backward(x.expand(6, 4))
        life.opt.step()
    life.opt.ckpt.shutdown()
    assert caplog.text.count("before the first step other random numbers are drawn") == 1 and "fxckpt.batches" in caplog.text


@pytest.mark.parametrize("turn", [in_step, prefetched, behind])
def test_nothing_is_said_of_a_loop_that_is_exact(turn, lives, caplog):
    caplog.set_level(logging.WARNING, "fxckpt")
    life = lives(turn, 12)
    life.opt.ckpt.flush()
    assert [r.getMessage() for r in caplog.records if "changed in place" not in r.getMessage()] == []


def test_draws_that_vary_cost_no_checkpoint_for_good(lives):
    """Batches of many sizes: how much is drawn tells nothing."""

    def turn(life: Life, step: int) -> None:
        life.backward(torch.randn(4 + step * 7 % 5, 4))
        life.opt.step()

    life = lives(turn, 30)
    life.opt.ckpt.flush()
    assert life.opt.ckpt.statistics()["checkpoints_committed"] >= 24


def test_a_loop_in_which_no_checkpoint_can_be_taken_ends_with_an_error_after_two(tmp_path):
    life = Life(tmp_path)
    with pytest.raises(fxckpt.SetupError, match=r"no checkpoint can be taken.*replaced.*fxckpt\.steps"):
        for step in range(8):
            in_step(life, step)
            life.net.layers[3].weight.data = life.net.layers[3].weight.data.clone()
    assert life.opt.ckpt.statistics()["steps"] < 5
    assert fxckpt.checkpoints(tmp_path) == []


@pytest.mark.parametrize("left", ["before the scheduler stepped", "behind all"])
def test_a_process_that_ends_by_itself_keeps_a_step_only_if_its_turn_was_finished(left, tmp_path):
    life = Life(tmp_path)
    for step in range(5):
        in_step(life, step)
        if step == 4 and left == "before the scheduler stepped":
            break  # a handler's sys.exit, a KeyboardInterrupt that the script caught
        life.scheduler.step()
    life.run.end(failed=False)
    assert fxckpt.checkpoints(tmp_path)[-1].step == (5 if left == "behind all" else 4)


def test_gradients_of_the_backward_that_a_step_was_made_in_do_not_close_it(tmp_path):
    """Optimizers inside the backward, the list in the order in which they step."""
    first, last = nn.Linear(4, 4), nn.Linear(4, 1)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (last, first)]
    for m, opt in ((last, opts[0]), (first, opts[1])):
        m.bias.register_post_accumulate_grad_hook(lambda p, opt=opt: opt.step())
    fxckpt.compile_step(opts, tmp_path, model=[first, last], every=1, update="native", keep=9)
    after = []
    for step in range(4):
        last(first(batch(step))).sum().backward()
        after.append([p.detach().clone() for p in [*first.parameters(), *last.parameters()]])
    opts[0].ckpt.flush()
    opts[0].ckpt.shutdown()
    for found in fxckpt.checkpoints(tmp_path):
        again = [nn.Linear(4, 4), nn.Linear(4, 1)]
        fxckpt.load(tmp_path, model=again, step=found.step)
        stored = [p for m in again for p in m.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(stored, after[found.step - 1]))


def test_finish_on_signal_takes_the_checkpoint_of_a_boundary(tmp_path):
    life = Life(tmp_path)
    ended = []
    signal.signal(signal.SIGUSR1, lambda *_: ended.append(life.opt.ckpt.statistics()["last_committed_step"]))
    try:
        life.opt.ckpt.finish_on_signal(signal.SIGUSR1)
        for step in fxckpt.steps(6):
            if step == 3:
                signal.raise_signal(signal.SIGUSR1)
            in_step(life, step)
            life.scheduler.step()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    life.opt.ckpt.shutdown()
    assert ended == [4]


@pytest.mark.parametrize("boundaries", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_an_iterator_that_no_checkpoint_knows_are_said(workers, boundaries, tmp_path, caplog):
    life = Life(tmp_path)
    source = iter(DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4, num_workers=workers))
    for _ in fxckpt.steps(6) if boundaries else range(6):
        life.backward(next(source)[0])
        life.opt.step()
    life.opt.ckpt.shutdown()
    del source
    assert caplog.text.count("from an iterator that no checkpoint knows") == 1


def test_nothing_is_said_of_iterators_that_end_within_an_iteration_or_are_known(tmp_path, caplog):
    life = Life(tmp_path)
    data, other = TensorDataset(torch.randn(40, 4)), TensorDataset(torch.randn(8, 4))
    validation = DataLoader(other, batch_size=4, num_workers=1, persistent_workers=True)
    for (x,) in fxckpt.batches(DataLoader(data, batch_size=4)):
        life.backward(x)
        life.opt.step()
        for _ in validation:
            pass
        next(iter(DataLoader(other, batch_size=2)))
    life.opt.ckpt.shutdown()
    assert "no checkpoint knows" not in caplog.text
