"""What ranks read of a store that others wrote, over what they need, by how many bytes have a checksum.

Nothing is written: the shapes of a model say what ranks of each layout hold, with AdamW's state, all of it float32; what others
read of it is what the reader would, by its own arithmetic. A ratio is of the bytes that all of them read together and those that
they hold then. "ours" is what they do: where one would read more than 1.1 times what it needs, they read each byte once and send
each other what they want; "alone" is what they would read without that. First FSDP2 on other numbers of ranks, one of which is a
single process; then pairs of other layouts: DDP, whose ranks share whole tensors out, and FSDP2 over tensor parallelism, where
every second matrix is cut in its second dimension.

    python benchmarks/resharding.py [--json benchmarks/results/resharding.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fxckpt.loading.exchange import WORTH
from fxckpt.saving.share import who_writes
from fxckpt.store.boxes import Box, chunks_of, sheets
from fxckpt.store.layout import TensorSpec, lay_out, sum_bytes
from fxckpt.store.stretches import Stored, stretches

KIB = 1 << 10
OURS, ALONE = "ours", "alone"
SUMS = {str(kib): kib * KIB for kib in (4096, 1024, 256, 64, 16, 4)}  # in KiB; and ours, by what a rank holds
WORLDS = (1, 2, 3, 4, 8, 16, 32, 64)
STATES = ("", "exp_avg/", "exp_avg_sq/")

Shapes = dict[str, tuple[int, ...]]
File = list[tuple[str, Box, int]]
"""What lies in it: a key, its box and where that begins."""


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


ROWWISE = ("c_proj", "out", "o", "down")
"""Matrices that tensor parallelism cuts in their second dimension; the rest it cuts in the first, but for what is ``UNCUT``."""
UNCUT = ("norm", "ln", "wpe", *(f"{name}.b" for name in ROWWISE))


@dataclass(frozen=True)
class Layout:
    """So many ranks. ``sharded``: FSDP2, over groups of ``tp`` ranks of tensor parallelism; else every rank has all."""

    world: int
    sharded: bool = True
    tp: int = 1

    def __str__(self) -> str:
        if self.world == 1:
            return "one process"
        over = f" × TP {self.tp}" if self.tp > 1 else ""
        return f"FSDP2 {self.world // self.tp}{over}" if self.sharded else f"DDP {self.world}"

    def box(self, key: str, shape: tuple[int, ...], rank: int) -> Box:
        """What a rank holds of a tensor: parts are equal, then smaller, then empty."""
        offset, size = [0] * len(shape), list(shape)
        if self.sharded:
            if self.tp > 1 and (dim := _cut(key)) is not None:
                _divide(offset, size, dim, rank % self.tp, self.tp)
            _divide(offset, size, 0, rank // self.tp, self.world // self.tp)
        return tuple(offset), tuple(size)


def _cut(key: str) -> int | None:
    """The dimension in which tensor parallelism cuts a tensor, as torchtitan's plans do."""
    name = key.rpartition("/")[2]
    last = name.split(".", 2)[-1] if name.startswith("h.") else name
    return None if last.startswith(UNCUT) else int(last in ROWWISE)


def _divide(offset: list[int], size: list[int], dim: int, number: int, parts: int) -> None:
    """Keep one of so many parts of a dimension."""
    step = -(-size[dim] // parts)
    begin = min(number * step, size[dim])
    offset[dim], size[dim] = offset[dim] + begin, min(step, size[dim] - begin)


def held(shapes: Shapes, layout: Layout) -> list[dict[str, Box]]:
    """Of each rank what it holds, by key."""
    ranks = range(layout.world)
    return [{state + name: layout.box(name, shape, r) for state in STATES for name, shape in shapes.items()} for r in ranks]


def stored(shapes: Shapes, layout: Layout) -> list[tuple[File, int]]:
    """Of each rank its file, and the bytes that it holds. (Two files, one for the state, would be little else.)"""
    boxes = held(shapes, layout)
    holders: dict[tuple[str, Box], tuple[int, ...]] = {}
    for rank, mine in enumerate(boxes):
        for each in mine.items():
            holders[each] = (*holders.get(each, ()), rank)
    writers: dict[str, dict[Box, int]] = {}
    for (key, box), rank in _writers(holders).items():
        writers.setdefault(key, {})[box] = rank
    found = []
    for rank, mine in enumerate(boxes):
        own = {key: box for key, box in mine.items() if writers[key][box] == rank}
        placed = lay_out("f", [TensorSpec(key, "F32", box[1], 0) for key, box in own.items()]).tensors
        found.append(([(p.spec.key, own[p.spec.key], p.begin) for p in placed], sum(map(_bytes, mine.values()))))
    return found


def _writers(holders: dict[tuple[str, Box], tuple[int, ...]]) -> dict[tuple[str, Box], int]:
    """Who writes each box, by the rule of stores."""
    places = {(i, key): (key, box) for i, (key, box) in enumerate(holders)}
    chosen = who_writes({p: _bytes(each[1]) for p, each in places.items()}, {p: holders[each] for p, each in places.items()})
    return {places[place]: rank for place, rank in chosen.items()}


def _bytes(box: Box) -> int:
    return 4 * math.prod(box[1])


def _rows(box: Box) -> tuple[int, int]:
    return box[0][0], box[0][0] + box[1][0]


def wanted(files: list[tuple[File, int]], mine: dict[str, Box]) -> Iterator[list[tuple[int, int]]]:
    """Of each file what a rank that holds this wants of it: where that begins, and its bytes as they are read together."""
    for file, _ in files:
        found = []
        for key, box, begin in file:
            (first, last), (from_, to) = _rows(box), _rows(mine[key])
            if first < to and from_ < last:
                found += [(begin + each.begin, each.nbytes) for each in sheets(box, mine[key], 4, (0, None, None))]
        yield found


def pair(shapes: Shapes, files: list[tuple[File, int]], layout: Layout) -> dict[str, float]:
    """Bytes read over bytes needed by the ranks of a layout, for each size of what has a checksum."""
    needed, read = 0, dict.fromkeys([*SUMS, ALONE], 0)
    ours = [sum_bytes(nbytes) for _, nbytes in files]
    ranks = held(shapes, Layout(1) if not layout.sharded else layout)  # of DDP one rank stands for all
    much = False
    for mine in ranks:
        hold, before = sum(map(_bytes, mine.values())), read[ALONE]
        needed += hold
        for own, ranges in zip(ours, wanted(files, mine)):
            targets = [(begin, nbytes, 0, None, None) for begin, nbytes in ranges]
            for label, size in {**SUMS, ALONE: own}.items():
                read[label] += size * sum(map(len, chunks_of(targets, size)))
        much = much or read[ALONE] - before > WORTH * hold
    read[OURS] = sum(in_stretches(files, ranks)) if much else read[ALONE]
    return {label: total / needed for label, total in read.items()}


def in_stretches(files: list[tuple[File, int]], ranks: list[dict[str, Box]]) -> Iterator[int]:
    """Bytes read of each stretch, by the one rank that reads it."""
    kind = "f"
    asked = [{(kind, key): box for key, box in mine.items()} for mine in ranks]
    for file, nbytes in files:
        lies = {key: (box, begin) for key, box, begin in file}
        stored_ones = [Stored((kind, key), box, begin, 4) for key, box, begin in file]
        for stretch in stretches([stored_ones], asked):
            targets = []
            for share in stretch.shares:
                box, begin = lies[share.place[1]]
                row = _bytes(box) // box[1][0]
                targets.append((begin + (share.box[0][0] - box[0][0]) * row, share.nbytes, 0, None, None))
            size = sum_bytes(nbytes)
            yield size * sum(map(len, chunks_of(targets, size)))


def measure(shapes: Shapes) -> dict[str, dict[str, list[float]]]:
    """Ratios of every pair of FSDP2: by what has a checksum, then by who wrote, for each number of readers."""
    found: dict[str, dict[str, list[float]]] = {label: {} for label in [*SUMS, ALONE, OURS]}
    for writers in WORLDS:
        files = stored(shapes, Layout(writers))
        rows = [pair(shapes, files, Layout(readers)) for readers in WORLDS]
        for label, of in found.items():
            of[str(writers)] = [round(row[label], 3) for row in rows]
    return found


DDP = tuple(Layout(world, sharded=False) for world in (2, 8, 64))
MESHES = tuple(Layout(world, tp=tp) for world, tp in ((4, 2), (8, 2), (16, 4), (64, 2), (64, 8)))
SHARDED = tuple(Layout(world) for world in (2, 4, 8, 16, 64))


def between() -> list[tuple[Layout, Layout]]:
    """Pairs of other layouts, writer and reader: DDP, one process and FSDP2 over tensor parallelism, and each with FSDP2; and the
    last with each other."""
    one_way = [(a, b) for a in DDP for b in (*SHARDED, *MESHES, Layout(1))]
    one_way += [(a, b) for a in MESHES for b in (*SHARDED, Layout(1))]
    return one_way + [(b, a) for a, b in one_way] + list(itertools.permutations(MESHES, 2))


def measure_between(shapes: Shapes) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios of these pairs, with our checksums, each rank alone, and with one for each chunk: by writer, by reader."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    files: dict[Layout, list[tuple[File, int]]] = {}
    for writer, reader in between():
        files[writer] = files.get(writer) or stored(shapes, writer)
        ratios = pair(shapes, files[writer], reader)
        found.setdefault(str(writer), {})[str(reader)] = {label: round(ratios[label], 3) for label in (OURS, ALONE, "4096")}
    return found


def show(model: str, ratios: dict[str, dict[str, list[float]]]) -> None:
    """The tables on the terminal."""
    for label, rows in ratios.items():
        worst = max(ratio for row in rows.values() for ratio in row)
        each = f"of our size ({label})" if label in (OURS, ALONE) else f"of {label} KiB"
        print(f"\n{model}, checksums {each}: at most {worst:.2f}\nwritten by, read by " + "".join(f"{n:>8}" for n in WORLDS))
        for writers, row in rows.items():
            print(f"{writers:>19} " + "".join(f"{ratio:8.2f}" for ratio in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = {"GPT-2 small": gpt2(), "Llama 3 8B": llama()}
    found = {name: measure(shapes) for name, shapes in models.items()}
    others = {name: measure_between(shapes) for name, shapes in models.items()}
    for name, ratios in found.items():
        show(name, ratios)
        for writer, readers in others[name].items():
            for reader, each in readers.items():
                print(
                    f"{name}, {writer:>16} → {reader:16} {each[OURS]:.2f} (alone {each[ALONE]:.2f}; checksums of "
                    f"4096 KiB: {each['4096']:.2f})"
                )
    if args.json is not None:
        args.json.write_text(json.dumps({"worlds": WORLDS, "models": found, "between": others}) + "\n")


if __name__ == "__main__":
    main()
