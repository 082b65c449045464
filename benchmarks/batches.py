"""What it costs to take batches through ``fxckpt.data`` instead of from the loader itself.

Both go over the same data set in interleaved rounds, one pass each, in alternating order; a ratio is the median over rounds of
our time divided by the loader's own in the same round. With 0 workers the data set makes nothing, so that the difference is
what we add to a batch; with workers each sample is a decoded, cropped and flipped picture (64 × 64), drawn at random, from
which all three kinds of generators move, and once the same without a draw. Passes with workers leave their start out: a first
batch is waited for before the clock runs.

    python benchmarks/batches.py [--quick] [--json benchmarks/results/batches.json]
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from contest import write
from torch.utils.data import DataLoader, Dataset

from fxckpt.data import source_of


class Nothing(Dataset):
    """Samples that cost nothing."""

    def __init__(self, n: int):
        self.sample, self.n = torch.zeros(1), n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.sample


class Pictures(Dataset):
    """Pictures inflated, cropped and flipped at random; without draws, always in the same way."""

    def __init__(self, n: int, draws: bool):
        self.pixels, self.n, self.draws = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8), n, draws

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        x, y, flip = 16, 16, 0.7
        if self.draws:
            x, y, flip = int(torch.randint(0, 32, ())), random.randrange(32), float(np.random.rand())
        picture = torch.from_numpy(self.pixels[y : y + 64, x : x + 64].copy()).permute(2, 0, 1).float().div_(255)
        picture = torch.nn.functional.interpolate(picture[None], size=96, mode="bilinear")[0]
        return picture.flip(2) if flip < 0.5 else picture


def cpu() -> float:
    """Seconds of processor time, those of workers that ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def take(begin: Callable[[], Iterator[Any]], first: int) -> tuple[float, float]:
    """Microseconds of a batch behind the first ones, by the clock; and of processor time, from the beginning of the pass to the
    end of its workers."""
    cpu_began, items = cpu(), begin()
    for _ in range(first):
        next(items)
    began = time.perf_counter()
    count = sum(1 for _ in items)
    seconds = time.perf_counter() - began
    del items
    return seconds / count * 1e6, (cpu() - cpu_began) / (count + first) * 1e6


def rounds(make: Callable[[], DataLoader], count: int, first: int) -> dict[str, Any]:
    """Both ways in turns; the medians of times and of ratios."""
    loader, source = make(), source_of(make())
    ways: dict[str, Callable[[], Iterator[Any]]] = {"plain": lambda: iter(loader), "ours": source.begin}
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for turn in range(count + 1):
        for name in ("plain", "ours") if turn % 2 else ("ours", "plain"):
            found = take(ways[name], first)
            source.finish()
            if turn:  # the first warms up
                times[name].append(found)
    pairs = list(zip(times["ours"], times["plain"]))
    return {
        "plain_us": round(statistics.median(plain for _, (plain, _) in pairs), 2),
        "added_us": round(statistics.median(ours - plain for (ours, _), (plain, _) in pairs), 2),
        "ratio": round(statistics.median(ours / plain for (ours, _), (plain, _) in pairs), 4),
        "cpu_plain_us": round(statistics.median(plain for _, (_, plain) in pairs), 1),
        "cpu_added_us": round(statistics.median(ours - plain for (_, ours), (_, plain) in pairs), 2),
        "cpu_ratio": round(statistics.median(ours / plain for (_, ours), (_, plain) in pairs), 4),
        "ratios": [round(ours / plain, 4) for (ours, _), (plain, _) in pairs],
    }


def state_seconds(loader: DataLoader) -> float:
    """Microseconds of a ``state_dict()`` in the middle of a pass."""
    source = source_of(loader)
    items = source.begin()
    next(items)
    times = []
    for _ in range(30):
        began = time.perf_counter()
        source.state_dict()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    few, many = (3, 3) if args.quick else (41, 25)
    results = {
        "0 workers, samples that cost nothing": rounds(lambda: DataLoader(Nothing(20_000), 4, shuffle=True), many, 100),
        "2 workers, pictures, drawn": rounds(lambda: DataLoader(Pictures(4000, True), 32, num_workers=2), few, 6),
        "2 workers, pictures, nothing drawn": rounds(lambda: DataLoader(Pictures(4000, False), 32, num_workers=2), few, 6),
    }
    for name, found in results.items():
        print(name + ":", ", ".join(f"{what} {found[what]}" for what in list(found)[:6]))
    states = {w: state_seconds(DataLoader(Pictures(4000, True), 32, num_workers=w)) for w in (0, 2)}
    print("state_dict():", ", ".join(f"{value} µs with {workers} workers" for workers, value in states.items()))
    if args.json:
        whole = {"machine": machine.describe(Path.cwd()), "passes": results, "state_dict_us": states}
        write(whole, args.json)


if __name__ == "__main__":
    main()
