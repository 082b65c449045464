"""Watch a trainer by what it writes: how far it is, how far its checkpoints are behind, what they cost, what the disk has left.

Reads the newest record and asks who has the lock; the trainer is asked nothing, and does nothing for it. What a record cannot
know (the step that is trained now) is reckoned from the steps before, and marked with "about".
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from fxckpt.cli import common
from fxckpt.errors import Corrupt, NoCheckpoint, NotAStore, SetupError
from fxckpt.store import about, lock, names
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
    """What can be told of a run at one moment. Times in seconds, sizes in bytes; None where it is not known (yet)."""

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


def look(directory: str) -> View:
    """What there is to see now."""
    root = os.path.abspath(directory)
    writer, (free, _) = lock.holder(root), common.space(root)
    newest = _newest(root)
    if newest is None:
        return View(root, writer, free)
    path, record, committed = newest
    every, _pid = about.watched(record)
    own, *past = reversed(about.history(record))
    past = _of_this_process(past)
    step_seconds = _step_seconds(own, past)
    behind = max(time.time() - record.time, 0.0) if writer is not None else None
    steps = behind / step_seconds if behind is not None and step_seconds else None
    last = past[0] if past else None
    write = last.committed - last.begun if last is not None and last.committed is not None and last.begun is not None else None
    due = (record.step // every + 1) * every if isinstance(every, int) and every > 0 else None
    wait = max(AUTO - (behind or 0.0), 0.0) if every == "auto" else None
    if due is not None and step_seconds:
        wait = max((due - record.step) * step_seconds - (behind or 0.0), 0.0)
    return View(
        root, writer, free, path, record.step, every, behind, steps, step_seconds, record.nbytes, write,
        last.nbytes / write if last is not None and write else None, _stall_share(past), due if writer else None,
        wait if writer else None, writer is not None and _is_writing(root, committed), free // max(record.nbytes, 1),
        dict(record.metrics), about.origin(record),
    )  # fmt: skip


def _newest(root: str) -> tuple[str, Record, float] | None:
    """The checkpoint that was committed last, with its record and when that was; None if there is none."""
    for _ in range(common.LOOKS):
        found = {}
        for path in names.committed(root):
            try:
                found[path] = os.stat(os.path.join(path, names.COMMIT)).st_mtime
            except OSError:
                continue
        for path, committed in sorted(found.items(), key=lambda each: each[1], reverse=True):
            try:
                return path, read_record(path), committed
            except Corrupt:
                continue
            except NoCheckpoint:  # taken back meanwhile: there is a newer one
                break
        else:
            return None
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
    rows.append(("STEP", f"{view.step:,} is durable"))
    if view.behind_seconds is not None:
        steps = "" if view.behind_steps is None else f"about {view.behind_steps:,.0f} steps, "
        rows.append(("BEHIND", f"{steps}{duration(view.behind_seconds)}"))
    if view.step_seconds is not None:
        rows.append(("STEP TIME", duration(view.step_seconds)))
    if view.bytes_per_second is not None and view.write_seconds is not None and view.nbytes is not None:
        speed = f"{human(view.bytes_per_second)}/s, {duration(view.write_seconds)} from step to disk"
        rows.append(("CHECKPOINT", f"{human(view.nbytes)}, {speed}"))
    else:
        rows.append(("CHECKPOINT", human(view.nbytes or 0)))
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


def _next(view: View) -> str:
    """When the next checkpoint is due."""
    parts = [] if view.next_step is None else [f"step {view.next_step:,}"]
    if view.next_seconds:
        parts.append(f"in about {common.duration(view.next_seconds)}")
    if view.writing:
        parts.append("one is being written")
    return ", ".join(parts) or "when it is due"


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows]
