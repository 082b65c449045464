"""Which of the tensors that several ranks have alike each of them writes.

Whole tensors, and parts of DTensors, are shared out by size among those that hold just the same, the largest first, to whoever
has least so far. Every rank finds the same, from names and sizes alone: ranks may differ in which layer they list a tensor (one
that changed outside of a step goes with the buffers).
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fxckpt.compat.spread import Box, box_of, is_spread, local, sharded_as
from fxckpt.store import names

Place = tuple[int, str]
"""A tensor, by the number of its file and its key there."""

FILES = (names.MODEL, names.OPTIMIZER)


class Shared(Protocol):
    """A layer of a plan: its tensors, and which of them this rank writes."""

    entries: list[Any]
    own: list[int] | None


@dataclass(frozen=True)
class Share:
    """Of one rank of several that write each checkpoint together. ``checked``: the rank whose part it checksums as well;
    ``kinds``: of the files, by their numbers."""

    rank: int
    world: int
    checked: int | None = None
    kinds: tuple[str, ...] = FILES

    @property
    def files(self) -> list[str]:
        """What this rank calls its files; the last one is of what only this rank has, if it is not rank 0."""
        own = [] if self.rank == 0 else [names.OWN]
        return [names.of_rank(file, self.rank, self.world) for file in (*self.kinds, *own)]

    @property
    def checked_files(self) -> list[str]:
        """Those of the other rank, which have the next numbers."""
        return [] if self.checked is None else [names.of_rank(file, self.checked, self.world) for file in self.kinds]

    def take(self, layers: Sequence[Shared], buffers: Collection[str]) -> tuple[str, dict[str, Any]]:
        """Have each layer note which of its tensors this rank writes; returns a digest of those that all ranks have, and which
        are whole beside DTensors: with no replica to look at them, somebody must see that they are alike. Those of
        ``buffers`` each rank has for itself, unless they are DTensors: what a forward does to them depends on its own batches."""
        entries = [e for layer in layers for e in layer.entries]
        alike = {(e.file, e.key): e.tensor for e in entries if e.key not in buffers or e.file or is_spread(e.tensor)}
        boxes = {place: box_of(tensor) for place, tensor in alike.items()}
        everyone = tuple(range(self.world))
        holders = {place: everyone if box is None else box.holders for place, box in boxes.items()}
        writers = who_writes({place: local(tensor).nbytes for place, tensor in alike.items()}, holders)
        for layer in layers:
            places = [(e.file, e.key) for e in layer.entries]
            mine = (self._writes(boxes.get(place), writers.get(place, self.rank)) for place in places)
            layer.own = [i for i, is_mine in enumerate(mine) if is_mine]
            layer.entries = [e.in_file(self._file(place, writers.get(place))) for place, e in zip(places, layer.entries)]
        described = [
            [*place, str(tensor.dtype), list(tensor.shape), sharded_as(tensor)] for place, tensor in sorted(alike.items())
        ]
        whole = {place[1]: alike[place] for place, box in boxes.items() if box is None}
        return hashlib.sha256(json.dumps(described).encode()).hexdigest(), whole if len(whole) < len(boxes) else {}

    def _writes(self, box: Box | None, writer: int) -> bool:
        """Does this rank write a tensor, or checksum it? Nobody does of a part that has no element."""
        return writer in (self.rank, self.checked) and (box is None or box.is_whole or 0 not in box.shape)

    def _file(self, place: Place, writer: int | None) -> int:
        """The number of the file that a tensor goes to. ``writer``: of what several ranks have, the one that writes it."""
        if writer is not None and writer == self.checked:
            return len(self.files) + place[0]
        return place[0] if writer is not None or self.rank == 0 else len(self.kinds)


def who_writes(sizes: Mapping[Place, int], holders: Mapping[Place, tuple[int, ...]]) -> dict[Place, int]:
    """Which rank writes each of these tensors (place: bytes), of those that hold it. Whoever holds one finds the same."""
    held: dict[tuple[int, ...], dict[Place, int]] = {}
    for place, nbytes in sizes.items():
        held.setdefault(holders[place], {})[place] = nbytes
    return {
        place: ranks[at]
        for ranks, mine in held.items()
        for at, places in enumerate(shared_out(mine, len(ranks)))
        for place in places
    }


def shared_out(sizes: Mapping[Place, int], world: int) -> list[set[Place]]:
    """By rank, which of these tensors (place: bytes) it writes."""
    out: list[set[Place]] = [set() for _ in range(world)]
    least = [(0, rank) for rank in range(world)]
    for place in sorted(sizes, key=lambda each: (-sizes[each], each)):
        nbytes, rank = heapq.heappop(least)
        out[rank].add(place)
        heapq.heappush(least, (nbytes + sizes[place], rank))
    return out
