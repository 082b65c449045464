"""What a journal costs and saves: step times side by side, bytes a step, and the time to restore by the number of records.

The same GPT as in ``overhead.py``. Every contestant (no checkpoints, a full one at every step, a journal) lives in a process of
its own; they take turns in interleaved rounds, each of which ends when all is durable. The ratio of a contestant is the
median over rounds of its step time divided by that of "none" in the same round. Then a fresh process restores a step behind each
number of records, and compares all bits with what training had.

    python benchmarks/journal.py [--quick] [--json benchmarks/results/journal.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

CONTESTANTS = {"none": None, "full": 1, "journal": 64}
"""``journal=`` of each."""

WARM_UP = 6


def make(size: argparse.Namespace, folder: Path, journal: int | None) -> tuple[Any, Any]:
    """The model and its optimizer."""
    import torch
    from train_gpt import GPT

    import fxckpt

    torch.set_num_threads(size.threads)
    torch.manual_seed(0)
    model = GPT(size.layers, size.width, size.heads, size.length, dropout=0.0)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if journal is not None:
        fxckpt.compile_step(opt, folder, model=model, every=1, journal=journal, read_back="off")
    return model, opt


def bits(model: Any, opt: Any) -> str:
    """A digest of all parameters and all optimizer state."""
    sha = hashlib.sha256()
    for param in model.parameters():
        for tensor in (param, *(opt.state[param][key] for key in sorted(opt.state[param]))):
            sha.update(tensor.detach().contiguous().numpy().data)
    return sha.hexdigest()


def train(key: str, folder: Path, size: argparse.Namespace, pipe: Connection) -> None:
    """A contestant's process: takes the number of steps of a round, answers with seconds and bytes written."""
    import torch

    import fxckpt

    model, opt = make(size, folder, CONTESTANTS[key])
    if CONTESTANTS[key] is not None:
        fxckpt.load()
    x = torch.randint(0, 256, (size.batch, size.length))
    pipe.send(None)
    while count := pipe.recv():
        before = opt.ckpt.statistics()["bytes_written"] if CONTESTANTS[key] else 0
        began = time.perf_counter()
        for _ in range(count):
            model(x, x.roll(-1, 1)).backward()
            opt.step()
            opt.zero_grad()
        if CONTESTANTS[key] is None:
            pipe.send((time.perf_counter() - began, 0, bits(model, opt)))
        else:
            opt.ckpt.flush()
            seconds = time.perf_counter() - began
            pipe.send((seconds, opt.ckpt.statistics()["bytes_written"] - before, bits(model, opt)))
    if CONTESTANTS[key] is not None:
        opt.ckpt.shutdown()


def restore(folder: Path, size: argparse.Namespace, step: int, pipe: Connection) -> None:
    """A fresh process: how long does this step take to load, and what are its bits?"""
    import fxckpt

    model, opt = make(size, folder, 64)
    began = time.perf_counter()
    found = fxckpt.load(step=step)
    pipe.send((time.perf_counter() - began, found.step, bits(model, opt)))


def start(target: Any, *arguments: Any) -> tuple[Any, Connection]:
    """A process, and our end of its pipe."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    return process, ours


def rounds(size: argparse.Namespace, folder: Path) -> tuple[dict[str, list[tuple[float, int]]], dict[int, str]]:
    """Seconds and bytes of each round, by contestant, and the bits of the journal's steps."""
    workers = {key: start(train, key, folder / key, size) for key in CONTESTANTS}
    found: dict[str, list[tuple[float, int]]] = {key: [] for key in CONTESTANTS}
    known: dict[int, str] = {}
    for _, pipe in workers.values():
        pipe.recv()
        pipe.send(WARM_UP)
        pipe.recv()
    for number in range(size.rounds):
        for key, (_, pipe) in workers.items():
            pipe.send(size.steps)
            seconds, nbytes, after = pipe.recv()
            found[key].append((seconds, nbytes))
            if key == "journal":
                known[WARM_UP + size.steps * (number + 1)] = after
    for process, pipe in workers.values():
        pipe.send(0)
        process.join()
    return found, known


def main() -> None:
    """Run it, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model: does it run at all?")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7, help="of a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    size = parser.parse_args()
    size.layers, size.width, size.heads, size.length, size.batch = (2, 64, 2, 16, 2) if size.quick else (8, 512, 8, 64, 2)
    folder = Path(tempfile.mkdtemp(prefix=".bench-journal-", dir="."))
    try:
        found, known = rounds(size, folder)
        restored = []
        for step, wanted in known.items():
            if not any((folder / "journal").glob(f"*-{step:09d}")):
                continue
            process, pipe = start(restore, folder / "journal", size, step)
            seconds, at, same = pipe.recv()
            process.join()
            assert at == step and same == wanted, f"step {step} has other bits than training had"
            restored.append({"step": step, "seconds": seconds})
        none = [seconds for seconds, _ in found["none"]]
        result: dict[str, Any] = {"machine": machine.describe(folder), "restored": restored, "contestants": {}}
        for key, each in found.items():
            ratios = [seconds / base for (seconds, _), base in zip(each, none)]
            result["contestants"][key] = {
                "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
                "bytes_a_step": statistics.median(nbytes for _, nbytes in each) / size.steps,
            }  # fmt: skip
        print(machine.line(result["machine"]))
        for key, each in result["contestants"].items():
            spread = f"{each['least']:.2f} - {each['most']:.2f}"
            print(f"{key:8} {each['ratio']:.2f} of none ({spread}), {each['bytes_a_step'] / 1e6:.1f} MB a step")
        for each in restored:
            print(f"step {each['step']} restored in {each['seconds']:.2f} s, the same bits")
        if size.json:
            Path(size.json).write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
