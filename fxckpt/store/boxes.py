"""Boxes of tensors: what two have in common, and which bytes of a stored one go where in memory.

A box is where it begins in its tensor and its sizes. It is stored row-major, so what two boxes have in common is a row of runs of
bytes in the file, one for each index of the dimensions in front of the last that is cut.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul

import numpy as np

from fxckpt.engine.plan import Item
from fxckpt.engine.reading import Target

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape."""

SHEET_BYTES = 64 << 10
"""Runs that are shorter than this are read with what lies between them: one long read costs less than many short ones."""

SLAB_BYTES = 16 << 20
"""What is read to be cut takes no more memory at a time, unless one row of it does."""


def common(a: Box, b: Box) -> Box | None:
    """What is in both boxes of one tensor; None if nothing is."""
    offset = tuple(map(max, a[0], b[0]))
    shape = tuple(min(at_a + n, at_b + m) - at for at_a, n, at_b, m, at in zip(*a, *b, offset))
    return (offset, shape) if all(size > 0 for size in shape) else None


def are_disjoint(boxes: Sequence[Box]) -> bool:
    """Do no two of them, sorted by offset, have anything in common?"""
    open_ones: list[Box] = []
    for box in boxes:
        # Those that ended before this one begins in the first dimension have nothing in common with any that follows.
        open_ones = [each for each in open_ones if not box[0] or each[0][0] + each[1][0] > box[0][0]]
        if any(common(each, box) for each in open_ones):
            return False
        open_ones.append(box)
    return True


def row_major(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a dense tensor."""
    return tuple(itemsize * math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@dataclass(frozen=True)
class Sheet:
    """Neighbouring bytes of a stored box, as a tensor of ``shape``, and what of them is wanted: from ``cut`` on as much as
    ``item`` has, which says where it goes. ``begin``: of the first byte, from the box's."""

    begin: int
    nbytes: int
    shape: tuple[int, ...]
    cut: tuple[int, ...]
    item: tuple[int, tuple[int, ...], tuple[int, ...]]

    @property
    def is_whole(self) -> bool:
        """Is all of it wanted?"""
        return self.shape == self.item[1]

    def target(self, begin: int) -> Target:
        """Of one that is whole, for ``read_verified``; ``begin``: of the box, in its file."""
        address, sizes, strides = self.item
        dense = strides == row_major(sizes, self.nbytes // math.prod(sizes))
        return begin + self.begin, self.nbytes, address, None if dense else sizes, None if dense else strides

    def take(self, data: np.ndarray) -> None:
        """Copy what is wanted of the sheet's bytes to where it goes."""
        address, sizes, strides = self.item
        itemsize = self.nbytes // math.prod(self.shape)
        dtype = np.dtype(f"u{itemsize}")  # of the same size: there is no numpy type for some
        span = itemsize + sum((size - 1) * stride for size, stride in zip(sizes, strides))
        memory = memoryview((ctypes.c_ubyte * span).from_address(address))
        rows = data[: self.nbytes].view(dtype).reshape(self.shape)
        np.ndarray(sizes, dtype, memory, strides=strides)[...] = rows[tuple(map(slice, self.cut, map(sum, zip(self.cut, sizes))))]


def sheets(stored: Box, wanted: Box, itemsize: int, target: Item) -> Iterator[Sheet]:
    """What to read of a stored box to fill its part of ``target``, memory of the wanted box. Nothing if they have nothing in
    common."""
    both = common(stored, wanted)
    if both is None:
        return
    address, _, given = target
    shape, sizes = stored[1], both[1]
    strides, rows = given or row_major(wanted[1], itemsize), row_major(shape, itemsize)
    first = [at - begin for at, begin in zip(both[0], stored[0])]
    address += sum((at - begin) * stride for at, begin, stride in zip(both[0], wanted[0], strides))
    outer = _outer(shape, sizes, rows)
    cut = (0, *first[outer + 1 :]) if shape else ()
    for index in itertools.product(*map(range, sizes[:outer])):
        at = sum((begin + i) * row for begin, i, row in zip(first, (*index, 0), rows))
        to = address + sum(i * stride for i, stride in zip(index, strides))
        for start, n in _slabs(sizes, rows, outer, sizes[outer + 1 :] == shape[outer + 1 :]):
            sheet = (*n, *shape[outer + 1 :])
            item = to + sum(map(mul, start, strides[outer:])), (*n, *sizes[outer + 1 :]), strides[outer:]
            yield Sheet(at + sum(map(mul, start, rows[outer:])), itemsize * math.prod(sheet), sheet, cut, item)


def _slabs(
    sizes: Sequence[int], rows: Sequence[int], dim: int, is_whole: bool
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A sheet's indices of its first dimension, begin and number: what is not wanted whole takes memory, so it goes in slabs. A
    number has none."""
    if not sizes:
        yield (), ()
        return
    step = sizes[dim] if is_whole else max(SLAB_BYTES // rows[dim], 1)
    for start in range(0, sizes[dim], step):
        yield (start,), (min(step, sizes[dim] - start),)


def _outer(shape: Sequence[int], sizes: Sequence[int], rows: Sequence[int]) -> int:
    """How many dimensions are walked index by index: as many as leave sheets that are long, up to the last that is cut."""
    last = max((dim for dim, (size, n) in enumerate(zip(sizes, shape)) if size != n), default=0)
    return max((dim for dim in range(last + 1) if dim == 0 or sizes[dim] * rows[dim] >= SHEET_BYTES), default=0)


def chunks_of(targets: Sequence[Target], chunk_bytes: int) -> list[range]:
    """The chunks of a file that hold something of the targets, which are in order of their offsets."""
    found: list[range] = []
    for offset, nbytes, *_ in targets:
        chunks = range(offset // chunk_bytes, (offset + nbytes - 1) // chunk_bytes + 1)
        if found and chunks.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, chunks.stop))
        else:
            found.append(chunks)
    return found
