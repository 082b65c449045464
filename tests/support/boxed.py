"""Stores whose tensors ranks hold in boxes, written by hand: what a job of FSDP or tensor parallelism leaves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from storing import a_record

from fxckpt.engine import crc32c
from fxckpt.store import names
from fxckpt.store.boxes import Box
from fxckpt.store.dtypes import OF_NUMPY
from fxckpt.store.files import write_laid_out
from fxckpt.store.folder import Folder
from fxckpt.store.layout import Placed, TensorSpec, lay_out, sharding_metadata
from fxckpt.store.parts import part_of
from fxckpt.store.record import FileRecord, LayerRecord, Record, TensorRecord

Place = tuple[str, str]
"""The kind of a file, and the key of a tensor in it."""


def cut_evenly(size: int, parts: int) -> list[tuple[int, int]]:
    """Offset and size of each part, as torch's ``Shard`` has them: equal ones, then a smaller one, then empty ones."""
    step = -(-size // parts)
    begins = [min(i * step, size) for i in range(parts + 1)]
    return [(begin, end - begin) for begin, end in itertools.pairwise(begins)]


def grid(shape: Sequence[int], parts: Sequence[int]) -> list[Box]:
    """The boxes of a tensor that is cut into so many parts in each dimension, in the order of a mesh's ranks."""
    cuts = [cut_evenly(size, n) for size, n in zip(shape, parts)]
    return [(tuple(at for at, _ in each), tuple(n for _, n in each)) for each in itertools.product(*cuts)]


def part_of_array(array: np.ndarray, box: Box) -> np.ndarray:
    """A box of an array."""
    return array[tuple(slice(at, at + n) for at, n in zip(*box))]


def write_boxed(
    path: Path,
    tensors: Mapping[Place, np.ndarray],
    boxes: Mapping[Place, Sequence[Box]],
    world: int = 2,
    *,
    chunk_bytes: int = 4096,
    step: int = 1,
    dtype: str | None = None,
    change: Mapping[str, object] | None = None,
    **fields: object,
) -> Path:
    """A checkpoint at ``path`` that ``world`` ranks wrote: of a tensor in ``boxes`` each its one (if
    there are so many), all others rank 0. ``dtype``: how
    the arrays are called, if not by numpy's name; ``change``: of the record of the last rank's first tensor; ``fields`` of rank
    0's record."""
    path.mkdir(parents=True)
    records = [_rank(path, rank, world, tensors, boxes, chunk_bytes, step, dtype) for rank in range(world)]
    if change is not None:
        layer = records[-1].layers[0]
        changed = dataclasses.replace(layer.tensors[0], **change), *layer.tensors[1:]
        records[-1] = dataclasses.replace(
            records[-1], layers=(dataclasses.replace(layer, tensors=changed), *records[-1].layers[1:])
        )
    listed = []
    for record in records[1:]:
        named, raw = part_of(record)
        (path / named.name).write_bytes(raw)
        listed.append(named)
    first = dataclasses.replace(records[0], parts=tuple(listed), **fields)
    (path / names.COMMIT).write_bytes(first.to_bytes())
    return path


def _rank(path, rank, world, tensors, boxes, chunk_bytes, step, dtype) -> Record:
    """Its files, and its record."""
    files, layers = [], []
    for kind in sorted({kind for kind, _ in tensors}):
        held, offsets = {}, {}
        for (_, key), whole in ((place, each) for place, each in tensors.items() if place[0] == kind):
            cut = boxes.get((kind, key))
            mine = (
                ((0,) * whole.ndim, whole.shape) if cut is None and rank == 0 else cut[rank] if cut and rank < len(cut) else None
            )
            if mine is not None:
                held[key], offsets[key] = part_of_array(whole, mine), mine[0]
        specs = [TensorSpec(key, dtype or OF_NUMPY[a.dtype.str], a.shape, 0) for key, a in held.items()]
        layout = lay_out(names.of_rank(kind, rank, world), specs, {"format": "pt", **sharding_metadata(offsets)})
        files.append(_file(path, layout, held, chunk_bytes))
        placed = {p.spec.key: p for p in layout.tensors}
        found = tuple(
            _listed(layout.name, placed[key], tensors[kind, key].shape if (kind, key) in boxes else None, offsets[key])
            for key in held
        )
        nbytes = sum(t.nbytes for t in found)
        layers.append(LayerRecord(len(layers), names.written_as(kind)[:5], "update", step, float(step), 1, nbytes, found))
    return a_record(step, tuple(files), tuple(layers), optimizers=[], state={}, world_size=world, rank=rank, parts=(),
                    store_id="boxed", generation=step)  # fmt: skip


def _file(path, layout, held, chunk_bytes) -> FileRecord:
    folder = Folder.open(str(path))
    data = (np.ascontiguousarray(held[p.spec.key]).reshape(-1).view(np.uint8).data for p in layout.tensors)
    write_laid_out(folder, layout, data)
    folder.close()
    raw = (path / layout.name).read_bytes()
    crcs = tuple(crc32c(raw[at : at + chunk_bytes]) for at in range(0, len(raw), chunk_bytes))
    return FileRecord(layout.name, len(raw), chunk_bytes, crcs)


def _listed(file: str, placed: Placed, whole: tuple[int, ...] | None, offset: tuple[int, ...]) -> TensorRecord:
    spec = placed.spec
    inside = {} if whole is None else {"whole": whole, "offset": offset}
    return TensorRecord(file, spec.key, placed.begin, placed.nbytes, spec.shape, spec.dtype, **inside)
