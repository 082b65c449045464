"""Steps of the journal that ranks made on parts of tensors, made again in one process: on the parts of one rank after the other,
for a kernel may round otherwise where a tensor ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxckpt.journal.replay import Replay
from fxckpt.loading import made_again
from fxckpt.loading.apply import strides_for
from fxckpt.loading.schema import Saved, check_encoded, decode
from fxckpt.store import names
from fxckpt.store.boxes import Box
from fxckpt.store.journaled import Journaled
from fxckpt.store.parts import box_of
from fxckpt.store.reader import Reader
from fxckpt.store.record import Place, Record


def make_in_parts(found: Journaled, tensors: Mapping[Place, torch.Tensor]) -> None:
    """Make its steps, in these tensors of its checkpoint, which are whole. Raises Broken, with the tensors as they were."""
    made: list[tuple[torch.Tensor, torch.Tensor]] = []  # what becomes of which part
    for rank in range(len(found.base.record.ranks)):
        base, journal = Reader(found.base.path, rank), made_again.open_journal(found, rank)
        path = str(base.path / names.COMMIT)
        check_encoded(base.record, path)
        saved = decode(base.record, base.state_tensors(), path)
        boxes = _boxes(base.record, rank, saved)
        mine = {place: _part(tensors[place], boxes.get(place), strides) for place, strides in _updated(saved, tensors).items()}
        first = journal[0].record.journal
        assert first is not None
        Replay(base.record, saved.optimizers, mine, first.update, boxes, None).make(journal)
        made += [(_cut(tensors[place], boxes.get(place)), part) for place, part in mine.items() if place in boxes or rank == 0]
    for cut, part in made:  # now, for each rank begins with what all of them have
        cut.copy_(part)


def _updated(saved: Saved, tensors: Mapping[Place, torch.Tensor]) -> dict[Place, tuple[int, ...] | None]:
    """What the steps update, with the order of memory that this rank's part had, unless it was row-major."""
    out: dict[Place, tuple[int, ...] | None] = {}
    for index, optimizer in enumerate(saved.optimizers):
        for name in (name for group in optimizer["groups"] for name in group["params"]):
            described: Mapping[str, Any] = optimizer["state"].get(name, {"keys": [], "strides": {}})
            states = {key: (names.OPTIMIZER, names.state_key(index, key, name)) for key in described["keys"]}
            strides = described["strides"]
            same = (each for each in strides.values() if len(each) == tensors[names.MODEL, name].dim())
            out[names.MODEL, name] = next(same, None)
            out |= {place: strides.get(key) for key, place in states.items() if place in tensors}
    return out


def _boxes(base: Record, rank: int, saved: Saved) -> dict[Place, Box]:
    """Of each parameter that ranks held in parts, and of its state, the one that this rank wrote; an empty one if it wrote
    none."""
    file = names.of_rank(names.MODEL, rank, base.world_size)
    places = {tensor.place: tensor for tensor in base.tensors()}
    out: dict[Place, Box] = {}
    for tensor in (each for each in places.values() if each.pieces and each.place[0] == names.MODEL):
        nothing = tuple(0 for _ in tensor.shape)
        own = next((box_of(piece) for piece in tensor.pieces if piece.file == file), (nothing, nothing))
        out[tensor.place] = own
        for index, optimizer in enumerate(saved.optimizers):
            for key in optimizer["state"].get(tensor.key, {"keys": []})["keys"]:
                state = names.OPTIMIZER, names.state_key(index, key, tensor.key)
                if state in places and places[state].pieces:
                    out[state] = own
    return out


def _cut(tensor: torch.Tensor, box: Box | None) -> torch.Tensor:
    """The part of a tensor; without a box all of it."""
    if box is None:
        return tensor
    return tensor[tuple(slice(at, at + n) for at, n in zip(*box))]


def _part(tensor: torch.Tensor, box: Box | None, strides: tuple[int, ...] | None) -> torch.Tensor:
    """A copy of it, in that order of memory."""
    cut = _cut(tensor, box)
    return torch.empty_strided(cut.shape, strides_for(tuple(cut.shape), strides), dtype=cut.dtype).copy_(cut)
