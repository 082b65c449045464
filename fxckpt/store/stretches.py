"""What ranks want of a checkpoint whose tensors lie in other boxes than theirs, divided so that each byte is read once.

A file is taken in stretches of some MiB. One of the ranks that want something of a stretch reads it, and sends the others their
parts: those who want a part of each row would else read the rows, each of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxckpt.store.boxes import Box, common
from fxckpt.store.record import Place

STRETCH_BYTES = 4 << 20
"""Of a stretch, if no single row has more: the blocks at its ends, which are read twice, are little beside it. Of what several
want whole, so much for all of them together: each gets it by itself."""


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
    itemsize: int
    wanted: tuple[tuple[int, Box], ...]

    @property
    def nbytes(self) -> int:
        """Of the rows."""
        return self.itemsize * math.prod(self.box[1])

    @property
    def sent(self) -> int:
        """Bytes of what all ranks want."""
        return self.itemsize * sum(math.prod(box[1]) for _, box in self.wanted)


@dataclass(frozen=True)
class Stretch:
    """Neighbours in a file, which ``reader`` reads. ``nbytes`` of each rank that wants something, how many it wants."""

    reader: int
    shares: tuple[Share, ...]
    nbytes: Mapping[int, int]


def stretches(files: Iterable[Sequence[Stored]], wanted: Sequence[Mapping[Place, Box]]) -> Iterator[Stretch]:
    """All that ranks want, in an order that is the same on each. Files take turns: one may be wanted by few ranks, and all are
    to read at a time. ``wanted``: of each rank its boxes."""
    read, of_all = Counter[int](), _Wanted(wanted)
    left = [_runs(file, of_all) for file in files]
    while left:
        found = [(each, next(each, None)) for each in left]
        yield from (_stretch(run, read) for _, run in found if run is not None)
        left = [each for each, run in found if run is not None]


def rounds(found: Iterable[Stretch], most: int) -> Iterator[list[Stretch]]:
    """So many at a time that no rank reads, sends or gets more than ``most`` bytes, and one stretch."""
    now: list[Stretch] = []
    reads, sends, gets = Counter[int](), Counter[int](), Counter[int]()
    for stretch in found:
        now.append(stretch)
        reads[stretch.reader] += sum(each.nbytes for each in stretch.shares)
        sends[stretch.reader] += sum(stretch.nbytes.values())
        gets.update(stretch.nbytes)
        if max(*reads.values(), *sends.values(), *gets.values()) >= most:
            yield now
            now, reads, sends, gets = [], Counter(), Counter(), Counter()
    if now:
        yield now


class _Wanted:
    """What each rank wants. Tensors of one shape are mostly cut in one way, which is looked at once."""

    def __init__(self, wanted: Sequence[Mapping[Place, Box]]):
        places = dict.fromkeys(place for mine in wanted for place in mine)
        kinds: dict[tuple[Box | None, ...], int] = {}
        self._kinds = {place: kinds.setdefault(tuple(mine.get(place) for mine in wanted), len(kinds)) for place in places}
        self._boxes = list(kinds)
        self._hit: dict[tuple[int, Box], tuple[tuple[int, Box], ...]] = {}

    def of(self, stored: Stored) -> tuple[tuple[int, Box], ...]:
        """Of a stored box, by rank."""
        if (kind := self._kinds.get(stored.place)) is None:
            return ()
        if (found := self._hit.get((kind, stored.box))) is None:
            both = ((rank, box and common(stored.box, box)) for rank, box in enumerate(self._boxes[kind]))
            found = self._hit[kind, stored.box] = tuple((rank, each) for rank, each in both if each is not None)
        return found


def _runs(file: Sequence[Stored], of_all: _Wanted) -> Iterator[list[Share]]:
    """What is wanted of a file, cut into stretches."""
    shares: list[Share] = []
    nbytes = 0
    for share in (each for stored in sorted(file, key=lambda one: one.begin) for each in _shares(stored, of_all)):
        shares.append(share)
        nbytes += max(share.nbytes, share.sent)
        if nbytes >= STRETCH_BYTES:
            yield shares
            shares, nbytes = [], 0
    if shares:
        yield shares


def _shares(stored: Stored, of_all: _Wanted) -> Iterator[Share]:
    """A stored box by rows, without those that nobody wants."""
    if not (hit := of_all.of(stored)):
        return
    times = -(-sum(math.prod(box[1]) for _, box in hit) // math.prod(stored.box[1]))  # one at least
    for rows in _rows(stored, STRETCH_BYTES // times):
        here = tuple((rank, both) for rank, box in hit if (both := common(rows, box)) is not None)
        if here:
            yield Share(stored.place, rows, stored.itemsize, here)


def _rows(stored: Stored, most: int) -> Iterator[Box]:
    """A box in pieces of whole rows that have no more bytes than ``most``, if no single row has more."""
    offset, shape = stored.box
    nbytes = stored.itemsize * math.prod(shape)
    if nbytes <= most or not shape:
        yield stored.box
        return
    step = max(most * shape[0] // nbytes, 1)
    for at in range(0, shape[0], step):
        yield (offset[0] + at, *offset[1:]), (min(step, shape[0] - at), *shape[1:])


def _stretch(shares: Sequence[Share], read: Counter[int]) -> Stretch:
    """Who reads it: of those that want about the most of it, the one who has read least."""
    nbytes = Counter[int]()
    for share in shares:
        nbytes.update({rank: share.itemsize * math.prod(box[1]) for rank, box in share.wanted})
    able = [rank for rank, n in nbytes.items() if 2 * n >= max(nbytes.values())]
    reader = min(able, key=lambda rank: (read[rank], rank))
    read[reader] += sum(each.nbytes for each in shares)
    return Stretch(reader, tuple(shares), nbytes)
