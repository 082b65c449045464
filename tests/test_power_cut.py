"""Promise 4: a committed checkpoint survives a power cut at any point between two system calls.

Real runs are recorded at the engine's I/O table and cut after each call, in every way that loses unsynced data. To know
that the test would notice, each ordering step of the store is then taken out of the log, and must be missed.

``FXCKPT_CRASH=full`` (``make crash``) tries many more random states.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash import Judge, explore, write_out
from storing import Trainer, fast_directory, start

from fxckpt.engine import io
from fxckpt.store.reader import latest

FULL = os.environ.get("FXCKPT_CRASH") == "full"
SAMPLES = 300 if FULL else 5
STORE = "runs/first/checkpoints"


class Recording:
    """The calls of a scenario, on a disk of its own."""

    def __init__(self, tmp: Path, scenario: Callable[[Path, Path], None], keep: int):
        self.base, self.keep, self.tmp, self.judges = tmp / "disk", keep, tmp, 0
        acks = tmp / "acks"
        self.base.mkdir()
        acks.mkdir()
        io.record(tmp / "log")
        try:
            scenario(self.base / STORE, acks)
        finally:
            io.stop_recording()
        self.log = io.read_log(tmp / "log")

    def judge(self, partials: bool = True) -> Judge:
        """A judge with nothing remembered, and its own scratch directory."""
        self.judges += 1
        return Judge(STORE, self.tmp / f"judge-{self.judges}", self.keep, partials)


def two_lives(root: Path, acks: Path) -> None:
    """Rotation through recycled slots, a named save, two in flight, one given up; then a second life; then a third of
    a smaller model, with store.json lost, that rolls back and comes past the same step again."""
    trainer = start(root, acks, keep=2)
    for step in range(1, 6):
        trainer.save(step)
    trainer.save(5, name="best")
    six, seven = trainer.begin(6), trainer.begin(7)
    trainer.finish(6, *six)
    trainer.finish(7, *seven)
    give_up(trainer, 8)
    trainer.save(9)
    trainer.close()
    trainer = start(root, acks, keep=2)
    trainer.save(10)
    trainer.close()
    io.unlink(root / "store.json")
    trainer = start(root, acks, keep=2, load=False, items=700)
    trainer.store.mark_loaded(max(trainer.store._parents) - 1)  # one behind the newest
    for step in (10, 11, 12):
        trainer.save(step)
    trainer.close()


def give_up(trainer: Trainer, step: int) -> None:
    """A checkpoint that is cancelled while it is being written."""
    slot, checkpoint = trainer.begin(step)
    checkpoint.cancel()
    assert checkpoint.settled(10)
    checkpoint.release()
    trainer.store.abandon(slot, bad=False)


def one_slot(root: Path, acks: Path) -> None:
    """keep=1: each commit gives up the only other checkpoint."""
    trainer = start(root, acks, keep=1, max_async=1)
    for step in range(1, 5):
        trainer.save(step)
    trainer.close()


@pytest.fixture(scope="module")
def lives(tmp_path_factory) -> Iterator[Recording]:
    with fast_directory(tmp_path_factory.mktemp("lives")) as directory:
        yield Recording(directory, two_lives, keep=2)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Iterator[Recording]:
    with fast_directory(tmp_path_factory.mktemp("single")) as directory:
        yield Recording(directory, one_slot, keep=1)


@pytest.mark.parametrize("scenario", ["lives", "single"])
def test_power_cut_between_any_two_calls_leaves_a_good_checkpoint(scenario, request):
    recording = request.getfixturevalue(scenario)
    broken = explore(recording.log, str(recording.base), recording.judge(), samples=SAMPLES)
    assert broken is None


def test_after_a_power_cut_the_next_life_loads_and_checkpoints(lives):
    """On real files: a state loads, the store opens, a next checkpoint commits. One state of each set of names."""
    shapes, judge = set(), lives.judge()

    def visit(state, acknowledged):
        store = judge.store(state)
        shape = (*sorted(store), *sorted(store.get("named", {})), bool(acknowledged))
        if shape in shapes:
            return
        shapes.add(shape)
        disk = lives.tmp / f"shape-{len(shapes)}"
        write_out(state, disk)
        newest = latest(disk / STORE)
        if acknowledged:
            assert newest.generation >= max(generation for generation, _ in acknowledged)
        trainer = start(disk / STORE, keep=2)
        trainer.save(99)
        trainer.close()
        assert latest(disk / STORE).step == 99
        assert latest(disk / STORE).generation > (newest.generation if newest else 0)

    assert explore(lives.log, str(lives.base), judge, samples=1, visit=visit) is None
    assert len(shapes) > 20


def without(log: list[io.Call], drop: Callable[[io.Call, str], bool]) -> Iterator[io.Call]:
    """The calls but those for which ``drop(call, last)`` says so; ``last``: the last change of a name, as "op name"."""
    last = ""
    for call in log:
        if call.op in ("rename", "mkdir", "unlink"):
            last = f"{call.op} {os.path.basename(call.target or call.path)}"
        if not drop(call, last):
            yield call


def syncs(call: io.Call, *ends: str) -> bool:
    """Whether it makes something durable whose path ends like one of these."""
    return call.op in ("fsync", "fdatasync") and call.path.endswith(ends)


MISSING_STEPS = {
    "the sync of the engine's files": lambda call, last: syncs(call, "model.safetensors", "optimizer.safetensors"),
    "the sync of state.safetensors": lambda call, last: syncs(call, "state.safetensors"),
    "the sync of commit.json": lambda call, last: syncs(call, "commit.json.tmp"),
    "the sync of the slot": lambda call, last: syncs(call, ".partial") and last == "rename commit.json",
    "the sync of the root after a commit": lambda call, last: syncs(call, "/checkpoints") and "rename step" in last,
    "the sync of the root after a recycling": lambda call, last: syncs(call, "/checkpoints") and "rename slot" in last,
    "the removal of the old record": lambda call, last: call.op == "unlink" and last == "unlink commit.json",
    "the sync of that removal": lambda call, last: syncs(call, ".partial") and last == "unlink commit.json",
    "the sync of the directories above": lambda call, last: syncs(call, "/runs"),
    "the sync of the name of named/": lambda call, last: syncs(call, "/checkpoints") and last == "mkdir named",
    "the sync of named/": lambda call, last: syncs(call, "/named"),
}


@pytest.mark.parametrize("step", MISSING_STEPS)
def test_a_commit_without_one_of_its_steps_would_be_noticed(step, lives):
    log = list(without(lives.log, MISSING_STEPS[step]))
    assert len(log) < len(lives.log), "the step is not in the log"
    broken = explore(log, str(lives.base), lives.judge(partials="removal" in step), samples=SAMPLES)
    assert broken is not None, f"a power cut without {step} breaks nothing"


def moved(log: list[io.Call], which: Callable[[io.Call], bool], before: Callable[[io.Call], bool]) -> list[io.Call]:
    """Each rename of a slot for which ``which`` holds, done already where ``before`` last held in front of it."""
    result = list(log)
    for at, call in enumerate(log):
        if not which(call):
            continue
        to = max(i for i in range(at) if before(log[i]))
        between = [dataclasses.replace(each, path=each.path.replace(call.path, call.target),
                                       target=each.target.replace(call.path, call.target)) for each in result[to:at]]
        result[to : at + 1] = [call, *between]
    return result


def test_a_rename_before_the_record_would_be_noticed(lives):
    log = moved(lives.log, lambda call: call.op == "rename" and "/step-" in call.target,
                lambda call: call.op == "rename" and call.target.endswith("/commit.json"))
    assert explore(log, str(lives.base), lives.judge(), samples=0) is not None


def test_a_recycling_before_the_newer_one_is_committed_would_be_noticed(single):
    log = moved(single.log, lambda call: call.op == "rename" and call.target.endswith(".partial"),
                lambda call: call.op == "rename" and "/step-" in call.target)
    assert explore(log, str(single.base), single.judge(), samples=0) is not None
