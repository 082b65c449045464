"""What ``opt.step()`` costs while no checkpoint is in flight, against PyTorch's own.

For each optimizer and model, all contestants live in one process and take turns in interleaved rounds on the very same
parameters, gradients and states: copies of their own lie elsewhere in memory, which alone moves the ratio of two equal steps
by up to a tenth. A ratio is the median over rounds of fxckpt's time divided by the other's in the same round. Like is
compared with like: ``native`` with the same flags in PyTorch, ``update="inductor"`` with the fastest of ``foreach``,
``fused`` and ``torch.compile(opt.step)``.

    python benchmarks/optimizer_step.py [--quick] [--json benchmarks/results/optimizer_step.json]

``--only`` and ``--models`` measure a part; its rows take their place among those that the file has already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from contest import in_turn, write
from torch import nn

import fxckpt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_gpt import GPT

NEVER = 10**9  # `every`: no checkpoint starts
FLAGS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
FASTEST_OF = ("foreach", "fused", "compiled")
OPTIMIZERS = {
    "AdamW": lambda params, **flags: torch.optim.AdamW(params, lr=1e-4, **flags),
    "Adam": lambda params, **flags: torch.optim.Adam(params, lr=1e-4, **flags),
    "SGD, momentum": lambda params, **flags: torch.optim.SGD(params, lr=1e-4, momentum=0.9, **flags),
}
MODELS = {
    "8 tensors of 1024 × 1024": lambda: nn.ParameterList(torch.randn(1024, 1024) for _ in range(8)),
    "GPT, 30M parameters": lambda: GPT(6, 640, 10, 64),
    "200 tensors of 64 × 64": lambda: nn.ParameterList(torch.randn(64, 64) for _ in range(200)),
}


@dataclass
class Contestant:
    """One way to make a step; ``times`` are seconds of one, one for each round."""

    name: str
    step: Callable[[], object]
    times: list[float]

    def run(self, count: int) -> float:
        """Seconds of one step, the mean of ``count``."""
        began = time.perf_counter()
        for _ in range(count):
            self.step()
        return (time.perf_counter() - began) / count


def contestants(make: Callable, model: nn.Module, folder: str) -> tuple[list[Contestant], list]:
    """All ways to make the step, and the runs to shut down."""
    found, runs = [], []
    parameters = [nn.Parameter(p.detach()) for p in model.parameters()]  # of no module: none is given
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape) * 1e-2
    first = make(parameters)
    first.step()

    def another(**flags: bool) -> torch.optim.Optimizer:
        opt = make(parameters, **flags)
        opt.state.update(first.state)
        return opt

    for name, flags in FLAGS.items():
        found.append(Contestant(name, another(**flags).step, []))
    found.append(Contestant("compiled", torch.compile(another().step, fullgraph=False), []))
    for name, flags in {**FLAGS, "inductor": {}}.items():
        ours = another(**flags)
        update = "inductor" if name == "inductor" else "native"
        fxckpt.compile_step(ours, f"{folder}/{name}", every=NEVER, update=update)
        found.append(Contestant(f"fxckpt {name}", ours.step, []))
        runs.append(ours.ckpt)
    return found, runs


def compare(make: Callable, model: nn.Module, rounds: int) -> list[dict]:
    """Interleaved rounds of all contestants; one row for each comparison."""
    with tempfile.TemporaryDirectory() as folder:
        everyone, runs = contestants(make, model, folder)
        for one in everyone:
            one.run(5)  # creates the state, traces, compiles
        for number in range(rounds):
            for one in in_turn(number, everyone):
                one.times.append(one.run(max(1, round(0.03 / max(one.run(1), 1e-4)))))
        for run in runs:
            run.shutdown()
    times = {one.name: one.times for one in everyone}
    best = min(FASTEST_OF, key=lambda name: statistics.median(times[name]))
    return [row(times, f"fxckpt {name}", name) for name in FLAGS] + [row(times, "fxckpt inductor", best)]


def row(times: dict[str, list[float]], ours: str, theirs: str) -> dict:
    ratios = [a / b for a, b in zip(times[ours], times[theirs])]
    return {
        "ours": ours,
        "theirs": theirs,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": statistics.median(times[ours]),
        "plain_seconds": statistics.median(times[theirs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="nine rounds instead of twenty-five")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--models", nargs="+", metavar="WORD", default=[""], help="those whose name has one of these in it")
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers = {"machine": machine.describe(Path()), "results": {}}
    if args.json and Path(args.json).exists():
        before = json.loads(Path(args.json).read_text())
        if before["machine"] == numbers["machine"]:
            numbers = before
    print(machine.line(numbers["machine"]))
    print(f"\n{'':36}{'PyTorch':>12}{'fxckpt':>10}{'ratio':>8}{'min':>7}{'max':>7}")
    chosen = {model: build for model, build in MODELS.items() if any(word in model for word in args.models)}
    for model, build in chosen.items():
        for name in args.only:
            print(f"{model}, {name}")
            rows = compare(OPTIMIZERS[name], build(), 9 if args.quick else 25)
            numbers["results"][f"{model}, {name}"] = rows
            for r in rows:
                print(
                    f"  {r['ours']:18}/ {r['theirs']:14}{r['plain_seconds'] * 1e3:9.2f} ms{r['seconds'] * 1e3:7.2f} ms"
                    f"{r['ratio']:8.2f}{min(r['ratios']):7.2f}{max(r['ratios']):7.2f}",
                    flush=True,
                )
            torch.compiler.reset()
    write(numbers, args.json)


if __name__ == "__main__":
    main()
