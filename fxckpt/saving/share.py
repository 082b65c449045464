"""Which of the tensors that all ranks have alike each of them writes.

Whole tensors are shared out by size, the largest first, to whoever has least so far. Every rank finds the same, from names and
sizes alone: ranks may differ in which layer they list a tensor (one that changed outside of a step goes with the buffers).
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fxckpt.store import names

if TYPE_CHECKING:
    from fxckpt.saving.plan import EngineLayer

Place = tuple[int, str]
"""A tensor, by the number of its file and its key there."""

FILES = (names.MODEL, names.OPTIMIZER)
OWN_FILE = len(FILES)
"""The number of the file that holds what only this rank has, if it is not rank 0."""


@dataclass(frozen=True)
class Share:
    """Of one rank of several that write each checkpoint together. ``checked``: the rank whose part it checksums as well."""

    rank: int
    world: int
    checked: int | None = None

    @property
    def files(self) -> list[str]:
        """What this rank calls its files."""
        own = [] if self.rank == 0 else [names.OWN]
        return [names.of_rank(file, self.rank, self.world) for file in (*FILES, *own)]

    @property
    def checked_files(self) -> list[str]:
        """Those of the other rank, which have the next numbers."""
        return [] if self.checked is None else [names.of_rank(file, self.checked, self.world) for file in FILES]

    def take(self, layers: Sequence[EngineLayer], buffers: Mapping[str, torch.Tensor]) -> str:
        """Have each layer note which of its tensors this rank writes; returns a digest of those that all ranks have. Those of
        ``buffers`` each rank has for itself: what a forward does to them depends on the rank's own batches."""
        alike = {(e.file, e.key): e.tensor for layer in layers for e in layer.entries if e.key not in buffers or e.file}
        everyone = {place: tensor.nbytes for place, tensor in alike.items()}
        parts = shared_out(everyone, self.world)
        mine, theirs = parts[self.rank], set[Place]() if self.checked is None else parts[self.checked]
        for layer in layers:
            places = [(e.file, e.key) for e in layer.entries]
            layer.own = [i for i, place in enumerate(places) if place in mine or place in theirs or place not in everyone]
            numbers = [self._file(place, place in theirs, place in everyone) for place in places]
            layer.entries = [e.in_file(number) for e, number in zip(layer.entries, numbers)]
        described = [[*place, str(tensor.dtype), list(tensor.shape)] for place, tensor in sorted(alike.items())]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def _file(self, place: Place, is_checked: bool, is_everyones: bool) -> int:
        """The number of the file that a tensor goes to."""
        if is_checked:
            return len(self.files) + place[0]
        return place[0] if is_everyones or self.rank == 0 else OWN_FILE


def shared_out(sizes: Mapping[Place, int], world: int) -> list[set[Place]]:
    """By rank, which of these tensors (place: bytes) it writes."""
    out: list[set[Place]] = [set() for _ in range(world)]
    least = [(0, rank) for rank in range(world)]
    for place in sorted(sizes, key=lambda each: (-sizes[each], each)):
        nbytes, rank = heapq.heappop(least)
        out[rank].add(place)
        heapq.heappush(least, (nbytes + sizes[place], rank))
    return out
