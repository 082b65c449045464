"""What a checkpoint at every step is to cost, computed from bytes, layers, cores and disk, beside what it costs.

The constants of the machine are measured first, each alone: the processor time of a byte that is copied and checksummed, and
written; what a checkpoint and each of its layers take of Python, on the thread that trains and on the one that commits; how much
the disk takes. Then on cores that training keeps busy

    step with checkpoints = max(step + trains + share * beside, bytes / disk)
    trains = a + b * layers                               Python, on the thread that trains
    beside = bytes * (copy + write) + c + d * layers      on the threads beside it

where the share lies between 1 / cores, if what is beside takes turns with all threads of the training, and 1, if all of them wait
for the one whose core it takes, as threads do at the end of each operation. The same trainings are run in turns, as in
``overhead.py``.

    python benchmarks/costs.py [--quick] [--json benchmarks/results/costs.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import contest
import machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

JOURNAL = 64
WRITERS, COMMITS = "fxckpt-w", "fxckpt-commit"
"""How the engine's threads and the one that commits are called."""

Shape = tuple[int, int, int, int, int]
"""Of a GPT: layers, width, heads, length, batch."""


@dataclass(frozen=True)
class Training:
    """One training. ``journal``: None without checkpoints; 1: a full one at every step."""

    label: str
    shape: Shape
    optimizer: str = "AdamW"
    journal: int | None = None


def processor_time(kind: str) -> float:
    """Seconds that threads of this process whose names begin so have run."""
    if kind == COMMITS:  # Python's own thread, whose name the kernel does not know
        names = {str(each.native_id) for each in threading.enumerate() if each.name.startswith(COMMITS)}
        folders = [Path("/proc/self/task") / name for name in names]
    else:
        every = Path("/proc/self/task").iterdir()
        folders = [each for each in every if (each / "comm").read_text().startswith(kind)]
    return sum(int((each / "schedstat").read_text().split()[0]) for each in folders) / 1e9


def make(training: Training, folder: Path, threads: int, **options: Any) -> tuple[Any, Any, Any]:
    """A model, its optimizer and a batch; with checkpoints, if it takes some."""
    import logging

    import torch
    from train_gpt import GPT

    import fxckpt

    logging.getLogger("fxckpt").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers, width, heads, length, batch = training.shape
    model = GPT(layers, width, heads, length, dropout=0.0)
    if training.optimizer == "AdamW":
        opt: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        opt = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    if training.journal is not None:
        given = {"every": 1, "journal": training.journal, "read_back": "off", **options}
        fxckpt.compile_step(opt, folder, model=model, **given)
        fxckpt.load()
    return model, opt, torch.randint(0, 256, (batch, length))


def steps(model: Any, opt: Any, x: Any, count: int) -> None:
    """Train, and wait until all is durable."""
    for _ in range(count):
        model(x, x.roll(-1, 1)).backward()
        opt.step()
        opt.zero_grad()
    if hasattr(opt, "ckpt"):
        opt.ckpt.flush()


def bytes_work(writer: str, folder: Path, pipe: Connection) -> None:
    """A process that sends the writers' seconds of processor time for a byte of ``save()``."""
    model, opt, x = make(Training("", (8, 512, 8, 64, 2), journal=1), folder, 1, every=10**9, writer=writer)
    steps(model, opt, x, 1)
    size = 3 * sum(p.nbytes for p in model.parameters())
    found = []
    for number in range(12):
        before = processor_time(WRITERS)
        opt.ckpt.save()
        if number > 3:  # every slot was written once by then
            found.append((processor_time(WRITERS) - before) / size)
    opt.ckpt.shutdown()
    pipe.send(min(found))


def python_work(training: Training, folder: Path, pipe: Connection) -> None:
    """A process that sends the seconds of processor time of a tiny model's step: of the thread that trains, and of the one that
    commits; and how many layers it has. The least of several rounds."""
    model, opt, x = make(training, folder, 1)
    steps(model, opt, x, 10)
    trains, commits = [], []
    for _ in range(8):
        began = time.thread_time(), processor_time(COMMITS)
        steps(model, opt, x, 20)
        trains.append((time.thread_time() - began[0]) / 20)
        commits.append((processor_time(COMMITS) - began[1]) / 20)
    pipe.send((min(trains), min(commits), number_of_layers(opt) if training.journal else 0))


def number_of_layers(opt: Any) -> int:
    """That one checkpoint has."""
    import fxckpt

    newest = fxckpt.latest(opt.ckpt.directory)
    assert newest is not None
    return len(json.loads((Path(newest.path) / "commit.json").read_text())["layers"])


def train_work(training: Training, folder: Path, threads: int, pipe: Connection) -> None:
    """A process that trains as many steps as it is asked for, and sends the seconds of one, and the bytes and layers of one
    checkpoint."""
    model, opt, x = make(training, folder, threads)
    steps(model, opt, x, 6)
    pipe.send(number_of_layers(opt) if training.journal else 0)
    while count := pipe.recv():
        written = opt.ckpt.statistics()["bytes_written"] if training.journal else 0
        began = time.perf_counter()
        steps(model, opt, x, count)
        seconds = (time.perf_counter() - began) / count
        written = opt.ckpt.statistics()["bytes_written"] - written if training.journal else 0
        pipe.send((seconds, written / count))


def asked(target: Any, *arguments: Any) -> Any:
    """What a process of its own sends."""
    process = contest.Contestant(target.__name__, target, *arguments)
    found = process.answer()
    process.join()
    return found


def constants(folder: Path, disk: machine.Disk) -> dict[str, Any]:
    """What this machine takes, in seconds and bytes."""
    copy = asked(bytes_work, "mock", folder / "mock")
    found: dict[str, Any] = {"copy": copy, "write": max(asked(bytes_work, "thread", folder / "bytes") - copy, 0.0)}
    small, large = (2, 32, 2, 16, 2), (16, 32, 2, 16, 2)
    for name, journal in (("full", 1), ("journal", JOURNAL)):
        lines = []
        for shape in (small, large):
            none = asked(python_work, Training("", shape), folder / "none")
            with_ = asked(python_work, Training("", shape, journal=journal), folder / f"{name}-{shape[0]}")
            lines.append((with_[0] - none[0], with_[1], with_[2]))
        span = lines[1][2] - lines[0][2]
        for at, thread in enumerate(("trains", "commits")):
            slope = (lines[1][at] - lines[0][at]) / span
            found[f"{name}, {thread}"] = {"layer": slope, "checkpoint": lines[0][at] - slope * lines[0][2]}
    found["disk"] = statistics.median(disk.measure() for _ in range(5))
    return found


def predicted(step: float, nbytes: float, layers: int, kind: str, found: dict[str, Any], cores: int) -> list[float]:
    """The step time with checkpoints over that without, by the model above: at least, and at most."""
    trains, commits = found[f"{kind}, trains"], found[f"{kind}, commits"]
    beside = nbytes * (found["copy"] + found["write"]) + commits["checkpoint"] + commits["layer"] * layers
    on_thread = trains["checkpoint"] + trains["layer"] * layers
    return [max(step + on_thread + beside / share, nbytes / found["disk"]) / step for share in (cores, 1)]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Constants, then all trainings in interleaved rounds."""
    shapes: dict[str, tuple[Shape, str]] = {
        "GPT of 25M parameters, AdamW": ((8, 512, 8, 64, 2), "AdamW"),
        "the same, four times the batch": ((8, 512, 8, 64, 8), "AdamW"),
        "the same, SGD": ((8, 512, 8, 64, 2), "SGD"),
        "GPT of 48 layers, 10M parameters, AdamW": ((48, 128, 4, 64, 4), "AdamW"),
    }
    if args.quick:
        shapes = {"a small GPT, AdamW": ((2, 64, 2, 16, 2), "AdamW")}
    disk = machine.Disk(folder)
    found = constants(folder, disk)
    cores = args.threads
    rows = []
    for label, (shape, optimizer) in shapes.items():
        kinds: dict[str, int | None] = {"none": None, "full": 1}
        if optimizer == "AdamW":  # of plain SGD a record has the bytes of a full checkpoint
            kinds["journal"] = JOURNAL
        workers = {}
        for kind, journal in kinds.items():
            training = Training(label, shape, optimizer, journal)
            workers[kind] = contest.Contestant(kind, train_work, training, folder / f"{len(rows)}-{kind}", args.threads)
        layers = {kind: worker.answer() for kind, worker in workers.items()}
        rounds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in workers}
        for number in range(args.rounds):
            for kind, worker in contest.in_turn(number, list(workers.items())):
                contest.progress(f"{label}, round {number + 1} of {args.rounds}: {kind}")
                rounds[kind].append(worker.ask(args.steps))
        for worker in workers.values():
            worker.pipe.send(0)
            worker.join()
        none = [seconds for seconds, _ in rounds["none"]]
        step = statistics.median(none)
        for kind in list(kinds)[1:]:
            nbytes = statistics.median(written for _, written in rounds[kind])
            rows.append({
                "label": label, "kind": kind, "step_seconds": step, "bytes": nbytes, "layers": layers[kind],
                "predicted": predicted(step, nbytes, layers["full"], kind, found, cores),
                **contest.ratios([seconds for seconds, _ in rounds[kind]], none),
            })  # fmt: skip
    contest.progress("")
    return {"machine": machine.describe(folder), "cores": cores, "constants": found, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model: does it run at all?")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7, help="of a round")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch: the cores that training keeps busy")
    parser.add_argument("--dir", default=".", help="the disk to measure; needs about 4 GB")
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = 2, 3
    with contest.scratch(args.dir) as folder:
        numbers = measure(args, folder)
    found = numbers["constants"]
    print(machine.line(numbers["machine"]))
    print(f"a GB takes {found['copy'] * 1e12:.0f} ms of a core to be copied and checksummed, {found['write'] * 1e12:.0f} ms to "
          f"be written; disk {found['disk'] / 1e9:.2f} GB/s")  # fmt: skip
    for key in found:
        if isinstance(found[key], dict):
            print(f"{key}: {found[key]['checkpoint'] * 1e3:.2f} ms a checkpoint, {found[key]['layer'] * 1e6:.0f} us a layer")
    for row in numbers["rows"]:
        spread = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} - {max(row['ratios']):.2f})"
        print(
            f"{row['label']:42}{row['kind']:8} predicted {row['predicted'][0]:.2f} - {row['predicted'][1]:.2f}, measured {spread}"
        )
    contest.write(numbers, args.json)


if __name__ == "__main__":
    main()
