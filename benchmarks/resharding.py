"""What ranks read of a store that another number of ranks wrote, over what they need, by how many bytes have a checksum.

Nothing is written: the shapes of a model say where ranks of FSDP2, which hold each tensor cut in its first dimension, put their
boxes with AdamW's state, all of it float32; what another number of ranks reads of them is what the reader would, by its own
arithmetic. A ratio is of the bytes that all of them read together and those that they hold then.

    python benchmarks/resharding.py [--json benchmarks/results/resharding.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from fxckpt.saving.plan import sum_bytes
from fxckpt.store.boxes import Box, chunks_of, sheets
from fxckpt.store.layout import TensorSpec, lay_out

KIB = 1 << 10
OURS = "ours"
SUMS = {str(kib): kib * KIB for kib in (4096, 1024, 256, 64, 16, 4)}  # in KiB; and ours, by what a rank holds
WORLDS = (1, 2, 4, 8, 16, 32, 64)
STATES = ("", "exp_avg/", "exp_avg_sq/")

Shapes = dict[str, tuple[int, ...]]


def gpt2() -> Shapes:
    """GPT-2 small: 124M parameters in 148 tensors, two thirds of which are vectors."""
    block: Shapes = {"c_attn": (2304, 768), "c_proj": (768, 768), "c_fc": (3072, 768), "out": (768, 3072)}
    block |= {f"{name}.b": shape[:1] for name, shape in block.items()}
    block |= {"ln_1": (768,), "ln_1.b": (768,), "ln_2": (768,), "ln_2.b": (768,)}
    return {"wte": (50257, 768), "wpe": (1024, 768), **_blocks(12, block), "ln_f": (768,), "ln_f.b": (768,)}


def llama() -> Shapes:
    """Llama 3 of 8B parameters, in 291 tensors."""
    block = {"norm_1": (4096,), "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "norm_2": (4096,),
             "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}  # fmt: skip
    return {"embed": (128256, 4096), **_blocks(32, block), "norm": (4096,), "head": (128256, 4096)}


def _blocks(n: int, block: Shapes) -> Shapes:
    return {f"h.{i}.{name}": shape for i in range(n) for name, shape in block.items()}


def boxes_of(shape: tuple[int, ...], world: int) -> list[Box]:
    """What each of so many ranks holds: equal parts of the first dimension, then a smaller one, then nothing."""
    step = -(-shape[0] // world)
    begins = [min(rank * step, shape[0]) for rank in range(world + 1)]
    zeros = (0,) * (len(shape) - 1)
    return [((begin, *zeros), (end - begin, *shape[1:])) for begin, end in itertools.pairwise(begins)]


def stored(shapes: Shapes, world: int) -> list[list[tuple[str, Box, int]]]:
    """Of each rank its boxes, and where they begin in its files. (Two files, one for the state, would be little else.)"""
    found = []
    for rank in range(world):
        mine = {state + name: boxes_of(shape, world)[rank] for state in STATES for name, shape in shapes.items()}
        placed = lay_out("f", [TensorSpec(key, "F32", box[1], 0) for key, box in mine.items()]).tensors
        found.append([(p.spec.key, mine[p.spec.key], p.begin) for p in placed])
    return found


def wanted(shapes: Shapes, files: list[list[tuple[str, Box, int]]], rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
    """Of each file what one of so many ranks wants of it: where that begins, and its bytes."""
    mine = {state + name: boxes_of(shape, world)[rank] for state in STATES for name, shape in shapes.items()}
    for file in files:
        found = [(begin, sheet) for key, box, begin in file for sheet in sheets(box, mine[key], 4, (0, None, None))]
        yield [(begin + sheet.begin, sheet.nbytes) for begin, sheet in found]


def pair(shapes: Shapes, files: list[list[tuple[str, Box, int]]], world: int) -> dict[str, float]:
    """Bytes read over bytes needed by so many ranks, for each size of what has a checksum."""
    needed, read = 0, dict.fromkeys([*SUMS, OURS], 0)
    ours = [sum_bytes(sum(4 * math.prod(shape) for _, (_, shape), _ in file)) for file in files]
    for rank in range(world):
        for own, ranges in zip(ours, wanted(shapes, files, rank, world)):
            needed += sum(nbytes for _, nbytes in ranges)
            targets = [(begin, nbytes, 0, None, None) for begin, nbytes in ranges]
            for label, size in {**SUMS, OURS: own}.items():
                read[label] += size * sum(map(len, chunks_of(targets, size)))
    return {label: total / needed for label, total in read.items()}


def measure(shapes: Shapes) -> dict[str, dict[str, list[float]]]:
    """Ratios of every pair: by what has a checksum, then by who wrote, for each number of readers."""
    found: dict[str, dict[str, list[float]]] = {label: {} for label in [*SUMS, OURS]}
    for writers in WORLDS:
        files = stored(shapes, writers)
        rows = [pair(shapes, files, readers) for readers in WORLDS]
        for label, of in found.items():
            of[str(writers)] = [round(row[label], 3) for row in rows]
    return found


def show(model: str, ratios: dict[str, dict[str, list[float]]]) -> None:
    """The tables on the terminal."""
    for label, rows in ratios.items():
        worst = max(ratio for row in rows.values() for ratio in row)
        each = "of our size" if label == OURS else f"of {label} KiB"
        print(f"\n{model}, checksums {each}: at most {worst:.2f}\nwritten by, read by " + "".join(f"{n:>8}" for n in WORLDS))
        for writers, row in rows.items():
            print(f"{writers:>19} " + "".join(f"{ratio:8.2f}" for ratio in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = {"GPT-2 small": gpt2(), "Llama 3 8B": llama()}
    found = {name: measure(shapes) for name, shapes in models.items()}
    for name, ratios in found.items():
        show(name, ratios)
    if args.json is not None:
        args.json.write_text(json.dumps({"worlds": WORLDS, "models": found}) + "\n")


if __name__ == "__main__":
    main()
