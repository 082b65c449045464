"""Watch a trainer by what it writes: how far it is, how far its checkpoints are behind, what they cost, what the disk has left.

Reads the newest record and asks who has the lock; the trainer is asked nothing, and does nothing for it. What a record cannot
know (the step that is trained now) is reckoned from the steps before, and marked with "about". With a journal a step is durable
by the full checkpoint that its record builds on and all records between, which are looked for by their names.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from fxckpt.cli import common
from fxckpt.errors import Corrupt, NoCheckpoint, NotAStore, SetupError
from fxckpt.store import about, lock, names
from fxckpt.store.files import space
from fxckpt.store.identity import check_begun
from fxckpt.store.reader import read_record
from fxckpt.store.record import Record

HELP = "a live table of a training run"

AUTO = 60.0  # seconds between checkpoints of every="auto", at least
WINDOW = 10  # checkpoints that a share of stall is taken over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="the store")
    parser.add_argument("--once", action="store_true", help="look once and end (with --json always)")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default: 1)")


def run(args: argparse.Namespace) -> int:
    if not os.path.isdir(args.dir):
        raise NotAStore(f"{args.dir} is not a directory")
    if not args.interval > 0:
        raise SetupError(f"--interval {args.interval}: seconds above 0")
    check_begun(os.path.abspath(args.dir))
    if args.json:
        common.print_json(asdict(look(args.dir)))
        return common.OK
    height, live = 0, sys.stdout.isatty()
    try:
        while True:
            lines = table(look(args.dir))
            if live and height:
                print(f"\x1b[{height}F\x1b[J", end="")  # over the last one
            common.say("\n".join(lines))
            sys.stdout.flush()
            height = len(lines)
            if args.once:
                return common.OK
            time.sleep(args.interval)
    except KeyboardInterrupt:  # the way to end it
        return common.OK


@dataclass(frozen=True)
class View:
    """What can be told of a run at one moment. Times in seconds, sizes in bytes; None where it is not known (yet). ``nbytes``,
    ``write_seconds`` and ``bytes_per_second`` are of full checkpoints, with ``record_`` in front of records of the journal;
    ``full_step`` is that of the last full one, ``next_full_step`` of the next if there is a journal."""

    directory: str
    writer: int | str | None  # process id of the trainer or its monitor, or "unknown": of another machine
    free_bytes: int
    path: str | None = None
    step: int | None = None
    every: int | str | None = None
    behind_seconds: float | None = None
    behind_steps: float | None = None
    step_seconds: float | None = None
    nbytes: int | None = None
    write_seconds: float | None = None
    bytes_per_second: float | None = None
    stall_share: float | None = None
    next_step: int | None = None
    next_seconds: float | None = None
    writing: bool = False
    fits: int | None = None
    metrics: dict[str, float] | None = None
    began: dict[str, Any] | None = None
    full_step: int | None = None
    next_full_step: int | None = None
    journal: int | None = None
    record_nbytes: int | None = None
    record_write_seconds: float | None = None
    record_bytes_per_second: float | None = None


@dataclass(frozen=True)
class Newest:
    """The step that was committed last: its directory, its record and when that was; and the record of the full checkpoint that
    it builds on, or is."""

    path: str
    record: Record
    committed: float
    full: Record


def look(directory: str) -> View:
    """What there is to see now."""
    root = os.path.abspath(directory)
    writer, (free, _) = lock.holder(root), space(root)
    newest = _newest(root)
    if newest is None:
        return View(root, writer, free)
    record, full = newest.record, newest.full
    every, _pid, journal = about.watched(record)
    own, *past = reversed(about.history(record))
    past = _of_this_process(past)
    last_full, last_record = (next((each for each in past if each.journal is of), None) for of in (False, True))
    step_seconds = _step_seconds(own, past)
    behind = max(time.time() - record.time, 0.0) if writer is not None else None
    steps = behind / step_seconds if behind is not None and step_seconds else None
    due = (record.step // every + 1) * every if isinstance(every, int) and every > 0 else None
    wait = max(AUTO - (behind or 0.0), 0.0) if every == "auto" else None
    if due is not None and step_seconds:
        wait = max((due - record.step) * step_seconds - (behind or 0.0), 0.0)
    return View(
        root, writer, free, newest.path, record.step, every, behind, steps, step_seconds, full.nbytes, *_speed(last_full),
        _stall_share(past), due if writer else None, wait if writer else None,
        writer is not None and _is_writing(root, newest.committed), free // max(full.nbytes, 1), dict(record.metrics),
        about.origin(record), full.step, full.step + journal if journal and writer else None, journal,
        record.nbytes if record is not full else None if last_record is None else last_record.nbytes, *_speed(last_record),
    )  # fmt: skip


def _speed(last: about.Passed | None) -> tuple[float | None, float | None]:
    """The seconds that it took from its step to the disk, and its bytes in each of them."""
    if last is None or last.committed is None or last.begun is None:
        return None, None
    seconds = last.committed - last.begun
    return seconds, last.nbytes / seconds if seconds else None


def _newest(root: str) -> Newest | None:
    """What was committed last, of which all that it builds on is there; None if there is nothing."""
    for _ in range(common.LOOKS):
        found = {}
        for path in (*names.recorded(root), *names.committed(root)):
            try:
                found[path] = os.stat(os.path.join(path, names.COMMIT)).st_mtime
            except OSError:
                continue
        for path, committed in sorted(found.items(), key=lambda each: each[1], reverse=True):
            try:
                record = read_record(path)
                full = record if record.journal is None else _built_on(record, found)
            except Corrupt:
                continue
            except NoCheckpoint:  # taken back meanwhile: there is a newer one
                break
            if full is not None:
                return Newest(path, record, committed, full)
        else:
            return None
    return None


def _built_on(record: Record, paths: Collection[str]) -> Record | None:
    """The checkpoint that a record of the journal builds on; None if that is not there, or not all records between are."""
    assert record.journal is not None
    steps = {path: names.step_of(os.path.basename(path), None) for path in paths}
    for path in (each for each in paths if names.step_of(os.path.basename(each)) is not None):
        try:
            full = read_record(path)
        except (Corrupt, NoCheckpoint):
            continue
        if full.generation == record.journal.base:
            records = [step for each, step in steps.items() if names.step_of(os.path.basename(each), names.RECORDS) is not None]
            between = sum(full.step < step <= record.step for step in records if step is not None)
            return full if between >= record.journal.number else None
    return None


def _of_this_process(past: list[about.Passed]) -> list[about.Passed]:
    """Newest first, as far as the process goes back that wrote the newest."""
    end = next((at for at, each in enumerate(past) if each.committed is None), len(past))
    return past[:end]


def _step_seconds(own: about.Passed, past: list[about.Passed]) -> float | None:
    """Of a training step, over the last few checkpoints."""
    first = past[min(len(past), WINDOW) - 1] if past else None
    if first is None or own.step <= first.step or own.time <= first.time:
        return None
    return (own.time - first.time) / (own.step - first.step)


def _stall_share(past: list[about.Passed]) -> float | None:
    """Of the time between the last few commits."""
    if len(past) < 2:
        return None
    last, first = past[0], past[min(len(past), WINDOW) - 1]
    seconds = (last.committed or 0.0) - (first.committed or 0.0)
    return max(last.stall - first.stall, 0.0) / seconds if seconds > 0 else None


def _is_writing(root: str, committed: float) -> bool:
    """Has a slot changed since?"""
    for name in names.subdirectories(root):
        if not name.endswith(names.PARTIAL):
            continue
        try:
            with os.scandir(os.path.join(root, name)) as files:
                if any(each.stat(follow_symlinks=False).st_mtime > committed for each in files):
                    return True
        except OSError:
            continue  # committed, or removed
    return False


def table(view: View) -> list[str]:
    """The lines to print."""
    human, duration = common.human, common.duration
    who = "nobody writes" if view.writer is None else f"process {view.writer} writes"
    rows = [("STORE", view.directory), ("WRITER", who if view.every is None else f"{who}, every={view.every!r}")]
    if view.step is None:
        return _aligned([*rows, ("STEP", "no checkpoint yet"), ("DISK", f"{human(view.free_bytes)} left")])
    rows.append(("STEP", f"{view.step:,} is durable{_by_journal(view)}"))
    if view.behind_seconds is not None:
        steps = "" if view.behind_steps is None else f"about {view.behind_steps:,.0f} steps, "
        rows.append(("BEHIND", f"{steps}{duration(view.behind_seconds)}"))
    if view.step_seconds is not None:
        rows.append(("STEP TIME", duration(view.step_seconds)))
    rows.append(("CHECKPOINT", _written(view.nbytes or 0, view.write_seconds, view.bytes_per_second)))
    if view.record_nbytes is not None:
        written = _written(view.record_nbytes, view.record_write_seconds, view.record_bytes_per_second)
        rows.append(("JOURNAL", written if view.journal is None else f"{written}; a checkpoint every {view.journal:,} steps"))
    if view.stall_share is not None:
        rows.append(("STALL", f"{view.stall_share:.2%} of the time"))
    if view.writer is not None:
        rows.append(("NEXT", _next(view)))
    rows.append(("DISK", f"{human(view.free_bytes)} left, {view.fits:,} checkpoints"))
    if view.metrics:
        rows.append(("METRICS", ", ".join(f"{name}={value:.6g}" for name, value in view.metrics.items())))
    if view.began is not None:
        rows.append(("BEGAN", common.began(view.began)))
    return _aligned(rows)


def _by_journal(view: View) -> str:
    """How many steps of the journal lie between the last full checkpoint and this step."""
    if view.full_step is None or view.step is None or view.full_step == view.step:
        return ""
    many = view.step - view.full_step
    return f", {many:,} {'step' if many == 1 else 'steps'} of the journal behind the checkpoint of step {view.full_step:,}"


def _written(nbytes: int, seconds: float | None, speed: float | None) -> str:
    """A size, and how fast it came to the disk."""
    if seconds is None or speed is None:
        return common.human(nbytes)
    return f"{common.human(nbytes)}, {common.human(speed)}/s, {common.duration(seconds)} from step to disk"


def _next(view: View) -> str:
    """When the next step is to be durable, and the next full checkpoint is due."""
    parts = [] if view.next_step is None else [f"step {view.next_step:,}"]
    if view.next_seconds:
        parts.append(f"in about {common.duration(view.next_seconds)}")
    if view.writing:
        parts.append("one is being written")
    if view.next_full_step is not None and view.next_full_step != view.next_step:
        parts.append(f"the next full checkpoint at {view.next_full_step:,}")
    return ", ".join(parts) or "when it is due"


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows]
