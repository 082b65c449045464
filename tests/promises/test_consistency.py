"""Promise 3: a committed checkpoint is one step, whole, however slow the copies and writes are and whatever changes meanwhile.

The tests keep copies of all state after every step and compare what the files hold with the copy of that very step.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import instruments
import pytest
import torch
from digests import differences, snapshot, stored
from small_models import eager
from torch import nn
from torch.nn import functional as F
from waiting import until

import fxckpt
from fxckpt.run.emitting import Emitter
from fxckpt.saving.guard import Guard
from fxckpt.store.reader import Reader, candidates
from fxckpt.store.typed_json import decode_state

pytestmark = pytest.mark.usefixtures("one_thread")

MS = 1000  # microseconds


class Net(nn.Module):
    """Tied weights, BatchNorm, a buffer counted in place in every forward, one that is not persistent, and a frozen part.

    About 2 MB of parameters in layers of different sizes, so that with their state they span several chunks of a MiB, some
    of them shared by layers.
    """

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 300)
        self.norm = nn.BatchNorm1d(300)
        self.outer = nn.Linear(300, 900)
        self.again = nn.Linear(300, 900, bias=False)
        self.again.weight = self.outer.weight
        self.small = nn.Parameter(torch.ones(900))
        self.frozen = nn.Linear(900, 300).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("history", torch.zeros(5000))
        self.register_buffer("hidden", torch.zeros(7), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.history.mul_(0.9).add_(x.mean())
        self.hidden += 1
        h = self.norm(self.inner(x))
        return self.frozen((self.outer(h) + F.relu(self.again(h))) * self.small)


class Tally:
    """Extra state that changes between the steps, in place: a tensor, and a Counter with whole numbers as keys."""

    def __init__(self):
        self.tensor, self.seen = torch.zeros(1000), Counter()

    def count(self, step: int) -> None:
        self.tensor += 1
        self.seen[step % 3] += 1

    def state_dict(self) -> dict:
        return {"tensor": self.tensor, "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.tensor.copy_(state["tensor"])
        self.seen = state["seen"]


class Trainer:
    """Trains a Net, remembering all state after each step, and compares every committed checkpoint with its step's.

    Without a directory: plain PyTorch.
    """

    def __init__(self, directory: Path | None, *, forward=lambda m: m, optimizer=None, **options):
        torch.manual_seed(0)
        self.directory, self.model, self.tally = directory, Net(), Tally()
        self.forward = forward(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = optimizer(trained) if optimizer else torch.optim.AdamW(trained, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.opt, 1, 0.9)
        if directory is not None:
            fxckpt.compile_step(
                self.opt,
                directory,
                model=self.model,
                extra={"tally": self.tally, "s": self.scheduler},
                **{"update": "native", "every": 1, "chunk_mb": 1, **options},
            )
        self.reference, self.extra, self.checked, self.steps = {}, {}, set(), 0

    def step(self) -> None:
        loss = self.forward(torch.randn(16, 32)).square().mean()
        loss.backward()
        self.opt.step()
        self.steps += 1
        self.reference[self.steps] = snapshot(self.model, self.opt)
        self.opt.zero_grad()
        self.scheduler.step()
        self.tally.count(self.steps)
        self.extra[self.steps] = {
            "lr": self.scheduler.get_last_lr(),
            "tensor": self.tally.tensor.clone(),
            "seen": Counter(self.tally.seen),
            "hidden": self.model.hidden.clone(),
        }

    def train(self, steps: int, look: int = 1) -> None:
        """``look``: compare after every so many steps. What is on its way has time to arrive meanwhile."""
        for step in range(1, steps + 1):
            self.step()
            if step % look == 0:
                self.check()

    def check(self) -> None:
        """Compare each committed checkpoint, once, even while others are being written."""
        for found in candidates(self.directory):
            if found.record.generation not in self.checked:
                try:
                    self._compare(found)
                except (fxckpt.NoCheckpoint, FileNotFoundError):
                    continue  # taken back while we looked
                self.checked.add(found.record.generation)

    def _compare(self, found) -> None:
        step, reader = found.record.step, Reader(found.path)
        reader.verify()
        held = stored(found.path)
        raw = reader.state_tensors()
        early, late = (decode_state(found.record.state[when], raw) for when in ("early", "late"))
        Reader(found.path).verify()  # still the same files
        assert differences(held, self.reference[step]) == [], f"step {step}"
        then = self.extra[step]
        assert torch.equal(late["tally"]["tensor"], then["tensor"]) and late["tally"]["seen"] == then["seen"]
        assert late["s"]["_last_lr"] == then["lr"]
        assert torch.equal(early["buffers"]["hidden"], then["hidden"])
        assert {layer.step for layer in found.record.layers} == {step}

    def finish(self) -> None:
        self.opt.ckpt.flush()
        self.check()


SLOW = {
    "slow writes": {"pwrite": 4 * MS},
    "slow copies": {"copy": 3 * MS},
    "slow syncs": {"fdatasync": 25 * MS, "fsync": 5 * MS},
    "slow everything": {"copy": MS, "pwrite": 2 * MS, "fdatasync": 5 * MS},
}


@pytest.mark.parametrize(
    ("slow", "staging_mb", "max_async", "threads"),
    [
        ("slow writes", 0, 1, 1),
        ("slow writes", 1, 2, 2),
        ("slow copies", 0, 1, 2),
        ("slow copies", 1, 3, 1),
        ("slow syncs", 0, 3, 2),
        ("slow everything", 32, 2, 3),
    ],
)
def test_with_slow_writers_every_checkpoint_is_exactly_its_step(slow, staging_mb, max_async, threads, tmp_path):
    trainer = Trainer(tmp_path / "d", staging_mb=staging_mb, max_async=max_async, threads=threads)
    for op, delay in SLOW[slow].items():
        instruments.delay(op, delay)
    trainer.train(12, look=4)
    trainer.finish()
    found = trainer.opt.ckpt.statistics()
    assert found["checkpoints_committed"] == 12 and found["last_committed_step"] == 12
    assert len(trainer.checked) >= 3


def test_every_checkpoint_is_kept_and_each_is_exactly_its_step(tmp_path):
    trainer = Trainer(tmp_path / "d", keep=20, max_async=3, forward=eager)
    instruments.delay("copy", MS)
    trainer.train(10, look=10)
    trainer.finish()
    assert len(trainer.checked) == 10


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        lambda params: torch.optim.Adam(params, lr=1e-2, fused=True, amsgrad=True),
        lambda params: torch.optim.RAdam(params, lr=1e-2),
        lambda params: torch.optim.Adafactor(params, lr=torch.tensor(1e-2)),
    ],
    ids=["SGD", "Adam fused", "RAdam, branching", "Adafactor, whole"],
)
def test_every_optimizer_path_is_fenced(make, tmp_path):
    trainer = Trainer(tmp_path / "d", optimizer=make, staging_mb=0, max_async=2, keep=20)
    instruments.delay("copy", 4 * MS)
    trainer.train(8, look=8)
    trainer.finish()
    assert len(trainer.checked) == 8


@pytest.mark.parametrize("every", [2, 3])
def test_steps_without_a_checkpoint_wait_for_copies_under_way(every, tmp_path):
    trainer = Trainer(tmp_path / "d", every=every, staging_mb=0, keep=20)
    instruments.delay("copy", 4 * MS)
    trainer.train(3 * every, look=3 * every)
    trainer.finish()
    assert sorted(found.record.step for found in candidates(tmp_path / "d")) == [every, 2 * every, 3 * every]


def test_without_fences_the_same_test_fails(tmp_path, monkeypatch):
    """The tests above can fail."""
    monkeypatch.setattr(Emitter, "fence", lambda self, layer, tensors: None)
    monkeypatch.setattr(Emitter, "fence_all", lambda self: None)
    monkeypatch.setattr(Guard, "compare", lambda *_: None)  # it would see the changes and drop what is torn
    trainer = Trainer(tmp_path / "d", staging_mb=0, max_async=2)
    instruments.delay("copy", 40 * MS)  # longer than a step takes, on a busy machine too
    with pytest.raises(AssertionError, match="step"):
        trainer.train(8, look=8)
        trainer.finish()


def test_several_optimizers_are_one_step(tmp_path):
    """The second leads; the first one's update of the next iteration must wait for the copies of this one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 64))
    first, second = torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    fxckpt.compile_step([first, second], tmp_path / "d", model=model, every=1, keep=20, update="native", staging_mb=0, chunk_mb=1)
    instruments.delay("copy", 4 * MS)
    reference = {}
    for step in range(1, 9):
        model(torch.randn(8, 64)).square().mean().backward()
        first.step(), second.step()
        first.zero_grad(), second.zero_grad()
        reference[step] = snapshot(model, first, second)
    second.ckpt.flush()
    found = candidates(tmp_path / "d")
    assert sorted(each.record.step for each in found) == list(range(1, 9))
    for each in found:
        assert differences(stored(each.path), reference[each.record.step]) == []


def test_gradients_given_by_hand_close_the_step_before_the_first_of_several_optimizers(tmp_path):
    """No backward runs, so nothing but ``step`` can close the step before; the first optimizer's does."""
    params = [nn.Parameter(torch.zeros(300, 300)) for _ in range(2)]
    first, second = (torch.optim.SGD([p], lr=1.0, momentum=0.9) for p in params)
    fxckpt.compile_step([first, second], tmp_path / "d", every=1, keep=20, update="native")
    for _ in range(5):
        for p in params:
            p.grad = torch.full_like(p, -1.0)
        first.step(), second.step()
    second.ckpt.flush()
    assert second.ckpt.statistics()["checkpoints_committed"] == 5


def test_a_step_closes_at_the_first_gradient_of_the_next_backward_and_not_before(tmp_path):
    """Not at zero_grad, nor at a forward: an evaluation runs the same graph, and a scheduler may step after it."""
    trainer = Trainer(tmp_path / "d", forward=eager)
    trainer.step()
    trainer.scheduler.step()  # after zero_grad, before the next forward
    trainer.opt.zero_grad()
    loss = trainer.forward(torch.randn(16, 32)).square().mean()
    trainer.scheduler.step()
    trainer.tally.count(7)
    time.sleep(0.3)
    assert candidates(tmp_path / "d") == []
    loss.backward()
    until(lambda: trainer.opt.ckpt.statistics()["last_committed_step"] == 1, timeout=20)
    record = candidates(tmp_path / "d")[0].record
    late = decode_state(record.state["late"], Reader(candidates(tmp_path / "d")[0].path).state_tensors())
    assert late["s"]["last_epoch"] == 3 and late["tally"]["seen"] == Counter({1: 2})
    assert record.optimizers is not None and trainer.opt.ckpt.statistics()["steps"] == 1


# ---- changes that no fence can see ----


def test_a_frozen_parameter_changed_while_it_is_copied_drops_that_checkpoint_and_says_so(tmp_path, caplog):
    trainer = Trainer(tmp_path / "d", staging_mb=0, threads=1)
    trainer.train(2)
    trainer.opt.ckpt.flush()
    instruments.delay("copy", 20 * MS)
    trainer.step()
    with torch.no_grad():
        trainer.model.frozen.weight.add_(1)
    trainer.step()
    with pytest.raises(fxckpt.FxckptError, match=r"frozen\.weight.*changed in place"):
        trainer.opt.ckpt.flush()
    assert "frozen.weight" in caplog.text
    failed = trainer.opt.ckpt.statistics()["checkpoints_failed"]
    for _ in range(3):  # from now on it is copied when a step closes, and may change before that
        trainer.step()
        with torch.no_grad():
            trainer.model.frozen.weight.add_(1)
        trainer.reference[trainer.steps]["frozen.weight"] = trainer.model.frozen.weight.detach().clone()
    trainer.step()
    trainer.finish()
    found = trainer.opt.ckpt.statistics()
    assert (found["last_committed_step"], found["checkpoints_failed"]) == (8, failed)


def clamped(directory: Path) -> Trainer:
    """One whose weights were clamped behind its only step, while that is copied."""
    trainer = Trainer(directory, staging_mb=0, threads=1)
    instruments.delay("copy", 20 * MS)
    trainer.step()
    with torch.no_grad():
        trainer.model.small.clamp_(0.5, 0.6)
    return trainer


def test_a_parameter_changed_between_step_and_close_drops_that_checkpoint(tmp_path):
    """The emitted values are not those that training goes on with."""
    trainer = clamped(tmp_path / "d")
    trainer.step()
    with pytest.raises(fxckpt.FxckptError, match=r"small.*changed in place.*step 1"):
        trainer.opt.ckpt.flush()
    assert [found.record.step for found in candidates(tmp_path / "d")] == [2]


@pytest.mark.parametrize("rest", ["flush", "end_step", "save"])
def test_who_says_that_all_is_at_rest_gets_a_checkpoint_of_that_instant(rest, tmp_path):
    trainer = clamped(tmp_path / "d")
    torch.rand(3)  # an evaluation
    trainer.model.calls += 1
    expected, random = snapshot(trainer.model, trainer.opt), torch.get_rng_state()
    getattr(trainer.opt.ckpt, rest)()
    trainer.opt.ckpt.flush()
    [found] = candidates(tmp_path / "d")
    assert differences(stored(found.path), expected) == []
    early = decode_state(found.record.state["early"], Reader(found.path).state_tensors())
    assert torch.equal(early["random"]["torch"], random)


def replace_data(trainer: Trainer) -> None:
    trainer.model.small.data = torch.full((900,), 2.0)
    trainer.model.outer.weight.data = trainer.model.outer.weight.data.clone() * 0.5


REPLACE = {
    "load_state_dict": lambda t: t.opt.load_state_dict(t.opt.state_dict()),
    "data": replace_data,
    "state of all": lambda t: t.opt.state.clear(),
    "state of one": lambda t: t.opt.state.pop(t.model.outer.weight),
}


@pytest.mark.parametrize("replace", REPLACE)
def test_tensors_replaced_while_they_are_copied_leave_good_checkpoints(replace, tmp_path):
    """What is being copied stays alive and as it was; what takes its place is what later steps use and store."""
    trainer = Trainer(tmp_path / "d", staging_mb=0, keep=20, threads=1)
    trainer.train(1)
    trainer.opt.ckpt.flush()
    instruments.delay("copy", 25 * MS)
    trainer.step()
    trainer.opt.ckpt.end_step()
    REPLACE[replace](trainer)
    trash = [torch.full_like(p, 7.0) for p in trainer.model.parameters()]  # takes memory that was freed too early
    trainer.step()
    del trash
    instruments.delay("copy", 0)
    trainer.train(2)
    trainer.finish()
    assert len(trainer.checked) == 5 and trainer.opt.ckpt.statistics()["checkpoints_failed"] == 0


@pytest.mark.parametrize("replace", ["data", "state of one"])
def test_tensors_replaced_before_the_step_closes_drop_its_checkpoint(replace, tmp_path):
    trainer = Trainer(tmp_path / "d", keep=20)
    trainer.train(2)
    REPLACE[replace](trainer)
    trainer.train(1)
    with pytest.raises(fxckpt.FxckptError, match=r"replaced.*step 2 is discarded.*end_step"):
        trainer.finish()
    trainer.finish()
    assert sorted(found.record.step for found in candidates(tmp_path / "d")) == [1, 3]


@pytest.mark.parametrize("replace", ["state of all", "state of one"])
def test_state_that_is_thrown_away_is_made_anew_as_pytorch_does(replace, tmp_path):
    def train(directory):
        trainer = Trainer(directory)
        for step in range(5):
            if step == 3:
                REPLACE[replace](trainer)
            trainer.step()
        return trainer.reference[5]

    assert differences(train(tmp_path / "d"), train(None)) == []


def test_a_group_added_in_the_middle_is_in_the_next_checkpoint(tmp_path):
    trainer = Trainer(tmp_path / "d", keep=20)
    trainer.train(2)
    trainer.model.frozen.requires_grad_(True)
    trainer.opt.add_param_group({"params": list(trainer.model.frozen.parameters()), "lr": 0.5})
    trainer.train(3)
    trainer.finish()
    newest = candidates(tmp_path / "d")[0]
    assert newest.record.step == 5 and "exp_avg/frozen.weight" in stored(newest.path)


def test_a_parameter_that_gets_its_first_gradient_late_is_in_every_checkpoint(tmp_path):
    """Its first step is PyTorch's own, outside the StepGraph, and must wait for the copy of its value as well."""
    trainer = Trainer(
        tmp_path / "d", keep=20, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), staging_mb=0, threads=1
    )
    trainer.model.outer.requires_grad_(False)
    trainer.train(2)
    instruments.delay("copy", 10 * MS)
    trainer.step()
    trainer.model.outer.requires_grad_(True)
    trainer.train(3, look=3)
    trainer.finish()
    keys = {found.record.step: set(stored(found.path)) for found in candidates(tmp_path / "d")}
    assert all("outer.weight" in found for found in keys.values())
    assert [step for step in sorted(keys) if "momentum_buffer/outer.weight" in keys[step]] == [4, 5, 6]
