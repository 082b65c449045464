"""Promise 4: a committed checkpoint survives a power cut at any point between two system calls.

Real runs are recorded at the engine's I/O table and cut after each call, in every way that loses unsynced data. Then each
ordering edge of docs/format.md is taken away: its sync is never made, and it is made too late. Each must be missed, else
the test is blind or the edge is not needed. And a killed run leaves unsynced names behind: the next run is recorded on
top of the log of the first one, cut short at any call.

All of it twice: ``writer="thread"``, and ``writer="monitor"``, where the operations are those of the monitor's own process
(``recorded_monitor.py``) and a checkpoint counts as acknowledged when the trainer's process was told. The log is one, in the
order of both. And a trainer is killed that has handed over what the monitor then finishes, and a monitor that is replaced.

``FXCKPT_CRASH=full`` (``make crash``) tries far more states, and a kill at every call.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import instruments
import pytest
import torch.distributed as dist
from crash import FULL, QUICK, SHORT, Disk, Edge, Judge, explore, late, moved, without, write_out
from frozen_run import frozen_run
from joint_store import JointTrainer
from real_run import real_run
from repository import ROOT, SUPPORT, python_path
from storing import MonitoredTrainer, Trainer, fast_directory, recorded_monitors, start
from trespass import cut, link, locked_for_reading, remove, rot, rot_when_marked, swap, with_links
from waiting import until

import fxckpt
from fxckpt.engine import io
from fxckpt.monitor import launch
from fxckpt.store import names
from fxckpt.store.read_back import ReadBack
from fxckpt.store.reader import candidates, latest, read_record
from fxckpt.store.record import Journal

WHOLE = os.environ.get("FXCKPT_CRASH") == "full"
RULE = FULL if WHOLE else SHORT
STORE = "runs/first/checkpoints"
ITEMS = 700  # floats a tensor: each file has two chunks
WRITERS = ("thread", "monitor")


class Recording:
    """The calls of a scenario, on a disk of its own: those of this process, and of its monitors."""

    def __init__(self, tmp: Path, scenario: Callable[[Path, Path, str], None] | None, keep: int, writer: str):
        self.base, self.keep, self.tmp, self.judges, self.writer = tmp / "disk", keep, tmp, 0, writer
        self.acks = tmp / "acks"
        self.base.mkdir()
        self.acks.mkdir()
        self.log = self.record(scenario) if scenario else []

    def record(self, scenario: Callable[[Path, Path, str], None]) -> list[instruments.Call]:
        """What one run, or several, do on the disk as it is."""
        instruments.record(self.tmp / "log")
        try:
            with recorded_monitors(self.tmp / "log"):
                scenario(self.base / STORE, self.acks, self.writer)
        finally:
            instruments.stop_recording()
        behind = self.tmp / "log.behind"
        assert not behind.exists() or behind.read_text() == "", "the monitor changed files behind the table's back"
        assert behind.exists() == (self.writer == "monitor"), "no monitor was recorded, or one that was not asked for"
        return with_links(instruments.read_log(self.tmp / "log"))

    def judge(self) -> Judge:
        """A judge with nothing remembered, and its own scratch directory."""
        self.judges += 1
        return Judge(STORE, self.tmp / f"judge-{self.judges}", self.keep)

    def explore(self, log: list[instruments.Call], rule=RULE, **options):
        """The first broken promise, and how many states were looked at."""
        judge = self.judge()
        found = explore(log, str(self.base), judge, rule, **options)
        return found, judge.states


# ---- scenarios ----


def once(root: Path, acks: Path, writer: str) -> None:
    """The store is made, with the directories above it, and one checkpoint."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
    trainer.save(1)
    trainer.close()


def one_slot(root: Path, acks: Path, writer: str) -> None:
    """keep=1: each commit gives up the only other checkpoint, whose slot is then recycled."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
    for step in range(1, 5):
        trainer.save(step)
    trainer.close()


def rotation(root: Path, acks: Path, writer: str) -> None:
    """keep=3 with two in flight at a time."""
    trainer = start(root, acks, keep=3, items=ITEMS, writer=writer)
    for step in range(1, 8, 2):
        first, second = trainer.begin(step), trainer.begin(step + 1)
        trainer.finish(step, *first)
        trainer.finish(step + 1, *second)
    trainer.close()


def named(root: Path, acks: Path, writer: str) -> None:
    """Named saves among others; one that is interrupted just behind the rename to its final name."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
    trainer.save(1)
    trainer.save(1, name="first")
    interrupted(trainer, 2, "second")
    trainer.save(2)
    trainer.save(3, name="second")
    trainer.close()


def named_again(root: Path, acks: Path, writer: str) -> None:
    """A second life goes on from before a named save of the first, and takes it again; once it is interrupted behind the
    exchange of the names."""
    trainer = start(root, acks, keep=2, max_async=1, items=ITEMS, writer=writer)
    trainer.save(1)
    trainer.save(2, name="second")
    trainer.close()
    trainer = start(root, acks, keep=2, max_async=1, items=ITEMS, writer=writer, load=False)
    trainer.store.mark_loaded(1)
    interrupted(trainer, 2, "second")
    trainer.save(2, name="second")
    trainer.close()


def touched(root: Path, acks: Path, writer: str) -> None:
    """Somebody removes a file of a waiting slot, puts a directory in the place of another, and removes the lock; and keeps the
    next run from taking it, by a lock for reading. There are files of others beside."""
    io.mkdir(root.parent.parent)
    io.mkdir(root.parent)
    io.mkdir(root)
    io.mkdir(root / "tensorboard")
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
    for step in (1, 2):
        trainer.save(step)
    [slot] = root.glob("slot-*.partial")
    io.unlink(slot / "optimizer.safetensors")
    io.unlink(slot / "model.safetensors")
    io.mkdir(slot / "model.safetensors")
    for step in (3, 4):
        trainer.save(step)
    io.unlink(root / "lock")
    trainer.save(5)
    trainer.close()
    with locked_for_reading(root / "lock"):
        trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
        trainer.save(6)
        trainer.close()


def linked(root: Path, acks: Path, writer: str) -> None:
    """Links in the place of files of waiting slots, of what is about to be made, of a slot, of ``store.json`` and of
    ``named``: nothing is written through one."""
    outside, precious = root.parents[3] / "outside", b"precious" * 1000
    outside.mkdir()
    (outside / "model.safetensors").write_bytes(precious)
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
    for step in (1, 2):
        trainer.save(step)
    for step, names_in_slot in enumerate((["model.safetensors"], ["state.safetensors", "commit.json"], ["commit.json.tmp"]), 3):
        [slot] = root.glob("slot-*.partial")
        for name in names_in_slot:
            link(slot / name, acks, outside / "model.safetensors")
        trainer.save(step)
    [slot] = root.glob("slot-*.partial")
    link(slot, acks, outside)
    trainer.save(6)
    link(root / "named", acks, outside)
    trainer.save(6, name="kept")
    trainer.close()
    link(root / "store.json", acks, outside / "model.safetensors")
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
    trainer.save(7)
    trainer.close()
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"model.safetensors": precious}


def read_back(root: Path, acks: Path, writer: str) -> None:
    """Each checkpoint is read back when it was committed; the third one and a named one have rotted by then."""
    mark, real = root.parents[2] / "rot", ReadBack.read
    if writer == "monitor":  # it reads in its own process
        mark = Path(launch.PROGRAM[1] + ".rot")
    else:
        rot_when_marked(mark, acks)
    trainer = start(root, acks, keep=2, max_async=1, items=ITEMS, writer=writer, read_back="all")

    def save(step: int, name: str | None = None) -> None:
        trainer.save(step, name)
        if writer == "thread":
            trainer.store.read_back(lambda: False)
        until(lambda: not mark.exists())

    try:
        save(1)
        save(2)
        mark.write_text("step-000000003")
        save(3)
        save(4)
        mark.write_text("named/rotten")
        save(4, "rotten")
        save(4, "good")
        save(5)
        save(6)
    finally:
        ReadBack.read = real
        trainer.close()
    assert len(list(root.glob("*.bad"))) == 1 and [path.name for path in root.glob("named/*.bad")] == ["rotten.bad"]


def retired(root: Path, acks: Path, writer: str) -> None:
    """Files of slots are removed, cut, replaced, and rot while they wait; a slot is removed, and one made anew."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
    for step in (1, 2):
        trainer.save(step)
    for step, way in enumerate((remove, cut, swap, rot, None), 3):
        [slot] = root.glob("slot-*.partial")
        for path in sorted(slot.iterdir()) if way else ():
            way(path)
        if way is None:
            remove(slot)
        trainer.save(step)
    trainer.close()


def journalled(root: Path, acks: Path, writer: str) -> None:
    """Two records of a journal behind each checkpoint, of which keep=1 stays; a rollback cuts the last one off."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer, journal=3)
    for step in range(1, 7):
        number = (step - 1) % 3
        if number == 0:
            base = after = read_record(str(trainer.save(step))).generation
            continue
        link = Journal(base, after, number, None, [], {}, {}, "", 1)
        path = trainer.finish(step, *trainer.begin(step, journal=True), journal=link)
        after = read_record(str(path)).generation
    trainer.store.mark_loaded(after - 1)
    trainer.save(6)
    trainer.close()


def interrupted(trainer: Trainer, step: int, name: str) -> None:
    """Ctrl-C between the rename and the sync of a commit; a monitor has no Ctrl-C, there the sync's ``open`` fails."""
    if isinstance(trainer, MonitoredTrainer):
        marker = Path(launch.PROGRAM[1] + ".interrupt")
        marker.touch()
        with pytest.raises(fxckpt.SaveFailed, match="Too many open files"):
            trainer.save(step, name)
        assert not marker.exists()
        return
    slot, checkpoint = trainer.begin(step, name)
    real, named_directory = io.fsync_dir, os.path.dirname(slot.path)

    def fsync_dir(path, *below):
        if path == named_directory:
            io.fsync_dir = real
            raise KeyboardInterrupt
        real(path, *below)

    io.fsync_dir = fsync_dir
    with pytest.raises(KeyboardInterrupt):
        trainer.finish(step, slot, checkpoint)
    assert not os.path.lexists(slot.path) and io.fsync_dir is real


def restarts(root: Path, acks: Path, writer: str) -> None:
    """Rotation, a named save, two in flight, one given up; then a second run; then a third of a smaller model, with
    store.json lost, that rolls back and comes past the same step again."""
    trainer = start(root, acks, keep=2, items=ITEMS, writer=writer)
    for step in range(1, 6):
        trainer.save(step)
    trainer.save(5, name="best")
    six, seven = trainer.begin(6), trainer.begin(7)
    trainer.finish(6, *six)
    trainer.finish(7, *seven)
    give_up(trainer, 8)
    trainer.save(9)
    trainer.close()
    trainer = start(root, acks, keep=2, items=ITEMS, writer=writer)
    trainer.save(10)
    trainer.close()
    io.unlink(root / "store.json")
    trainer = start(root, acks, keep=2, load=False, items=300, writer=writer)
    trainer.store.mark_loaded(max(each.record.generation for each in candidates(root)) - 1)  # one behind the newest
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


def trainer_killed(root: Path, acks: Path, writer: str) -> None:
    """A trainer that is killed with two checkpoints handed over, of which not a byte is on the disk. Its monitor finishes
    both: once that has ended, the later one is promised. Then a next run."""
    script, log = SUPPORT / "dying_trainer.py", Path(launch.PROGRAM[1])
    with Path(f"{log}.stderr").open("w") as errors:  # no pipe: the stopped monitor would hold it open
        done = subprocess.run(
            [sys.executable, script, root, acks, log, str(ITEMS)],
            env={**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
            timeout=60,
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert done.stdout, Path(errors.name).read_text()
    monitor = int(done.stdout)
    os.kill(monitor, signal.SIGCONT)
    assert done.returncode == -signal.SIGKILL, Path(errors.name).read_text()
    until(lambda: not os.path.exists(f"/proc/{monitor}"), why=lambda: "the monitor outlives its work")
    newest = latest(root)
    assert newest.step == 3
    io.mkdir(acks / f"{newest.generation}")
    trainer = start(root, acks, keep=1, items=ITEMS, writer=writer)
    trainer.save(4)
    trainer.close()


def monitor_replaced(root: Path, acks: Path, writer: str) -> None:
    """A monitor that is killed with a slot given out, and replaced at the next checkpoint."""
    trainer = start(root, acks, keep=1, items=ITEMS, writer=writer)
    trainer.save(1)
    trainer.store.acquire()
    first = trainer.store.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: trainer.store._link.lost is not None)
    trainer.save(2)
    trainer.save(3)
    assert trainer.store.pid != first
    trainer.close()


SCENARIOS = {
    "once": (once, 1),
    "one_slot": (one_slot, 1),
    "rotation": (rotation, 3),
    "named": (named, 1),
    "named_again": (named_again, 2),
    "touched": (touched, 1),
    "linked": (linked, 1),
    "read_back": (read_back, 2),
    "retired": (retired, 1),
    "frozen_run": (frozen_run, 1),
    "restarts": (restarts, 2),
    "journalled": (journalled, 1),
    "real_run": (real_run, 2),
}


def together(root: Path, acks: Path, writer: str) -> None:
    """Two ranks write each checkpoint together, keep=1: each commit gives up the only other one, and the files of the rank that
    does not commit go back and forth. Then a second life."""
    messages = dist.HashStore()
    for life, steps in enumerate(((1, 2, 3, 4), (5, 6))):
        trainer = JointTrainer(root, acks, messages, life, ITEMS, keep=1, max_async=1)
        for step in steps:
            trainer.save(step)
        trainer.save(steps[-1], name=f"life{life}")
        trainer.close()


def journalled_together(root: Path, acks: Path, writer: str) -> None:
    """The same with a journal: two records behind each checkpoint. A second life goes on behind the first record of the last row,
    so that the second one is cut off."""
    messages, step, base, after = dist.HashStore(), 0, 0, 0
    for life in range(2):
        trainer = JointTrainer(root, acks, messages, life, ITEMS, keep=1, max_async=1, journal=3)
        if life:
            for rank in trainer.ranks:
                rank.store.mark_loaded(after - 1)
        for number in (0, 1, 2) * (2 - life):
            step += 1
            link = Journal(base, after, number, None, [], {}, {}, "", 1) if number else None
            after = read_record(str(trainer.save(step, journal=link))).generation
            base = base if number else after
        trainer.close()


TOGETHER = {"together": (together, 1), "journalled_together": (journalled_together, 1)}
MONITORED = {"trainer_killed": (trainer_killed, 1), "monitor_replaced": (monitor_replaced, 1)}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Each scenario, recorded when it is first asked for."""
    made: dict[tuple[str, str], Recording] = {}
    with fast_directory(tmp_path_factory.mktemp("power")) as directory:

        def record(name: str, writer: str) -> Recording:
            if (name, writer) not in made:
                own = directory / f"{name}-{writer}"
                own.mkdir()
                made[name, writer] = Recording(own, *{**SCENARIOS, **TOGETHER, **MONITORED}[name], writer)
            return made[name, writer]

        yield record


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("writer", "scenario"),
    [("thread", name) for name in (*SCENARIOS, *TOGETHER)] + [("monitor", name) for name in (*SCENARIOS, *MONITORED)],
)
def test_power_cut_between_any_two_calls_leaves_a_good_checkpoint(writer, scenario, recordings, counted):
    recording = recordings(scenario, writer)
    # Much the same calls as those of the thread; and files of megabytes, which take their time.
    rule = QUICK if RULE is SHORT and (writer == "monitor" or scenario == "frozen_run") else RULE
    broken, states = recording.explore(recording.log, rule)
    counted(f"crash states of {scenario} by {writer} ({len(recording.log)} calls)", states)
    assert broken is None
    assert states > 3 * len(recording.log)


def test_all_bytes_of_what_a_killed_trainer_had_handed_over_are_written_after_its_death(recordings):
    """Else the scenario shows nothing."""
    log = recordings("trainer_killed", "monitor").log
    dead = next(i for i, call in enumerate(log) if call.path.endswith("/acks/dead"))
    published_then = [os.path.basename(call.target) for call in log[dead:] if published(call, "")]
    assert published_then == [names.step_name(step) for step in (2, 3, 4)]
    assert [call.path for call in log[:dead] if writes(call, "") and "/slot-0" not in call.path and call.op == "pwrite"] == []


@pytest.mark.parametrize("writer", WRITERS)
def test_after_a_power_cut_the_next_run_loads_and_checkpoints(writer, recordings):
    """On real files: a state loads, the store opens, a next checkpoint commits. One state of each set of names."""
    recording, every = recordings("restarts", writer), 1 if WHOLE else 3 if writer == "thread" else 40
    shapes, judge = set(), recording.judge()

    def visit(state, told):
        store, acknowledged = judge.store(state), told.promised()
        shape = (*sorted(store), *sorted(store.get("named", {})), bool(acknowledged))
        if shape in shapes:
            return
        shapes.add(shape)
        if len(shapes) % every:
            return
        disk = recording.tmp / f"shape-{len(shapes)}"
        write_out(state, disk)
        newest = latest(disk / STORE)
        if acknowledged:
            assert newest.generation >= max(generation for generation, _ in acknowledged)
        trainer = start(disk / STORE, keep=2, items=300, writer=writer)
        trainer.save(99)
        trainer.close()
        assert latest(disk / STORE).step == 99
        assert latest(disk / STORE).generation > (newest.generation if newest else 0)

    assert explore(recording.log, str(recording.base), judge, QUICK, visit=visit) is None
    assert len(shapes) > 20


# ---- the edges of docs/format.md, each taken away ----


def syncs(call: instruments.Call, *ends: str) -> bool:
    """Whether it makes something durable whose path ends like one of these."""
    return call.op in ("fsync", "fdatasync") and call.path.endswith(ends)


def published(call: instruments.Call, last: str) -> bool:
    """A directory gets its final name."""
    return call.op == "rename" and (re.search(r"/step-[^/]*$", call.target) or "/named/" in call.target) \
        and not call.target.endswith((".partial", ".json"))  # fmt: skip


def recorded(call: instruments.Call, last: str) -> bool:
    """The same of a record of a journal."""
    return call.op == "rename" and re.search(r"/journal-[0-9]*$", call.target) is not None


def acknowledges(call: instruments.Call, last: str) -> bool:
    """The caller is told."""
    return "/acks/" in call.path


def writes(call: instruments.Call, last: str) -> bool:
    """Bytes of a data file change."""
    return call.op in ("pwrite", "ftruncate") and call.path.endswith(".safetensors")


def frees(call: instruments.Call, last: str) -> bool:
    """A checkpoint's name goes."""
    return call.op == "rename" and "/step-" in call.path and call.target.endswith(".partial")


EDGES: dict[str, list[tuple[str, Edge]]] = {
    "A": [("once", Edge(lambda call, last, name=name: syncs(call, name), acknowledges))
          for name in ("/disk", "/runs", "/first")],
    "R": [("one_slot", Edge(lambda call, last: syncs(call, "/checkpoints") and "rename slot" in last, writes))],
    "D": [("once", Edge(lambda call, last, name=name: syncs(call, name), published))
          for name in ("model.safetensors", "optimizer.safetensors", "state.safetensors")],
    "C": [("one_slot", Edge(lambda call, last: syncs(call, "commit.json.tmp"), published))],
    "S": [("one_slot", Edge(lambda call, last: syncs(call, ".partial"), published))],
    "P": [("one_slot", Edge(lambda call, last: syncs(call, "/checkpoints") and "rename step" in last, before))
          for before in (acknowledges, frees)]
         + [("named", Edge(lambda call, last: syncs(call, "/named") and last in ("rename first", "rename second"),
                           acknowledges)),
            ("named_again", Edge(lambda call, last: syncs(call, "/named") and last == "exchange second", acknowledges))],
    "N": [("named", Edge(lambda call, last: syncs(call, "/checkpoints") and last == "mkdir named", acknowledges))],
    "X": [("named", Edge(lambda call, last: syncs(call, "/named") and last == "rename second.partial",
                         lambda call, last: call.op == "unlink")),
          ("named_again", Edge(lambda call, last: syncs(call, "/named") and last == "exchange second",
                               lambda call, last: call.op == "unlink"))],
}  # fmt: skip
"""By the letter in docs/format.md: where it is seen, the sync, and what it must come before. O is about killed runs."""

JOINT_EDGES: dict[str, list[tuple[str, Edge]]] = {
    "W": [("together", Edge(lambda call, last: syncs(call, "part-00002-of-00002.json.tmp"), published))],
    "D": [("together", Edge(lambda call, last, kind=kind: syncs(call, f"{kind}-00002-of-00002.safetensors"), published))
          for kind in ("model", "optimizer", "state")]
         + [("journalled_together", Edge(lambda call, last: syncs(call, "gradients-00002-of-00002.safetensors"), recorded))],
    "S": [("together", Edge(lambda call, last: syncs(call, ".partial"), published))],
    "R": [("journalled_together", Edge(lambda call, last: syncs(call, "/checkpoints") and last.startswith("rename journal-"),
                                       writes))],
    "C": [("together", Edge(lambda call, last: syncs(call, names.INDEX + ".tmp"), published))],
}  # fmt: skip
"""The same of the part of a rank that does not commit; only a thread writes those."""

MUTANTS = [(letter, number, way) for letter, edges in EDGES.items() for number in range(len(edges)) for way in (without, late)]
JOINT_MUTANTS = [
    (letter, number, way) for letter, edges in JOINT_EDGES.items() for number in range(len(edges)) for way in (without, late)
]


@pytest.mark.parametrize(
    ("letter", "number", "way"), JOINT_MUTANTS, ids=[f"{letter}{number}-{way.__name__}" for letter, number, way in JOINT_MUTANTS]
)
def test_without_an_edge_of_another_rank_a_checkpoint_of_all_is_lost(letter, number, way, recordings, counted):
    scenario, edge = JOINT_EDGES[letter][number]
    check_needed(letter, edge, way, recordings(scenario, "thread"), counted)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("letter", "number", "way"), MUTANTS, ids=[f"{letter}{number}-{way.__name__}" for letter, number, way in MUTANTS]
)
def test_without_an_edge_or_with_it_too_late_a_checkpoint_is_lost(letter, number, way, writer, recordings, counted):
    scenario, edge = EDGES[letter][number]
    check_needed(letter, edge, way, recordings(scenario, writer), counted)


def check_needed(letter: str, edge: Edge, way: Callable, recording: Recording, counted: Callable) -> None:
    """Without it something breaks."""
    log = way(recording.log, edge)
    assert log != recording.log, "the edge is not in the log"
    broken, states = recording.explore(log)
    what = "all caught" if broken else "which nothing catches"
    counted(f"mutants of ordering edges by {recording.writer}, {what}", 1)
    assert broken is not None, f"edge {letter} is not needed: nothing breaks without it ({states} states)"


def test_the_document_lists_the_edges_that_are_tested():
    text = (ROOT / "docs" / "format.md").read_text()
    listed = re.findall(r"^\| ([A-Z]) \|", text, re.MULTILINE)
    assert sorted(listed) == sorted({*EDGES, *JOINT_EDGES, "O"})


# ---- a kill, another run, and then a power cut ----


def next_run(root: Path, acks: Path, writer: str) -> None:
    """It loads and takes two checkpoints."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS, writer=writer)
    trainer.save(20)
    trainer.save(21)
    trainer.close()


def run_after(recording: Recording, first: list[instruments.Call]) -> list[instruments.Call]:
    """What the next run does, if the first one was killed behind these calls."""
    disk = Disk(str(recording.base))
    for call in first:
        disk.replay(call)
    for directory in (recording.base, recording.acks):
        shutil.rmtree(directory)
    write_out(disk.now(), recording.base)
    recording.acks.mkdir()
    return recording.record(next_run)


def kills(log: list[instruments.Call], writer: str) -> list[int]:
    """Behind how many calls the first run is killed: each, or in the short version each change of a name and some; with a
    monitor, whose start takes time, a few."""
    if WHOLE:
        return list(range(len(log) + 1))
    if writer == "monitor":
        return list(range(random.Random(1).randrange(60), len(log), 60))
    at = [i + 1 for i, call in enumerate(log) if call.op in ("rename", "unlink") and "/step-" not in call.path]
    return sorted({*at[::2], *range(random.Random(1).randrange(12), len(log), 12)})


def second_recording(directory: Path, recorded: Recording) -> tuple[Recording, list[instruments.Call]]:
    """A disk to record a next run on, with nothing on it, and the log of the first run as if it had been made there."""
    recording = Recording(directory, None, 1, recorded.writer)
    return recording, [replace_base(call, recorded, recording) for call in recorded.log]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("scenario", ["once", "one_slot", "named"])
def test_kill_at_any_call_then_a_run_then_a_power_cut(scenario, writer, recordings, tmp_path, counted):
    with fast_directory(tmp_path) as directory:
        recording, log = second_recording(directory, recordings(scenario, writer))
        for killed in kills(log, writer):
            first = log[:killed]
            second = run_after(recording, first)
            broken, states = recording.explore([*first, *second], SHORT if WHOLE else QUICK, skip=killed)
            assert broken is None, f"killed behind {killed} calls, the last: {log[killed - 1]}"
            counted(f"kills followed by a run and its power cuts, {writer}", 1)
            counted(f"crash states after a kill and a run, {writer}", states)


def replace_base(call: instruments.Call, old: Recording, new: Recording) -> instruments.Call:
    """The same call on another recording's disk."""
    call = moved(moved(call, str(old.base), str(new.base)), str(old.acks), str(new.acks))
    target = call.target.replace(str(old.base), str(new.base), 1)
    return call.__class__(**{**vars(call), "target": target})


def killed_behind(log: list[instruments.Call], which: Callable[[instruments.Call], bool]) -> list[instruments.Call]:
    """The log up to the last such call."""
    return log[: max(i for i, call in enumerate(log) if which(call)) + 1]


def no_sync_at_open(log: list[instruments.Call]) -> list[instruments.Call]:
    """The second run without edge O: its syncs of the root and of named/ before it makes or changes anything."""
    at = next(i for i, call in enumerate(log) if call.op in ("mkdir", "rename", "pwrite"))
    return [call for i, call in enumerate(log) if i >= at or not syncs(call, "/checkpoints", "/named")]


@pytest.mark.parametrize(
    ("scenario", "last"),
    [
        ("one_slot", lambda call: call.op == "rename" and call.target.endswith(".partial")),  # given up, and not synced
        ("once", lambda call: call.op == "rename" and "/step-" in call.target),  # committed and not synced, then loaded
        ("named", lambda call: call.op == "rename" and call.target.endswith("second.partial")),  # to be removed
    ],
    ids=["recycled", "loaded", "removed"],
)
@pytest.mark.parametrize("writer", WRITERS)
def test_without_edge_O_a_kill_and_a_power_cut_lose_a_checkpoint(scenario, last, writer, recordings, tmp_path, counted):
    with fast_directory(tmp_path) as directory:
        recording, log = second_recording(directory, recordings(scenario, writer))
        first = killed_behind(log, last)
        second = run_after(recording, first)
        assert recording.explore([*first, *second], QUICK, skip=len(first))[0] is None
        assert recording.explore([*first, *no_sync_at_open(second)], QUICK, skip=len(first))[0] is not None
        counted(f"mutants of ordering edges by {writer}, all caught", 1)


def test_every_file_operation_of_a_run_goes_through_the_table(fork_server, tmp_path):
    """What Python does to the store behind the table's back would be in no log: an audit hook sees it."""
    script = tmp_path / "audited.py"
    script.write_text("""
from script_prelude import *
import os, sys
root, seen = os.path.abspath("d"), []
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod", "os.utime")

def hook(event, arguments):
    path = arguments[0] if arguments and isinstance(arguments[0], (str, bytes, os.PathLike)) else None
    if path is None or not os.path.abspath(os.fsdecode(path)).startswith(root):
        return
    if event in CHANGES or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append((event, arguments))

sys.addaudithook(hook)
open(root + "-probe", "w").close()
assert len(seen) == 1, seen
seen.clear()
from real_run import real_run
from pathlib import Path
os.mkdir("acks")
real_run(Path(root), Path("acks"), "thread")
assert not seen, seen
print("CLEAN")
""")
    assert "CLEAN" in fork_server.start(script, tmp_path / "run").wait()
