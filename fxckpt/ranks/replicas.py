"""Replicas that check each other: what a rank wrote is compared with what another one has in its place.

Each rank checksums, beside the part that it writes, that of one other rank, of another one at each checkpoint. With two ranks a
difference says that they differ, with three or more who it is that differs from the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxckpt.engine import crc32c
from fxckpt.store.about import CHECKED
from fxckpt.store.layout import FileLayout
from fxckpt.store.record import FileRecord, Record


@dataclass(frozen=True)
class Difference:
    """Two ranks have other bits in these layers, or tensors. ``writer`` wrote them, ``reader`` looked at its own."""

    writer: int
    reader: int
    layers: tuple[str, ...]
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        some = ", ".join(self.tensors[:4]) + (" ..." if self.tensors[4:] else "")
        where = ", ".join(each or "(root)" for each in self.layers)
        return f"rank {self.reader} and rank {self.writer} have other bits in layer {where} ({some})"


def checksums(
    written: Sequence[FileLayout], checked: Sequence[FileLayout], crcs: Sequence[Sequence[int]], chunk_bytes: int
) -> dict[str, Any]:
    """What a rank's record says of this: how its own files are laid out, and checksums of what it has in another rank's files.
    Files that are laid out otherwise, or cut into other chunks, cannot be compared."""
    own = {file.name: _geometry(file, chunk_bytes) for file in written}
    others = {file.name: [_geometry(file, chunk_bytes), list(of_file)] for file, of_file in zip(checked, crcs)}
    return {"own": own, "others": others}


def _geometry(file: FileLayout, chunk_bytes: int) -> str:
    return f"{crc32c(file.header):08x}/{file.nbytes}/{chunk_bytes}"


def differences(ranks: Sequence[Record]) -> list[Difference]:
    """What the ranks' records say of each other's parts, where it is not the same."""
    files = {file.name: (record, file) for record in ranks for file in record.files}
    out = []
    for reader in ranks:
        for name, (geometry, crcs) in _member(reader, "others").items():
            if name not in files:
                continue
            writer, file = files[name]
            if _member(writer, "own").get(name) == geometry and (found := list(_tensors(writer, file, crcs))):
                layers, tensors = (tuple(dict.fromkeys(each)) for each in zip(*found))
                out.append(Difference(writer.rank, reader.rank, layers, tensors))
    return out


def _member(record: Record, name: str) -> Mapping[str, Any]:
    """What its checksums say."""
    found: Mapping[str, Any] = record.state.get(CHECKED, {}).get(name, {})
    return found


def _tensors(writer: Record, file: FileRecord, crcs: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(layer, tensor) in the chunks that differ."""
    chunks = [i for i, (mine, its) in enumerate(zip(file.crc32c, crcs)) if mine != its]
    for layer in writer.layers if chunks else ():
        for tensor in (each for each in layer.tensors if each.file == file.name):
            first, last = tensor.begin // file.chunk_bytes, (tensor.begin + max(tensor.nbytes, 1) - 1) // file.chunk_bytes
            if any(first <= chunk <= last for chunk in chunks):
                yield layer.name, tensor.key


class Suspects:
    """Who it is, from the differences so far: the rank that is in all of them. ``world``: of two ranks nobody can tell."""

    def __init__(self, world: int):
        self._world = world
        self._pairs: set[frozenset[int]] = set()

    def note(self, found: Sequence[Difference]) -> str:
        """What is known with these: which rank it is, or that it is not known yet."""
        self._pairs |= {frozenset((each.writer, each.reader)) for each in found}
        common = frozenset[int].intersection(*self._pairs)
        if self._world == 2:
            return "with two ranks nobody can tell which of them is right"
        if len(common) == 1:
            return f"all others that looked agree, so it is rank {next(iter(common))} that went wrong"
        return "the next checkpoints will tell which of them is right" if common else "more than one rank went wrong"
