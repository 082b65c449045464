"""Ranks that hold other parts of tensors than those that wrote them read each byte once, and send each other what they want.

Each would otherwise read, and verify, all that has a checksum together with something that it wants: the rows of a matrix of
which tensor parallelism gives it some columns. Where that is little, each reads by itself, and nothing is sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist

from fxckpt.loading.apply import boxes_of, landed, read_tensors
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
"""What a rank reads, sends or gets at a time: three times that is in memory."""

Send = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]
"""Bytes for all ranks, one after the other, how many are for each, and how many come from each; returns those."""


def is_worth_it(reader: Reader, tensors: Mapping[Place, torch.Tensor], phases: Phases) -> bool:
    """Shall all ranks of a load share the work of reading these? A phase of its own."""
    boxes = boxes_of(tensors)
    much = reader.bytes_for(boxes) > WORTH * sum(storable(tensors[place]).nbytes for place in boxes)
    return any(phases.all(much)) and phases.group is not None


def read_by_all(reader: Reader, tensors: Mapping[Place, torch.Tensor], phases: Phases) -> None:
    """``read_tensors``, by all ranks of a load together."""
    boxes = boxes_of(tensors)
    wanted: list[dict[Place, Box]] = [{} for _ in range(phases.world)]
    dist.all_gather_object(wanted, boxes, phases.group)
    work = Exchange(reader, wanted, phases.rank, partial(_send, phases))
    for kind in (MODEL, OPTIMIZER):
        with landed({place: storable(tensors[place]) for place in boxes if place[0] == kind}) as landing:
            work.run(kind, landing)
    read_tensors(reader, {place: t for place, t in tensors.items() if place not in boxes}, whole_files=False)


def _send(phases: Phases, given: torch.Tensor, out: Sequence[int], back: Sequence[int]) -> torch.Tensor:
    """To all ranks, a phase of its own: they meet in the collective once each has read what it sends."""
    received = torch.empty(sum(back), dtype=torch.uint8, device="cpu")
    phases.all()
    dist.all_to_all_single(received, given, list(back), list(out), phases.group)
    return received


class Exchange:
    """Of one rank. ``wanted``: of each rank its boxes. What it raises it raises before it sends."""

    def __init__(self, reader: Reader, wanted: Sequence[Mapping[Place, Box]], rank: int, send: Send):
        self._reader, self._wanted, self._rank, self._send = reader, wanted, rank, send

    def run(self, kind: str, landing: Mapping[Place, torch.Tensor]) -> None:
        """All of the files of a kind. ``landing``: host memory of what this rank wants."""
        for each in rounds(stretches(self._reader.stored(kind), self._wanted), ROUND_BYTES):
            self._round(each, landing)

    def _round(self, stretched: Sequence[Stretch], landing: Mapping[Place, torch.Tensor]) -> None:
        """Read some, and send, to this rank itself as well."""
        world = range(len(self._wanted))
        out = [sum(each.nbytes.get(rank, 0) for each in stretched if each.reader == self._rank) for rank in world]
        back = [sum(each.nbytes.get(self._rank, 0) for each in stretched if each.reader == rank) for rank in world]
        received = self._send(self._given(stretched, out), out, back)
        at = [0, *itertools.accumulate(back)]
        for share, reader, box in self._wanted_here(stretched):
            like = landing[share.place]
            end = at[reader] + like.element_size() * math.prod(box[1])
            part = received[at[reader] : end].clone()  # cloned: as a larger type it wants another alignment
            like[_cut(box, self._wanted[self._rank][share.place])] = part.view(like.dtype).view(box[1])
            at[reader] = end

    def _given(self, stretched: Sequence[Stretch], out: Sequence[int]) -> torch.Tensor:
        """All that this rank reads in a round, rank by rank. It may have no such tensor itself, so that these are bytes."""
        shares = [share for each in stretched if each.reader == self._rank for share in each.shares]
        memory = [torch.empty(*share.box[1], share.itemsize, dtype=torch.uint8, device="cpu") for share in shares]
        self._reader.read_boxes((share.place, share.box, item) for share, item in zip(shares, source_items(memory)))
        given, at = torch.empty(sum(out), dtype=torch.uint8, device="cpu"), [0, *itertools.accumulate(out)]
        for share, read in zip(shares, memory):
            for rank, box in share.wanted:
                part = read[_cut(box, share.box)]
                end = at[rank] + part.numel()
                given[at[rank] : end].view(part.shape).copy_(part)
                at[rank] = end
        return given

    def _wanted_here(self, stretched: Sequence[Stretch]) -> Iterator[tuple[Share, int, Box]]:
        """What comes here, in the order in which it is sent: what it is part of, from whom, and which box it is."""
        for each in stretched:
            for share in each.shares:
                mine = (box for rank, box in share.wanted if rank == self._rank)
                yield from ((share, each.reader, box) for box in mine)


def _cut(box: Box, of: Box) -> tuple[slice, ...]:
    """Where a box lies in memory of a larger one."""
    return tuple(slice(at - begin, at - begin + n) for at, n, begin in zip(*box, of[0]))
