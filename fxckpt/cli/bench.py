"""Measure what a disk can do, by writing and reading as a training run does, and say how often a model can be checkpointed.

Writes a file in a directory of its own under DIR, through the engine: checksums, O_DIRECT where accepted, and the syncs of a
commit included; then overwrites it in place, as recycled slots are, and reads it back verified. All of it is removed.
While a trainer uses the same disk, both get slower for the time.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from fxckpt.cli import common
from fxckpt.errors import NotAStore, SaveFailed, SetupError
from fxckpt.store import names
from fxckpt.store.files import replace_file, space
from fxckpt.store.folder import Folder
from fxckpt.store.layout import BLOCK

if TYPE_CHECKING:
    from fxckpt.engine.sums import Sums

HELP = "what this disk can do, and how often a model can be checkpointed"

ROUNDS = 3  # overwrites at least
COMMITS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="a directory on the disk, for instance that of the store")
    size: dict[str, Any] = {"type": common.amount, "metavar": "SIZE"}
    parser.add_argument("--size", **size, default=256 << 20, help="bytes to write each time (default: 256MiB)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to overwrite (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="writer threads (default: 2)")
    parser.add_argument("--chunk", **size, default=4 << 20, help="(default: 4MiB)")
    parser.add_argument("--state", **size, help="size of a checkpoint, for the interval")
    count = "or the number of parameters (7B), of 12 bytes each: float32 and two moments"
    parser.add_argument("--parameters", type=common.amount, metavar="N", help=count)
    parser.add_argument("--step", type=float, metavar="SECONDS", help="time of a training step, for the interval")


def run(args: argparse.Namespace) -> int:
    if not os.path.isdir(args.dir):
        raise NotAStore(f"{args.dir} is not a directory")
    if args.size < args.chunk or args.chunk % BLOCK or args.threads < 1:
        raise SetupError(f"--size must be at least --chunk, and --chunk a multiple of {BLOCK}; --threads at least 1")
    state = args.state if args.state is not None else None if args.parameters is None else 12 * args.parameters
    if (state is None) != (args.step is None):
        raise SetupError("the interval follows from both: --state (or --parameters) and --step")
    found = measure(args.dir, args.size // BLOCK * BLOCK, args.seconds, args.threads, args.chunk)
    plan = None if state is None else interval(found, state, args.step)
    if args.json:
        common.print_json({"directory": os.path.abspath(args.dir), "threads": args.threads, "chunk_bytes": args.chunk,
                           "disk": found, "interval": plan})  # fmt: skip
    else:
        _print(found, plan)
    return common.OK


def measure(directory: str, nbytes: int, seconds: float, threads: int, chunk: int) -> dict[str, Any]:
    """Write, overwrite and read one file of ``nbytes``. Raises SetupError if the disk is too full, SaveFailed."""
    free, _ = space(directory)
    if free < nbytes + (64 << 20):
        needed = f"{common.human(nbytes)} and 64 MB more are needed: use a smaller --size"
        raise SetupError(f"{directory} has {common.human(free)} left; {needed}")
    with tempfile.TemporaryDirectory(prefix=".fxckpt-bench-", dir=directory, ignore_cleanup_errors=True) as folder:
        return _measure(folder, nbytes, seconds, threads, chunk)


def _measure(folder: str, nbytes: int, seconds: float, threads: int, chunk: int) -> dict[str, Any]:
    """Bytes per second, and seconds of a commit."""
    from fxckpt.engine import Engine, Sources, read_verified

    data = np.random.default_rng(0).integers(0, 256, nbytes - BLOCK, np.uint8)  # nothing that a disk can compress
    engine = Engine(threads=threads, chunk_bytes=chunk, staging_bytes=0)
    try:
        plan = engine.plan([(nbytes, b" " * BLOCK)], [(0, 0, BLOCK, data.nbytes, 1)], 1)
        sources = Sources([(data.ctypes.data, None, None)])

        def write() -> tuple[float, Sums]:
            begun = time.perf_counter()
            checkpoint = engine.begin(plan, folder, ["data"])
            try:
                checkpoint.emit(0, sources)
                if not checkpoint.durable(600):
                    raise SaveFailed("write", folder, detail="it took longer than ten minutes")
                return nbytes / (time.perf_counter() - begun), checkpoint.crcs(0)
            finally:
                checkpoint.release()

        with common.Progress("writing", int(seconds * 100)) as progress:
            (fresh, crcs), begun = write(), time.perf_counter()
            overwrites: list[float] = []
            while len(overwrites) < ROUNDS or time.perf_counter() - begun < seconds:
                overwrites.append(write()[0])
                progress.advance(int(100 * nbytes / overwrites[-1]))
        path, reads = os.path.join(folder, "data"), []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            read_verified(path, nbytes=nbytes, chunk_bytes=chunk, crcs=crcs, targets=[], threads=threads)
            reads.append(nbytes / (time.perf_counter() - begun))
        commits = [_commit(folder) for _ in range(COMMITS)]
        return {
            "nbytes": nbytes, "o_direct": not engine.buffered, "write_new_bytes_per_second": fresh,
            "overwrite_bytes_per_second": statistics.median(overwrites),
            "overwrite_range": [min(overwrites), max(overwrites)], "overwrites": len(overwrites),
            "read_bytes_per_second": statistics.median(reads), "read_range": [min(reads), max(reads)],
            "commit_seconds": statistics.median(commits), "commit_range": [min(commits), max(commits)],
        }  # fmt: skip
    finally:
        engine.close()


def _commit(folder: str) -> float:
    """Seconds that the syncs and renames of one commit take, beside the data: as in docs/format.md."""
    root = Folder.open(folder)
    root.mkdir("slot")
    with root.within("slot") as slot:
        begun = time.perf_counter()
        replace_file(slot, names.COMMIT, b"x" * 20_000, durable=True)
        slot.sync()
        root.rename("slot", "done")
        root.sync()
        taken = time.perf_counter() - begun
    root.remove_tree("done")
    root.close()
    return taken


def interval(disk: dict[str, Any], state: int, step: float) -> dict[str, Any]:
    """What follows for a checkpoint of ``state`` bytes and a training step of ``step`` seconds. The disk writes one checkpoint
    while the next steps run. A crash then loses at most the steps of two intervals: the one that is being written, and the one
    that is being trained."""
    if step <= 0 or state <= 0:
        raise SetupError("--state and --step must be above 0")
    seconds = state / disk["overwrite_bytes_per_second"] + disk["commit_seconds"]
    steps = max(math.ceil(seconds / step), 1)
    return {"state_bytes": state, "step_seconds": step, "write_seconds": seconds, "every": steps,
            "every_seconds": steps * step, "disk_busy": seconds / (steps * step), "lost_at_most_steps": 2 * steps,
            "bytes_per_day": state * 86400 / (steps * step),
            "bytes_per_day_auto": state * 86400 / max(60.0, steps * step),
            "restore_seconds": state / disk["read_bytes_per_second"]}  # fmt: skip


def _print(disk: dict[str, Any], plan: dict[str, Any] | None) -> None:
    def speed(name: str, limits: str) -> str:
        low, high = disk[limits]
        return f"{common.human(disk[name])}/s   ({common.human(low)}/s to {common.human(high)}/s)"

    way = "O_DIRECT" if disk["o_direct"] else "through the page cache: this file system refuses O_DIRECT"
    print(f"{common.human(disk['nbytes'])} at a time, {way}")
    print(f"new file         {common.human(disk['write_new_bytes_per_second'])}/s")
    print(f"in place         {speed('overwrite_bytes_per_second', 'overwrite_range')}")
    print(f"verified read    {speed('read_bytes_per_second', 'read_range')}")
    low, high = disk["commit_range"]
    print(f"commit           {common.duration(disk['commit_seconds'])}   ({common.duration(low)} to {common.duration(high)})")
    if plan is None:
        print("\nwith --state SIZE and --step SECONDS: the interval that follows for a model")
        return
    print(f"\n{common.human(plan['state_bytes'])} of state, {common.duration(plan['step_seconds'])} a step:")
    print(f"a checkpoint     takes {common.duration(plan['write_seconds'])} to write")
    busy = f"the disk {plan['disk_busy']:.0%} busy, {common.human(plan['bytes_per_day'])} a day"
    print(f"every={plan['every']:<10} is as often as this disk can: each {common.duration(plan['every_seconds'])}, {busy}")
    print(f'every="auto"     at most once a minute: {common.human(plan["bytes_per_day_auto"])} a day')
    print(f"a crash          loses at most {plan['lost_at_most_steps']} steps (with every={plan['every']})")
    print(
        f"load             takes {common.duration(plan['restore_seconds'])} in a run that has not stepped, elsewhere twice that"
    )
