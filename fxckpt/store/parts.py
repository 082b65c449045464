"""The records of a checkpoint that several ranks wrote together, put together as one.

Each rank lists what it wrote in a record of its own: ``commit.json`` is rank 0's and has the SHA-256 of all others, so that it
vouches for every byte. What all ranks have (parameters, optimizer state) is in one part each; what each has for itself (buffers,
random generators, loaders) is in its own part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from fxckpt.errors import Corrupt
from fxckpt.store import names
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
    whole = dataclasses.replace(first, files=tuple(files), layers=_layers(ranks), ranks=ranks)
    if len(found := {(names.kind_of(each.file), each.key) for each in whole.tensors()}) != len(whole.tensors()):
        raise Corrupt(os.path.join(directory, names.COMMIT), f"a tensor is in two parts: {len(found)} of {len(whole.tensors())}")
    return whole


def _layers(ranks: Sequence[Record], own: int = 0) -> tuple[LayerRecord, ...]:
    """The layers of all parts, of what each rank has for itself this one's. Ranks may differ in where they list a tensor: a
    frozen one that changed goes with the buffers of those that saw it."""
    instead = {each.key for each in ranks[own].tensors() if names.written_as(each.file) == names.OWN}
    found: dict[tuple[str, str, int], list[LayerRecord]] = {}
    for rank, record in enumerate(ranks):
        seen: Counter[tuple[str, str]] = Counter()  # two optimizers may share a module, and then each has a layer of its name
        for layer in record.layers:
            tensors = tuple(each for each in layer.tensors if _is_seen(each, rank == own, instead))
            place = layer.kind, layer.name
            found.setdefault((*place, seen[place]), []).append(dataclasses.replace(layer, tensors=tensors))
            seen[place] += 1
    return tuple(_one(number, parts) for number, parts in enumerate(found.values()))


def _is_seen(tensor: TensorRecord, is_own: bool, instead: Collection[str]) -> bool:
    """Is it what all have, or this rank's own? Rank 0's own lies among what all have."""
    file = names.written_as(tensor.file)
    return is_own if file == names.OWN else file != names.MODEL or tensor.key not in instead


def _one(number: int, parts: Sequence[LayerRecord]) -> LayerRecord:
    """A layer with the tensors of all its parts."""
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return dataclasses.replace(parts[0], id=number, nbytes=sum(each.nbytes for each in tensors), tensors=tensors)


def seen_by(record: Record, rank: int) -> Record:
    """The checkpoint as this rank loads it: with its own buffers, generators and loaders. One that wrote none gets rank 0's."""
    if rank == 0 or rank >= len(record.ranks):
        return record
    own = record.ranks[rank]
    layers = _layers(record.ranks, rank)
    return dataclasses.replace(record, layers=layers, rank=rank, optimizers=own.optimizers, state=own.state)
