"""What a checkpoint at every step costs: a 30M-parameter GPT, about 350 MB of parameters and AdamW state.

Every contestant lives in a process of its own and trains the same model; they take turns, a few steps each,
in interleaved rounds. A round ends when all its checkpoints are durable, and that time counts. The ratio of
a contestant is the median over rounds of its step time divided by that of "no checkpoints" in the same round.
Those who wait for the disk at every step take a quarter of the steps, to save time.
Every byte of fxckpt's last checkpoint is verified, and its weights compared, at the end.

    python benchmarks/overhead.py [--quick] [--json benchmarks/results/overhead.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import contest
import machine
from savers import CONTESTANTS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

WARM_UP = 6  # steps before the first round: compilation, every slot written for the first time, allocations
ALL = {contestant.key: contestant for contestant in CONTESTANTS}


def work(key: str, folder: Path, size: argparse.Namespace, pipe: Connection) -> None:
    """A contestant's process: takes the number of steps of a round, answers with the seconds they took."""
    import torch
    from train_gpt import GPT

    torch.set_num_threads(size.threads)
    torch.manual_seed(0)
    model = GPT(size.layers, size.width, size.heads, size.length, dropout=0.0)
    saver = ALL[key].make()
    flags = {"fused": True} if saver.fused else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **flags)
    forward = saver.prepare(model, optimizer, folder)
    x = torch.randint(0, 256, (size.batch, size.length))
    y = x.roll(-1, 1)

    def steps(first: int, count: int) -> int:
        """Train and save ``count`` steps, then wait until they are durable; returns the last one's number."""
        for step in range(first + 1, first + count + 1):
            forward(x, y).backward()
            optimizer.step()
            saver.saved(step)
            optimizer.zero_grad()
        saver.flush()
        return first + count

    step = steps(0, WARM_UP)
    machine.reset_peak_memory()
    pipe.send(sum(t.numel() * t.element_size() for t in saver.tensors().values()))
    while count := pipe.recv():
        began = time.perf_counter()
        step = steps(step, count)
        pipe.send(time.perf_counter() - began)
    peak = machine.peak_memory()  # before the check, which loads a whole checkpoint
    pipe.send({"peak_memory": peak, **saver.check(step)})


class Worker(contest.Contestant):
    """The parent's end of a contestant's process."""

    def __init__(self, key: str, folder: Path, size: argparse.Namespace):
        self.key, self.rounds = key, []
        (folder / key).mkdir()
        super().__init__(ALL[key].label, work, key, folder / key, size)
        self.state_bytes = self.answer()

    def round(self, steps: int) -> None:
        """Let the contestant take ``steps`` steps, or a quarter of them; notes the seconds of one."""
        steps = max(1, steps // 4) if ALL[self.key].waits else steps
        self.rounds.append(self.ask(steps) / steps)

    def finish(self) -> dict:
        report = self.ask(0)
        self.join()
        return report


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Run all rounds; returns the numbers, seconds and bytes throughout."""
    disk = machine.Disk(folder)
    workers = []
    for key in args.only:
        if (why := contest.absent(ALL[key].needs)) is not None:
            print(f"left out: {ALL[key].label}: {why}")
            continue
        contest.progress(f"starting {ALL[key].label}")
        workers.append(Worker(key, folder, args))
    bandwidth = []
    for number in range(args.rounds):
        bandwidth.append(disk.measure())
        for worker in contest.in_turn(number, workers):
            contest.progress(f"round {number + 1} of {args.rounds}: {ALL[worker.key].label}")
            worker.round(args.steps)
    contest.progress("verifying")
    base = next((worker.rounds for worker in workers if worker.key == "none"), workers[0].rounds)
    results = {}
    for worker in workers:
        results[worker.key] = {
            "label": ALL[worker.key].label,
            "step_seconds": statistics.median(worker.rounds),
            **contest.ratios(worker.rounds, base),
            "rounds": worker.rounds,
            **worker.finish(),
        }
    contest.progress("")
    return {
        "machine": machine.describe(folder),
        "state_bytes": workers[0].state_bytes,
        "disk_bytes_per_second": statistics.median(bandwidth),
        "disk_rounds": bandwidth,
        "direct_io": disk.direct,
        "steps_per_round": args.steps,
        "results": results,
    }


def report(numbers: dict) -> None:
    """Print the machine, the disk and the table."""
    state, disk = numbers["state_bytes"], numbers["disk_bytes_per_second"]
    results = numbers["results"]
    print(machine.line(numbers["machine"]))
    kind = "O_DIRECT" if numbers["direct_io"] else "buffered, O_DIRECT refused"
    print(f"disk: {disk / 1e9:.2f} GB/s (overwriting, {kind}, median of {len(numbers['disk_rounds'])})")
    print(
        f"state: {state / 1e6:.0f} MB a checkpoint, a checkpoint at every step; "
        f"the disk alone needs {state / disk * 1e3:.0f} ms for it\n"
    )
    print(f"{'':42}{'step':>9}{'ratio':>8}{'min':>7}{'max':>7}{'state/step':>13}")
    for key, row in results.items():
        seconds, ratios = row["step_seconds"], row["ratios"]
        rate = f"{state / seconds / 1e9:8.2f} GB/s" if key not in ("none", "mock", "journal") else ""
        print(f"{row['label']:42}{seconds * 1e3:6.0f} ms{row['ratio']:8.2f}{min(ratios):7.2f}{max(ratios):7.2f}{rate}")
    print()
    for other in ("mock", "none"):
        if "fxckpt" in results and other in results:
            extra = results["fxckpt"]["peak_memory"] - results[other]["peak_memory"]
            print(f"peak memory of fxckpt against {results[other]['label']}: {extra / 2**20:+.0f} MiB")
    if "fxckpt" in results:
        print("every checkpoint of fxckpt was committed; the last one was read back, verified and compared")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--quick", action="store_true", help="three rounds of twelve steps")
    option("--rounds", type=int, default=5)
    option("--steps", type=int, default=20, help="steps in a round")
    option("--only", nargs="+", choices=list(ALL), default=list(ALL), help="these contestants")
    option("--layers", type=int, default=6)
    option("--width", type=int, default=640)
    option("--heads", type=int, default=10)
    option("--length", type=int, default=64)
    option("--batch", type=int, default=2)
    option("--threads", type=int, default=2)
    option("--dir", default=".", help="the disk to measure; needs about 6 GB")
    option("--json", help="write the numbers to this file")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = 3, 12
    return args


def main() -> None:
    args = arguments()
    with contest.scratch(args.dir) as folder:
        numbers = measure(args, folder)
    report(numbers)
    contest.write(numbers, args.json)


if __name__ == "__main__":
    main()
