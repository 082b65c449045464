"""The records of a checkpoint that several ranks wrote together, put together as one.

Each rank lists what it wrote in a record of its own: ``commit.json`` is rank 0's and has the SHA-256 of all others, so that it
vouches for every byte. What all ranks have (parameters, optimizer state) is in one part each, or a box of it in
each; what each has for itself (buffers, random generators, loaders) is in its own part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from fxckpt.errors import Corrupt
from fxckpt.store import names
from fxckpt.store.boxes import Box, are_disjoint
from fxckpt.store.checks import Malformed, need
from fxckpt.store.dtypes import item_size
from fxckpt.store.record import LayerRecord, Part, Record, TensorRecord


def part_of(record: Record) -> tuple[Part, bytes]:
    """How rank 0's record names that of another rank, and the content of its file."""
    raw = record.to_bytes()
    return Part(names.of_rank(names.PART, record.rank, record.world_size), hashlib.sha256(raw).hexdigest()), raw


def read_part(part: Part, raw: bytes, path: str) -> Record:
    """The record in the file ``path``. Raises ``Corrupt`` if it is not the one that rank 0's record names."""
    if (found := hashlib.sha256(raw).hexdigest()) != part.sha256:
        raise Corrupt(path, f"its SHA-256 is {found}, not the {part.sha256} that {names.COMMIT} says")
    record = Record.from_bytes(raw, path)
    if record.parts != () or names.of_rank(names.PART, record.rank, record.world_size) != part.name:
        raise Corrupt(path, "it is not the record of this rank's part")
    return record


def joined(first: Record, directory: str, read: Callable[[str], bytes]) -> Record:
    """All of a checkpoint, from rank 0's record: every file, every layer with its tensors from all parts, and what rank 0 has for
    itself. ``read`` gives the content of a file. Raises ``Corrupt``."""
    if not first.parts:
        return first
    paths = [os.path.join(directory, part.name) for part in first.parts]
    ranks = (first, *(read_part(part, read(path), path) for part, path in zip(first.parts, paths)))
    files = [file for record in ranks for file in record.files]
    if len({file.name for file in files}) != len(files):
        raise Corrupt(os.path.join(directory, names.COMMIT), "two ranks list one file")
    whole = dataclasses.replace(first, files=tuple(files), layers=_layers(ranks, directory), ranks=ranks)
    if len(found := {each.place for each in whole.tensors()}) != len(whole.tensors()):
        raise Corrupt(os.path.join(directory, names.COMMIT), f"a tensor is in two parts: {len(found)} of {len(whole.tensors())}")
    return whole


def _layers(ranks: Sequence[Record], directory: str, own: int = 0) -> tuple[LayerRecord, ...]:
    """``layers_of``; raises ``Corrupt``."""
    try:
        return layers_of(ranks, own)
    except Malformed as error:
        raise Corrupt(os.path.join(directory, names.COMMIT), str(error)) from error


def layers_of(ranks: Sequence[Record], own: int = 0) -> tuple[LayerRecord, ...]:
    """The layers of all parts, of what each rank has for itself this one's. Ranks may differ in where they list a tensor: a
    frozen one that changed goes with the buffers of those that saw it. Raises ``Malformed`` if boxes make no tensor."""
    instead = {each.key for each in ranks[own].tensors() if names.written_as(each.file) == names.OWN}
    found: dict[tuple[str, str, int], list[LayerRecord]] = {}
    boxes: dict[tuple[str, str], list[TensorRecord]] = {}
    for rank, record in enumerate(ranks):
        seen: Counter[tuple[str, str]] = Counter()  # two optimizers may share a module, and then each has a layer of its name
        for layer in record.layers:
            tensors = tuple(each for each in layer.tensors if _is_seen(each, rank == own, instead))
            for each in (each for each in tensors if each.whole is not None):
                boxes.setdefault(each.place, []).append(each)
            place = layer.kind, layer.name
            found.setdefault((*place, seen[place]), []).append(dataclasses.replace(layer, tensors=tensors))
            seen[place] += 1
    wholes = {place: _put_together(each) for place, each in boxes.items()}
    return tuple(_one(number, parts, wholes) for number, parts in enumerate(found.values()))


def _is_seen(tensor: TensorRecord, is_own: bool, instead: Collection[str]) -> bool:
    """Is it what all have, or this rank's own? Rank 0's own lies among what all have."""
    file = names.written_as(tensor.file)
    return is_own if file == names.OWN else file != names.MODEL or tensor.key not in instead


def _one(number: int, parts: Sequence[LayerRecord], wholes: dict[tuple[str, str], TensorRecord]) -> LayerRecord:
    """A layer with the tensors of all its parts. Where there is a box of one first, it is put together, out of ``wholes``."""
    found = (tensor for part in parts for tensor in part.tensors)
    whole = (tensor if tensor.whole is None else wholes.pop(tensor.place, None) for tensor in found)
    tensors = tuple(tensor for tensor in whole if tensor is not None)
    return dataclasses.replace(parts[0], id=number, nbytes=sum(each.nbytes for each in tensors), tensors=tensors)


def _put_together(boxes: Sequence[TensorRecord]) -> TensorRecord:
    """The tensor that these are the boxes of: they must cover all of it, once. Raises ``Malformed``."""
    first = boxes[0]
    what, whole = f"tensor {first.key!r}", first.whole
    assert whole is not None
    need(all((each.whole, each.dtype) == (whole, first.dtype) for each in boxes), f"{what} has other shapes or types in parts")
    pieces = sorted((each for each in boxes if each.nbytes), key=lambda each: each.offset or ())
    nbytes = math.prod(whole) * item_size(first.dtype)
    need(sum(each.nbytes for each in pieces) == nbytes and are_disjoint([box_of(each) for each in pieces]),
         f"the parts of {what} are not all of it, each once")  # fmt: skip
    first = pieces[0] if pieces else first
    pieces = [] if first.shape == whole else pieces  # it is in one part
    return TensorRecord(first.file, first.key, first.begin, nbytes, whole, first.dtype, pieces=tuple(pieces))


def box_of(tensor: TensorRecord) -> Box:
    """Where in its tensor it lies; a tensor itself begins at 0."""
    return tensor.offset or (0,) * len(tensor.shape), tensor.shape


def seen_by(record: Record, rank: int, directory: str = "") -> Record:
    """The checkpoint as this rank loads it: with its own buffers, generators and loaders, and of a record of the journal what it
    made its step with. One that wrote none gets rank 0's. ``directory``: for the error. Raises ``Corrupt`` if what it sees is not
    whole."""
    if rank == 0 or rank >= len(record.ranks):
        return record
    own = record.ranks[rank]
    layers = _layers(record.ranks, directory, rank)
    return dataclasses.replace(record, layers=layers, rank=rank, optimizers=own.optimizers, state=own.state,
                               journal=own.journal)  # fmt: skip
