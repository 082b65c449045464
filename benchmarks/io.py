"""How near whole checkpoints come to the disk: writing and restoring about 600 MB, checksums, syncs and commit included.

The ceiling is the best of several plain O_DIRECT loops (threads, piece size) that overwrite, or read, as many bytes of
one file. fxckpt takes ``opt.ckpt.save()`` checkpoints into recycled slots, and restores with
``fxckpt.load()``, which verifies every chunk and reads in place. Peers overwrite and sync a file, and load it after it
was dropped from the page cache. All take turns in interleaved rounds; a ratio is the median over rounds of the ceiling's
time divided by theirs, so 1.00 is the disk's own speed.

    python benchmarks/io.py [--quick] [--dir DISK] [--json benchmarks/results/io.json]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from contest import in_turn, ratios, scratch, write
from saving import Nothing, copy_in, replace_durably
from torch import nn

import fxckpt

LOOPS = [(threads, piece * machine.MIB) for threads in (1, 2, 4) for piece in (1, 4, 8)]


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    gc.collect()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def best_raw(folder: Path, size: int, write: bool) -> machine.Disk:
    """The fastest of the loops, by the best of three turns each."""
    loops = [machine.Disk(folder, size, piece, threads) for threads, piece in LOOPS]
    return max(loops, key=lambda loop: max(loop.measure(write) for _ in range(3)))


def trained(megabytes: int, step: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an AdamW whose state has about that many megabytes together."""
    width, layers = 1024, max(1, round(megabytes * 1e6 / 12 / 1024**2))
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    if step:
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Run all rounds; seconds and bytes throughout."""
    from safetensors.torch import load_file, save_file

    model, optimizer = trained(args.megabytes)
    state = Nothing().of(model, optimizer).tensors()
    size = sum(t.nbytes for t in state.values()) // (8 * machine.MIB) * (8 * machine.MIB)
    fxckpt.compile_step(
        optimizer, folder / "store", model=model, every=10**9, on_error="raise", threads=args.threads, chunk_mb=args.chunk_mb
    )
    for _ in range(4):  # every slot is written once
        optimizer.ckpt.save()
    torch_file, plain_file = folder / "torch.pt", folder / "plain.safetensors"
    raw_writer = best_raw(folder, size, True)
    writers = {
        "raw": raw_writer.measure,
        "fxckpt": optimizer.ckpt.save,
        "safetensors": lambda: replace_durably(plain_file, lambda new: save_file(state, new)),
        "torch.save": lambda: replace_durably(torch_file, lambda new: torch.save(state, new)),
    }
    times: dict[str, list[float]] = {}
    rounds(writers, args.rounds, times, "write ")
    optimizer.ckpt.shutdown()
    raw_reader = best_raw(folder, size, False)
    fresh = Fresh(folder / "store", args)
    readers = {
        "raw": lambda: raw_reader.measure(False),
        "fxckpt": fresh.load,
        "safetensors": lambda: copy_in(load_file(machine.cold(plain_file)), state),
        "torch.load": lambda: copy_in(torch.load(machine.cold(torch_file)), state),
    }
    rounds(readers, args.rounds, times, "read ", fresh.prepare)
    fresh.end()
    results = {}
    for name, mine in times.items():
        ceiling = times[name.split(" ")[0] + " raw"]
        results[name] = {"seconds": statistics.median(mine), "rounds": mine, **ratios(ceiling, mine)}
    return {
        "machine": machine.describe(folder),
        "bytes": size,
        "threads": args.threads,
        "chunk_mb": args.chunk_mb,
        "raw_write": [raw_writer.threads, raw_writer.piece // machine.MIB],
        "raw_read": [raw_reader.threads, raw_reader.piece // machine.MIB],
        "results": results,
    }


class Fresh:
    """A new model, optimizer and run for every restore, as a resumed script has them."""

    def __init__(self, store: Path, args: argparse.Namespace):
        self.store, self.args, self.optimizer = store, args, None

    def prepare(self) -> None:
        self.end()
        model, self.optimizer = trained(self.args.megabytes, step=False)
        fxckpt.compile_step(self.optimizer, self.store, model=model, every=10**9)

    def load(self) -> None:
        if fxckpt.load(optimizer=self.optimizer).skipped:
            raise AssertionError("a checkpoint did not verify")

    def end(self) -> None:
        if self.optimizer is not None:
            self.optimizer.ckpt.shutdown()
            self.optimizer = None


def rounds(
    contestants: dict[str, Callable],
    count: int,
    times: dict[str, list[float]],
    prefix: str,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Everyone once a round, another one first each time; ``prepare`` before each, untimed."""
    everyone = list(contestants.items())
    for name, run in everyone:
        prepare()
        run()
        times[prefix + name] = []
    for number in range(count):
        for name, run in in_turn(number, everyone):
            prepare()
            times[prefix + name].append(seconds(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--quick", action="store_true", help="three rounds")
    option("--rounds", type=int, default=9)
    option("--megabytes", type=int, default=600)
    option("--threads", type=int, default=2, help="fxckpt's writer threads")
    option("--chunk-mb", type=int, default=4)
    option("--dir", default=".", help="the disk to measure; needs about 4 GB")
    option("--json", help="write the numbers to this file")
    args = parser.parse_args()
    args.rounds = 3 if args.quick else args.rounds
    with scratch(args.dir) as folder:
        numbers = measure(args, folder)
    print(machine.line(numbers["machine"]))
    print(
        f"{numbers['bytes'] / 1e6:.0f} MB; best plain loops: write {numbers['raw_write']}, read {numbers['raw_read']} "
        f"(threads, MiB)\n\n{'':22}{'time':>9}{'rate':>12}{'of raw':>9}{'min':>7}{'max':>7}"
    )
    for name, found in numbers["results"].items():
        print(
            f"{name:22}{found['seconds'] * 1e3:6.0f} ms{numbers['bytes'] / found['seconds'] / 1e9:8.2f} GB/s"
            f"{found['ratio']:9.2f}{min(found['ratios']):7.2f}{max(found['ratios']):7.2f}"
        )
    write(numbers, args.json)


if __name__ == "__main__":
    main()
