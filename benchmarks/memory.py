"""What updates inside the backward gain and cost: memory of gradients, time of a step, waits for an uneven disk, compiling.

Each way is a process that trains the same compiled GPT of 30M parameters; they take turns in interleaved rounds, and a ratio is
of the same round. Memory is resident memory beyond that before a step; for it, freed memory goes back to the system at once
(``MALLOC_MMAP_THRESHOLD_``). Step times are processor time of one thread, without checkpoints. The slow disk is memory whose
writes are delayed until they and the copies need ``--disk`` of a step in the mean, with jitter, or with a halt now and then;
steps are of four times the batch there. Compiling is the processor time of the first step in a process with empty caches.

    python benchmarks/memory.py [--only stall] [--quick] [--json benchmarks/results/memory.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contest
import machine
from armed import NEVER, WAYS, work, work_on_slow_disk

BOTH = ("after_backward", "in_backward")
DISKS = {"jitter": "a disk with jitter", "hiccups": "a disk that halts for half a step, once in ten"}


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Of the processes that begin in it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class Ways:
    """A process for each way; ``began`` is what each said of its start."""

    def __init__(self, ways: Any, target: Any, folder: Path, args: argparse.Namespace, *more: Any):
        self.processes: dict[str, contest.Contestant] = {}
        self.began: dict[str, Any] = {}
        for way in ways:
            contest.progress(f"starting {way}")
            place = Path(tempfile.mkdtemp(dir=folder))
            self.processes[way] = contest.Contestant(way, target, way, place, args, *more)
            self.began[way] = self.processes[way].answer()  # one compiles at a time

    def rounds(self, count: int, *question: Any) -> dict[str, list[Any]]:
        """Everyone's answers, round by round."""
        found: dict[str, list[Any]] = {way: [] for way in self.processes}
        for number in range(count):
            for way in contest.in_turn(number, list(self.processes)):
                contest.progress(f"{question[0]}: round {number + 1} of {count}, {way}")
                found[way].append(self.processes[way].ask(question))
        return found

    def end(self) -> None:
        for process in self.processes.values():
            process.pipe.send(None)
            process.join()


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peaks of both ways."""
    with environment(MALLOC_MMAP_THRESHOLD_="65536"):
        ways = Ways(BOTH, work, folder, args, NEVER)
    peaks = ways.rounds(args.rounds, "peak", 3)
    ways.end()
    gradients = ways.began["after_backward"]["gradient_bytes"]
    off = [(a - b) / gradients for a, b in zip(peaks["after_backward"], peaks["in_backward"])]
    return {"peaks": peaks, "gradient_bytes": gradients, "off": off}


def time_of_steps(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Step times of all three ways, and what the ops cost that do nothing."""
    ways = Ways(WAYS, work, folder, args, NEVER)
    found = ways.rounds(args.rounds, "timed", args.steps)
    ops = ways.processes["unarmed"].ask(("ops", 20))
    ways.end()
    cpu = {way: [each["cpu"] for each in rounds] for way, rounds in found.items()}
    of_armed = contest.ratios(cpu["in_backward"], cpu["unarmed"])
    of_ops = {**ops, "share": ops["seconds"] / statistics.median(each["clock"] for each in found["unarmed"])}
    return {
        "began": ways.began,
        "rounds": found,
        "armed": of_armed,
        "against_after": contest.ratios(cpu["in_backward"], cpu["after_backward"]),
        "ops": of_ops,
    }


def stall(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Waits for each uneven disk."""
    return {kind: stall_by(kind, args, folder) for kind in DISKS}


def stall_by(kind: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Waits of both ways for the same uneven disk, which takes steps that are longer than the copies of a checkpoint."""
    longer = argparse.Namespace(**{**vars(args), "batch": 4 * args.batch})
    ways = Ways(BOTH, work_on_slow_disk, folder, longer, kind)
    plain = ways.rounds(1, "timed", args.steps, 0.0)
    step = statistics.median(each["clock"] for rounds in plain.values() for each in rounds)
    found = ways.rounds(args.rounds, "stalled", args.steps, step)
    ways.end()
    shares = {way: [each["stall"] / each["step"] for each in rounds] for way, rounds in found.items()}
    return {"label": DISKS[kind], "rounds": found, "shares": shares}


def compiling(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of processor time of the first step with empty caches, of both ways in turn."""
    found: dict[str, list[float]] = {way: [] for way in BOTH}
    for number in range(args.compiles):
        for way in contest.in_turn(number, BOTH):
            with environment(TORCHINDUCTOR_CACHE_DIR=tempfile.mkdtemp(dir=folder), TORCHINDUCTOR_COMPILE_THREADS="1"):
                ways = Ways([way], work, folder, args, NEVER)
            ways.end()
            found[way].append(ways.began[way]["first_step"])
    return found


def report(numbers: dict[str, Any]) -> None:
    """A line for each figure; the table is made by tables.py."""
    print(machine.line(numbers["machine"]))
    if "memory" in numbers:
        print(f"gradient memory off the peak: {_spread(numbers['memory']['off'])}")
    if "time" in numbers:
        armed, ops = numbers["time"]["armed"]["ratios"], numbers["time"]["ops"]["share"]
        print(f"step, armed against unarmed: {_spread(armed)}; ops unarmed: {ops:.4f} of a step")
    for each in numbers.get("stall", {}).values():
        print(f"stall, {each['label']}: " + ", ".join(f"{way} {_spread(found)}" for way, found in each["shares"].items()))
    print(f"first step with empty caches: {numbers.get('compile')}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} – {max(values):.3f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option(
        "--only", nargs="+", choices=["memory", "time", "stall", "compile"], help="these; other parts stay as the file has them"
    )
    option("--quick", action="store_true", help="a small model, few rounds: to see that it runs")
    option("--rounds", type=int, default=7)
    option("--steps", type=int, default=20, help="steps in a round")
    option("--compiles", type=int, default=2, help="compiles with empty caches, of each way")
    option("--disk", type=float, default=0.67, help="of a step, that the slow disk needs for a checkpoint")
    option("--layers", type=int, default=6)
    option("--width", type=int, default=640)
    option("--heads", type=int, default=10)
    option("--length", type=int, default=64)
    option("--batch", type=int, default=2)
    option("--threads", type=int, default=1)
    option("--note", default="", help="what else the machine does, for the results")
    option("--json", help="write the numbers to this file")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.compiles, args.layers, args.width, args.heads = 2, 5, 1, 2, 128, 4
    return args


PARTS = {"memory": memory, "time": time_of_steps, "stall": stall, "compile": compiling}


def main() -> None:
    args = arguments()
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    with contest.scratch(in_memory) as folder:
        numbers = {"machine": machine.describe(folder), "note": args.note, "quick": args.quick, "threads": args.threads}
        if args.only and args.json and Path(args.json).exists():
            before = json.loads(Path(args.json).read_text())
            if {key: before[key] for key in numbers} != numbers:
                raise SystemExit(f"{args.json} has results of another machine or setting; give another file")
            numbers = before
        for part in args.only or PARTS:
            numbers[part] = PARTS[part](args, folder)
            numbers.setdefault("load", {})[part] = os.getloadavg()[0]
            contest.write(numbers, args.json)
    contest.progress("")
    report(numbers)


if __name__ == "__main__":
    main()
