"""Promise 4: a committed checkpoint survives a power cut at any point between two system calls.

Real runs are recorded at the engine's I/O table and cut after each call, in every way that loses unsynced data. Then each
ordering edge of docs/format.md is taken away: its sync is never made, and it is made too late. Each must be missed, else
the test is blind or the edge is not needed. And a killed life leaves unsynced names behind: the next life is recorded on
top of the log of the first one, cut short at any call.

``FXCKPT_CRASH=full`` (``make crash``) tries far more states, and a kill at every call.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crash import FULL, QUICK, SHORT, Disk, Edge, Judge, acknowledged_by, explore, late, moved, without, write_out
from helpers import Training
from storing import Trainer, fast_directory, start

import fxckpt
from fxckpt.engine import io
from fxckpt.store.reader import latest

WHOLE = os.environ.get("FXCKPT_CRASH") == "full"
RULE = FULL if WHOLE else SHORT
STORE = "runs/first/checkpoints"
ITEMS = 700  # floats a tensor: each file has two chunks


class Recording:
    """The calls of a scenario, on a disk of its own."""

    def __init__(self, tmp: Path, scenario: Callable[[Path, Path], None], keep: int):
        self.base, self.keep, self.tmp, self.judges = tmp / "disk", keep, tmp, 0
        self.acks = tmp / "acks"
        self.base.mkdir()
        self.acks.mkdir()
        self.log = self.record(scenario)

    def record(self, scenario: Callable[[Path, Path], None]) -> list[io.Call]:
        """What one life, or several, do on the disk as it is."""
        io.record(self.tmp / "log")
        try:
            scenario(self.base / STORE, self.acks)
        finally:
            io.stop_recording()
        return io.read_log(self.tmp / "log")

    def judge(self) -> Judge:
        """A judge with nothing remembered, and its own scratch directory."""
        self.judges += 1
        return Judge(STORE, self.tmp / f"judge-{self.judges}", self.keep)

    def explore(self, log: list[io.Call], rule=RULE, **options):
        """The first broken promise, and how many states were looked at."""
        judge = self.judge()
        found = explore(log, str(self.base), judge, rule, **options)
        return found, judge.states


# ---- scenarios ----


def once(root: Path, acks: Path) -> None:
    """The store is made, with the directories above it, and one checkpoint."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS)
    trainer.save(1)
    trainer.close()


def one_slot(root: Path, acks: Path) -> None:
    """keep=1: each commit gives up the only other checkpoint, whose slot is then recycled."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS)
    for step in range(1, 5):
        trainer.save(step)
    trainer.close()


def rotation(root: Path, acks: Path) -> None:
    """keep=3 with two in flight at a time."""
    trainer = start(root, acks, keep=3, items=ITEMS)
    for step in range(1, 8, 2):
        first, second = trainer.begin(step), trainer.begin(step + 1)
        trainer.finish(step, *first)
        trainer.finish(step + 1, *second)
    trainer.close()


def named(root: Path, acks: Path) -> None:
    """Named saves among others; one that is interrupted just behind the rename to its final name."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS)
    trainer.save(1)
    trainer.save(1, name="first")
    interrupted(trainer, 2, "second")
    trainer.save(2)
    trainer.save(3, name="second")
    trainer.close()


def interrupted(trainer: Trainer, step: int, name: str) -> None:
    """Ctrl-C between the rename and the sync of a commit."""
    slot, checkpoint = trainer.begin(step, name)
    real, named_directory = io.fsync_dir, os.path.dirname(slot.path)

    def fsync_dir(path):
        if path == named_directory:
            io.fsync_dir = real
            raise KeyboardInterrupt
        real(path)

    io.fsync_dir = fsync_dir
    with pytest.raises(KeyboardInterrupt):
        trainer.finish(step, slot, checkpoint)
    assert not os.path.lexists(slot.path) and io.fsync_dir is real


def lives(root: Path, acks: Path) -> None:
    """Rotation, a named save, two in flight, one given up; then a second life; then a third of a smaller model, with
    store.json lost, that rolls back and comes past the same step again."""
    trainer = start(root, acks, keep=2, items=ITEMS)
    for step in range(1, 6):
        trainer.save(step)
    trainer.save(5, name="best")
    six, seven = trainer.begin(6), trainer.begin(7)
    trainer.finish(6, *six)
    trainer.finish(7, *seven)
    give_up(trainer, 8)
    trainer.save(9)
    trainer.close()
    trainer = start(root, acks, keep=2, items=ITEMS)
    trainer.save(10)
    trainer.close()
    io.unlink(root / "store.json")
    trainer = start(root, acks, keep=2, load=False, items=300)
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


def real_run(root: Path, acks: Path) -> None:
    """``compile_step`` and ``load(step=…)``: training, a named save, a rollback past the same steps, a second life."""
    def commits(training: Training, steps: int) -> None:
        for _ in range(steps):
            training.train()
            training.opt.ckpt.flush()
            io.mkdir(acks / f"{latest(root).generation}")

    training = Training(root, keep=2)
    commits(training, 4)
    training.opt.ckpt.save("best")
    io.mkdir(acks / f"{latest(root).generation}-best")
    assert fxckpt.load(root, optimizer=training.opt, step=3).step == 3
    commits(training, 2)
    training.opt.ckpt.shutdown()
    training = Training(root, keep=2)
    assert fxckpt.load(root, optimizer=training.opt).step == 5
    commits(training, 2)
    training.opt.ckpt.shutdown()


SCENARIOS = {"once": (once, 1), "one_slot": (one_slot, 1), "rotation": (rotation, 3), "named": (named, 1),
             "lives": (lives, 2), "real_run": (real_run, 2)}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Each scenario, recorded when it is first asked for."""
    made: dict[str, Recording] = {}
    with fast_directory(tmp_path_factory.mktemp("power")) as directory:

        def record(name: str) -> Recording:
            if name not in made:
                (directory / name).mkdir()
                made[name] = Recording(directory / name, *SCENARIOS[name])
            return made[name]

        yield record


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_power_cut_between_any_two_calls_leaves_a_good_checkpoint(scenario, recordings, counted):
    recording = recordings(scenario)
    broken, states = recording.explore(recording.log)
    counted(f"crash states of {scenario} ({len(recording.log)} calls)", states)
    assert broken is None
    assert states > 5 * len(recording.log)


def test_after_a_power_cut_the_next_life_loads_and_checkpoints(recordings):
    """On real files: a state loads, the store opens, a next checkpoint commits. One state of each set of names."""
    recording = recordings("lives")
    shapes, judge = set(), recording.judge()

    def visit(state, acknowledged):
        store = judge.store(state)
        shape = (*sorted(store), *sorted(store.get("named", {})), bool(acknowledged))
        if shape in shapes:
            return
        shapes.add(shape)
        if len(shapes) % (1 if WHOLE else 3):
            return
        disk = recording.tmp / f"shape-{len(shapes)}"
        write_out(state, disk)
        newest = latest(disk / STORE)
        if acknowledged:
            assert newest.generation >= max(generation for generation, _ in acknowledged)
        trainer = start(disk / STORE, keep=2, items=300)
        trainer.save(99)
        trainer.close()
        assert latest(disk / STORE).step == 99
        assert latest(disk / STORE).generation > (newest.generation if newest else 0)

    assert explore(recording.log, str(recording.base), judge, QUICK, visit=visit) is None
    assert len(shapes) > 20


# ---- the edges of docs/format.md, each taken away ----


def syncs(call: io.Call, *ends: str) -> bool:
    """Whether it makes something durable whose path ends like one of these."""
    return call.op in ("fsync", "fdatasync") and call.path.endswith(ends)


def published(call: io.Call, last: str) -> bool:
    """A directory gets its final name."""
    return call.op == "rename" and (re.search(r"/step-[^/]*$", call.target) or "/named/" in call.target) \
        and not call.target.endswith((".partial", ".json"))  # fmt: skip


def acknowledges(call: io.Call, last: str) -> bool:
    """The caller is told."""
    return "/acks/" in call.path


def writes(call: io.Call, last: str) -> bool:
    """Bytes of a data file change."""
    return call.op in ("pwrite", "ftruncate") and call.path.endswith(".safetensors")


def frees(call: io.Call, last: str) -> bool:
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
                           acknowledges))],
    "N": [("named", Edge(lambda call, last: syncs(call, "/checkpoints") and last == "mkdir named", acknowledges))],
    "X": [("named", Edge(lambda call, last: syncs(call, "/named") and last == "rename second.partial",
                         lambda call, last: call.op == "unlink"))],
}  # fmt: skip
"""By the letter in docs/format.md: where it is seen, the sync, and what it must come before. O is about killed lives."""

MUTANTS = [(letter, number, way) for letter, edges in EDGES.items() for number in range(len(edges)) for way in (without, late)]


@pytest.mark.parametrize(("letter", "number", "way"), MUTANTS,
                         ids=[f"{letter}{number}-{way.__name__}" for letter, number, way in MUTANTS])
def test_without_an_edge_or_with_it_too_late_a_checkpoint_is_lost(letter, number, way, recordings, counted):
    scenario, edge = EDGES[letter][number]
    recording = recordings(scenario)
    log = way(recording.log, edge)
    assert log != recording.log, "the edge is not in the log"
    broken, states = recording.explore(log)
    counted("mutants of ordering edges, all caught" if broken else "mutants that nothing catches", 1)
    assert broken is not None, f"edge {letter} is not needed: nothing breaks without it ({states} states)"


def test_the_document_lists_the_edges_that_are_tested():
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    listed = re.findall(r"^\| ([A-Z]) \|", text, re.MULTILINE)
    assert sorted(listed) == sorted([*EDGES, "O"])


# ---- a kill, another life, and then a power cut ----


def next_life(root: Path, acks: Path) -> None:
    """It loads and takes two checkpoints."""
    trainer = start(root, acks, keep=1, max_async=1, items=ITEMS)
    trainer.save(20)
    trainer.save(21)
    trainer.close()


def cut_after_a_kill(recording: Recording, first: list[io.Call], mutate=lambda log: log, rule=QUICK):
    """What a power cut in or after the next life breaks, if the first one was killed behind these calls."""
    disk, acknowledged = Disk(str(recording.base)), []
    for call in first:
        disk.replay(call)
        acknowledged_by(call, acknowledged)
    for directory in (recording.base, recording.acks):
        shutil.rmtree(directory)
    write_out(disk.now(), recording.base)
    recording.acks.mkdir()
    second = mutate(recording.record(next_life))
    return recording.explore([*first, *second], rule, skip=len(first))


def kills(log: list[io.Call]) -> list[int]:
    """Behind how many calls the first life is killed: each, or in the short version each change of a name and some."""
    if WHOLE:
        return list(range(len(log) + 1))
    at = [i + 1 for i, call in enumerate(log) if call.op in ("rename", "unlink") and "/step-" not in call.path]
    return sorted({*at[::2], *range(random.Random(1).randrange(12), len(log), 12)})


@pytest.mark.parametrize("scenario", ["once", "one_slot", "named"])
def test_kill_at_any_call_then_a_life_then_a_power_cut(scenario, recordings, tmp_path, counted):
    log = recordings(scenario).log
    with fast_directory(tmp_path) as directory:
        recording = Recording(directory, lambda root, acks: None, 1)
        log = [replace_base(call, recordings(scenario), recording) for call in log]
        for killed in kills(log):
            broken, states = cut_after_a_kill(recording, log[:killed], rule=SHORT if WHOLE else QUICK)
            assert broken is None, f"killed behind {killed} calls, the last: {log[killed - 1]}"
            counted("kills followed by a life and its power cuts", 1)
            counted("crash states after a kill and a life", states)


def replace_base(call: io.Call, old: Recording, new: Recording) -> io.Call:
    """The same call on another recording's disk."""
    call = moved(moved(call, str(old.base), str(new.base)), str(old.acks), str(new.acks))
    target = call.target.replace(str(old.base), str(new.base), 1)
    return call.__class__(**{**vars(call), "target": target})


def killed_behind(log: list[io.Call], which: Callable[[io.Call], bool]) -> list[io.Call]:
    """The log up to the last such call."""
    return log[: max(i for i, call in enumerate(log) if which(call)) + 1]


def no_sync_at_open(log: list[io.Call]) -> list[io.Call]:
    """The second life without edge O: its syncs of the root and of named/ before it makes or changes anything."""
    at = next(i for i, call in enumerate(log) if call.op in ("mkdir", "rename", "pwrite"))
    return [call for i, call in enumerate(log) if i >= at or not syncs(call, "/checkpoints", "/named")]


@pytest.mark.parametrize(("scenario", "last"), [
    ("one_slot", lambda call: call.op == "rename" and call.target.endswith(".partial")),  # given up, and not synced
    ("once", lambda call: call.op == "rename" and "/step-" in call.target),  # committed and not synced, then loaded
    ("named", lambda call: call.op == "rename" and call.target.endswith("second.partial")),  # to be removed
], ids=["recycled", "loaded", "removed"])
def test_without_edge_O_a_kill_and_a_power_cut_lose_a_checkpoint(scenario, last, recordings, tmp_path, counted):
    with fast_directory(tmp_path) as directory:
        recording = Recording(directory, lambda root, acks: None, 1)
        log = [replace_base(call, recordings(scenario), recording) for call in recordings(scenario).log]
        first = killed_behind(log, last)
        assert cut_after_a_kill(recording, first)[0] is None
        assert cut_after_a_kill(recording, first, no_sync_at_open)[0] is not None
        counted("mutants of ordering edges, all caught", 1)


def test_every_file_operation_of_a_run_goes_through_the_table(nursery, tmp_path):
    """What Python does to the store behind the table's back would be in no log: an audit hook sees it."""
    script = tmp_path / "audited.py"
    script.write_text("""
from helpers import *
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
from test_power_cut import real_run
from pathlib import Path
os.mkdir("acks")
real_run(Path(root), Path("acks"))
assert not seen, seen
print("CLEAN")
""")
    assert "CLEAN" in nursery.start(script, tmp_path / "life").wait()
