"""What splitting the step of an optimizer that is not of torch.optim gains: a 30M-parameter GPT, a checkpoint at every step.

For each of three optimizers from PyPI (``pip install --no-deps lion-pytorch adabelief-pytorch pytorch-optimizer``) three
processes train the same model and take turns, in interleaved rounds: the optimizer alone, with its step split layer by layer,
and with its own step whole. A round ends when its checkpoints are durable, and that time counts. A ratio is of two step times
in the same round; its median and range over all rounds are printed.

    python benchmarks/splitting.py [--json benchmarks/results/splitting.json]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import machine
from contest import Contestant, in_turn, ratios, scratch, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

OPTIMIZERS = {"Lion": "lion_pytorch", "AdaBelief": "adabelief_pytorch", "Adan": "pytorch_optimizer"}
KINDS = ("plain", "split", "whole")
WARM_UP = 10  # steps: compilation, the comparisons that prove a split, every slot written for the first time


def work(name: str, kind: str, folder: str, every: int, pipe: Connection) -> None:
    """A contestant's process: takes the number of steps of a round, answers with the seconds of one."""
    import torch
    from train_gpt import GPT

    import fxckpt

    torch.manual_seed(0)
    model = GPT(6, 640, 10, 64, dropout=0.0)
    opt = getattr(importlib.import_module(OPTIMIZERS[name]), name)(model.parameters(), lr=1e-5)
    if kind != "plain":
        fxckpt.compile_step(opt, folder, model=model, every=every, on_error="raise")
    if kind == "whole":
        opt.ckpt._run.steppers[0].split.refuse("measured")
    forward = torch.compile(model, backend=fxckpt.backend if kind != "plain" else "inductor")
    count = WARM_UP
    while count:
        began = time.perf_counter()
        for _ in range(count):
            x = torch.randint(0, 256, (2, 64))
            forward(x, x.roll(-1, 1)).backward()
            opt.step()
            opt.zero_grad()
        if kind != "plain":
            opt.ckpt.flush()
        pipe.send((time.perf_counter() - began) / count)
        count = pipe.recv()
    if kind != "plain":
        assert (opt.ckpt._run.steppers[0].whole is None) == (kind == "split"), "the step did not run as it was asked to"
        opt.ckpt.shutdown()


def measure(name: str, every: int, rounds: int, steps: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of a step, by contestant and round."""
    contestants = {}
    for kind in KINDS:  # started one after the other: warming up side by side, their threads would wait for each other
        contestants[kind] = Contestant(f"{name}, {kind}", work, name, kind, str(folder / f"{name}-{kind}-{every}"), every)
        contestants[kind].answer()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in in_turn(number, KINDS):
            seconds[kind].append(contestants[kind].ask(steps))
    for contestant in contestants.values():
        contestant.pipe.send(0)
        contestant.join()
    return seconds


def ratio(a: list[float], b: list[float]) -> str:
    """Median and range of a / b over the rounds."""
    found = ratios(a, b)
    return f"{found['ratio']:.2f} ({min(found['ratios']):.2f} - {max(found['ratios']):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--dir", default=".", help="the disk to measure")
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    with scratch(args.dir) as folder:
        run(args, folder)


def run(args: argparse.Namespace, folder: Path) -> None:
    """Measure, print and write."""
    numbers = {"machine": machine.describe(folder), "rounds": {}}
    print(machine.line(numbers["machine"]))
    for name in args.only:
        for every, title in ((1, "every step"), (10**9, "no checkpoint in flight")):
            found = numbers["rounds"][f"{name}, {title}"] = measure(name, every, args.rounds, args.steps, folder)
            against = [f"{kind} / plain {ratio(found[kind], found['plain'])}" for kind in KINDS[1:]]
            print(f"{name}, {title}: {'; '.join(against)}; whole / split {ratio(found['whole'], found['split'])}", flush=True)
    write(numbers, args.json)


if __name__ == "__main__":
    main()
