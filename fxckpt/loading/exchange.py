"""Ranks that hold other parts of tensors than those that wrote them read each byte once, and send each other what they want.

Each would otherwise read, and verify, all that has a checksum together with something that it wants: the rows of a matrix of
which tensor parallelism gives it some columns. Where that is little, each reads by itself, and nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fxckpt.compat.spread import box_of
from fxckpt.loading.apply import landed, read_tensors
from fxckpt.loading.phases import Phases
from fxckpt.saving.inventory import storable
from fxckpt.saving.plan import source_items
from fxckpt.store.boxes import Box
from fxckpt.store.names import MODEL, OPTIMIZER
from fxckpt.store.reader import Reader
from fxckpt.store.record import Place
from fxckpt.store.stretches import Share, Stretch, rounds, stretches

WORTH = 1.1
"""Times what it needs that a rank reads before they share the work."""

ROUND_BYTES = 64 << 20
"""What a rank reads, or gets, before it sends: twice that is in memory."""

_NOTHING = torch.empty(0, dtype=torch.uint8)

Send = Callable[[Sequence[torch.Tensor], Sequence[int]], list[torch.Tensor]]
"""Bytes for each rank, and how many come from each; returns those."""


def read_by_all(reader: Reader, tensors: Mapping[Place, torch.Tensor], phases: Phases) -> None:
    """``read_tensors``, by all ranks of a load together."""
    boxes = {place: (box.offset, box.shape) for place, t in tensors.items() if (box := box_of(t)) is not None}
    parts = {place: storable(tensors[place]) for place in boxes}
    much = reader.bytes_for(boxes) > WORTH * sum(each.nbytes for each in parts.values())
    if not any(phases.all(much)) or phases.group is None:
        read_tensors(reader, tensors)
        return
    wanted: list[dict[Place, Box]] = [{} for _ in range(phases.world)]
    dist.all_gather_object(wanted, boxes, phases.group)
    work = Exchange(reader, wanted, phases.rank, partial(_send, phases.group))
    for kind in (MODEL, OPTIMIZER):
        with landed({place: each for place, each in parts.items() if place[0] == kind}) as landing:
            work.run(kind, landing)
    if work.error is not None:
        raise work.error
    read_tensors(reader, {place: t for place, t in tensors.items() if place not in boxes}, whole_files=False)


def _send(group: Any, given: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Over a group of all ranks."""
    received = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(list(given)), list(sizes), [each.numel() for each in given], group)
    return list(received.split(list(sizes)))


class Exchange:
    """Of one rank. ``error``: its first, from which on it reads no more; but it goes on sending, for others wait for it."""

    def __init__(self, reader: Reader, wanted: Sequence[Mapping[Place, Box]], rank: int, send: Send):
        self.error: Exception | None = None
        self._reader, self._wanted, self._rank, self._send = reader, wanted, rank, send

    def run(self, kind: str, landing: Mapping[Place, torch.Tensor]) -> None:
        """All of the files of a kind. ``landing``: host memory of what this rank wants."""
        for each in rounds(stretches(self._reader.stored(kind), self._wanted), ROUND_BYTES):
            self._round(each, landing)

    def _round(self, stretched: Sequence[Stretch], landing: Mapping[Place, torch.Tensor]) -> None:
        """Read some, and send."""
        own = [share for each in stretched if each.reader == self._rank for share in each.shares]
        memory = [torch.zeros(share.box[1], dtype=landing[share.place].dtype) for share in own]
        self._read(own, memory)
        given: list[list[torch.Tensor]] = [[_NOTHING] for _ in self._wanted]
        for share, read in zip(own, memory):
            for rank, box in share.wanted:
                part = read[_cut(box, share.box)]
                if rank == self._rank:
                    landing[share.place][self._here(share, box)] = part
                else:
                    given[rank].append(part.contiguous().view(-1).view(torch.uint8))
        sizes = [sum(each.nbytes.get(self._rank, 0) for each in stretched if each.reader == rank) for rank in range(len(given))]
        sizes[self._rank] = 0
        received = self._send([torch.cat(each) for each in given], sizes)
        at = [0] * len(sizes)
        for share, reader, box in self._from_others(stretched):
            like = landing[share.place]
            end = at[reader] + like.element_size() * math.prod(box[1])
            part = received[reader][at[reader] : end].clone()  # cloned: as a larger type it wants another alignment
            like[self._here(share, box)] = part.view(like.dtype).view(box[1])
            at[reader] = end

    def _read(self, shares: Sequence[Share], memory: Sequence[torch.Tensor]) -> None:
        """All that this rank reads in a round."""
        if self.error is None:
            try:
                items = source_items(memory)
                self._reader.read_boxes((share.place, share.box, item) for share, item in zip(shares, items))
            except Exception as error:
                self.error = error

    def _here(self, share: Share, box: Box) -> tuple[slice, ...]:
        """Where a box belongs in this rank's."""
        return _cut(box, self._wanted[self._rank][share.place])

    def _from_others(self, stretched: Sequence[Stretch]) -> Iterator[tuple[Share, int, Box]]:
        """What comes here, in the order in which it is sent: what it is part of, from whom, and which box it is."""
        for each in stretched:
            for share in each.shares if each.reader != self._rank else ():
                for box in (box for rank, box in share.wanted if rank == self._rank):
                    yield share, each.reader, box


def _cut(box: Box, of: Box) -> tuple[slice, ...]:
    """Where a box lies in memory of a larger one."""
    return tuple(slice(at - begin, at - begin + n) for at, n, begin in zip(*box, of[0]))
