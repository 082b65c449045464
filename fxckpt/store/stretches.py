"""What ranks want of a checkpoint whose tensors lie in other boxes than theirs, divided so that each byte is read once.

A file is taken in stretches of some MiB. One of the ranks that want something of a stretch reads it, and sends the others their
parts: those who want a part of each row would else read the rows, each of them.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxckpt.store.boxes import Box, common
from fxckpt.store.record import Place

STRETCH_BYTES = 4 << 20
"""Of a stretch, if no single row has more: the blocks at its ends, which are read twice, are little beside it."""


@dataclass(frozen=True)
class Stored:
    """A box of a tensor in a file, from the byte ``begin`` on."""

    place: Place
    box: Box
    begin: int
    itemsize: int


@dataclass(frozen=True)
class Share:
    """Rows of a stored box, as a box of the tensor, and what each rank wants of them."""

    place: Place
    box: Box
    nbytes: int
    wanted: tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class Stretch:
    """Neighbours in a file, which ``reader`` reads. ``nbytes`` of each rank that wants something, how many it wants."""

    reader: int
    shares: tuple[Share, ...]
    nbytes: Mapping[int, int]


def stretches(files: Iterable[Sequence[Stored]], wanted: Sequence[Mapping[Place, Box]]) -> Iterator[Stretch]:
    """All that the ranks want, in an order that is the same on each. ``wanted``: of each rank its boxes."""
    read = Counter[int]()
    of_all = {place: tuple(mine.get(place) for mine in wanted) for place in dict.fromkeys(p for mine in wanted for p in mine)}
    for file in files:
        shares: list[Share] = []
        nbytes = 0
        for share in (each for stored in sorted(file, key=lambda one: one.begin) for each in _shares(stored, of_all)):
            shares.append(share)
            nbytes += share.nbytes
            if nbytes >= STRETCH_BYTES:
                yield _stretch(shares, read)
                shares, nbytes = [], 0
        if shares:
            yield _stretch(shares, read)


def rounds(found: Iterable[Stretch], most: int) -> Iterator[list[Stretch]]:
    """So many at a time that no rank reads, or gets, more than ``most`` bytes, and one stretch."""
    now: list[Stretch] = []
    reads, gets = Counter[int](), Counter[int]()
    for stretch in found:
        now.append(stretch)
        reads[stretch.reader] += sum(each.nbytes for each in stretch.shares)
        gets.update(stretch.nbytes)
        if max(*reads.values(), *gets.values()) >= most:
            yield now
            now, reads, gets = [], Counter(), Counter()
    if now:
        yield now


def _shares(stored: Stored, of_all: Mapping[Place, tuple[Box | None, ...]]) -> Iterator[Share]:
    """A stored box by rows, without those that nobody wants."""
    hit = _hit(stored.box, of_all.get(stored.place, ()))
    for rows in _rows(stored) if hit else ():
        here = tuple((rank, both) for rank, box in hit if (both := common(rows, box)) is not None)
        if here:
            yield Share(stored.place, rows, stored.itemsize * math.prod(rows[1]), here)


@functools.lru_cache(1 << 14)
def _hit(stored: Box, boxes: tuple[Box | None, ...]) -> tuple[tuple[int, Box], ...]:
    """What each rank wants of a stored box. Tensors of one shape are mostly cut in one way."""
    found = ((rank, None if box is None else common(stored, box)) for rank, box in enumerate(boxes))
    return tuple((rank, both) for rank, both in found if both is not None)


def _rows(stored: Stored) -> Iterator[Box]:
    """A box in pieces of whole rows that are no longer than a stretch."""
    offset, shape = stored.box
    nbytes = stored.itemsize * math.prod(shape)
    if nbytes <= STRETCH_BYTES:
        yield stored.box
        return
    step = max(STRETCH_BYTES * shape[0] // nbytes, 1)
    for at in range(0, shape[0], step):
        yield (offset[0] + at, *offset[1:]), (min(step, shape[0] - at), *shape[1:])


def _stretch(shares: Sequence[Share], read: Counter[int]) -> Stretch:
    """Who reads it: of those that want about the most of it, the one who has read least."""
    nbytes = Counter[int]()
    for share in shares:
        itemsize = share.nbytes // math.prod(share.box[1])
        nbytes.update({rank: itemsize * math.prod(box[1]) for rank, box in share.wanted})
    able = [rank for rank, n in nbytes.items() if 2 * n >= max(nbytes.values())]
    reader = min(able, key=lambda rank: (read[rank], rank))
    read[reader] += sum(each.nbytes for each in shares)
    return Stretch(reader, tuple(shares), nbytes)
