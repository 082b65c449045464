"""What ``opt.step()`` costs while no checkpoint is in flight, against the same optimizer's own ``step()``.

For each pair both optimizers hold equal parameters and gradients and take turns in one process; the ratio is
the median over rounds of fxckpt's time divided by the plain optimizer's.

    python benchmarks/optimizer_step.py [--quick] [--json benchmarks/results/optimizer_step.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from torch import nn

import fxckpt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from train_gpt import GPT

NEVER = 10**9  # `every`: no checkpoint starts


@dataclass(frozen=True)
class Pair:
    """A plain AdamW and the fxckpt one it is measured against."""

    label: str
    plain: dict
    ours: dict
    update: str | None = None


PAIRS = (
    Pair("fused=True, native        / fused=True", {"fused": True}, {"fused": True}),
    Pair("foreach=True, native      / foreach=True", {"foreach": True}, {"foreach": True}),
    Pair("default flags, native     / default flags", {}, {}, "native"),
    Pair("update=\"inductor\"         / fused=True", {"fused": True}, {}, "inductor"),
)
MODELS = {
    "GPT, 30M parameters": lambda: GPT(6, 640, 10, 64),
    "200 tensors of 64 × 64": lambda: nn.ParameterList(torch.randn(64, 64) for _ in range(200)),
}


def with_gradients(model: nn.Module) -> nn.Module:
    """The same model with a random gradient at every parameter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-2
    return model


def seconds(optimizer: torch.optim.Optimizer, count: int) -> float:
    """Time of one step, the mean of ``count``."""
    began = time.perf_counter()
    for _ in range(count):
        optimizer.step()
    return (time.perf_counter() - began) / count


def compare(pair: Pair, model: nn.Module, folder: str, rounds: int) -> dict:
    """Interleaved rounds of both optimizers of a pair."""
    theirs, mine = with_gradients(copy.deepcopy(model)), with_gradients(copy.deepcopy(model))
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-4, **pair.plain)
    ours = torch.optim.AdamW(mine.parameters(), lr=1e-4, **pair.ours)
    fxckpt.compile_step(ours, folder, model=mine, every=NEVER, update=pair.update)
    for optimizer in (plain, ours):
        seconds(optimizer, 5)  # creates the state, traces, compiles
    count = max(1, round(0.1 / seconds(plain, 3)))
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(rounds):
        turns = (("plain", plain), ("ours", ours))
        for name, optimizer in turns if number % 2 else turns[::-1]:
            times[name].append(seconds(optimizer, count))
    ours.ckpt.shutdown()
    ratios = [mine / plain for mine, plain in zip(times["ours"], times["plain"])]
    return {"label": pair.label, "ratio": statistics.median(ratios), "ratios": ratios,
            "plain_seconds": statistics.median(times["plain"]), "seconds": statistics.median(times["ours"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seven rounds instead of twenty-one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers = {"machine": machine.describe(Path()), "results": {}}
    print(machine.line(numbers["machine"]))
    print(f"\n{'':46}{'plain':>10}{'fxckpt':>11}{'ratio':>8}")
    for name, build in MODELS.items():
        print(name)
        rows = numbers["results"][name] = []
        for pair in PAIRS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(pair, build(), folder, 7 if args.quick else 21))
            row = rows[-1]
            print(f"  {pair.label:44}{row['plain_seconds'] * 1e3:7.2f} ms{row['seconds'] * 1e3:8.2f} ms"
                  f"{row['ratio']:8.2f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
