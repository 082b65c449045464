"""Replicas that check each other: what a rank wrote is compared with what another one has in its place.

Each rank checksums, beside the part that it writes, that of one other rank, of another one at each checkpoint. With two ranks a
difference says that they differ, with three or more who it is that differs from the others.
"""

from __future__ import annotations

import base64
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fxckpt.engine import crc32c
from fxckpt.engine.sums import Sums
from fxckpt.ranks.briefs import OTHERS, OWN, Brief, checked
from fxckpt.store.layout import FileLayout
from fxckpt.store.record import Record

BESIDE = "beside"
"""In what a rank says: fingerprints of what is whole beside DTensors. Where ranks hold other parts, none checksums another one's
file, and values of their own under one name (experts that no mesh knows of) would go unseen."""


def unlike(ranks: Sequence[Record]) -> list[str]:
    """Names of such tensors that are not alike on all ranks."""
    said = [checked(record, BESIDE) for record in ranks]
    return [name for name, value in said[0].items() if any(each.get(name, value) != value for each in said[1:])]


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
    written: Sequence[FileLayout], checked: Sequence[FileLayout], crcs: Sequence[Sums], chunk_bytes: int
) -> dict[str, Any]:
    """What a rank's record says of this: how its own files are laid out, and checksums of what it has in another rank's files.
    Files that are laid out otherwise, or cut into other chunks, cannot be compared."""
    own = {file.name: _geometry(file, chunk_bytes) for file in written}
    others = {file.name: [_geometry(file, chunk_bytes), _packed(of_file)] for file, of_file in zip(checked, crcs)}
    return {OWN: own, OTHERS: others}


def _packed(crcs: Sums) -> str:
    """As one text: there may be half a million."""
    return base64.b64encode(crcs).decode("ascii")


def _geometry(file: FileLayout, chunk_bytes: int) -> str:
    return f"{crc32c(file.header):08x}/{file.nbytes}/{chunk_bytes}"


@dataclass(frozen=True)
class Look:
    """A rank looked at what it has in place of a file that another one wrote: where it has other bits, a (layer, tensor) each."""

    writer: int
    reader: int
    file: str
    found: tuple[tuple[str, str], ...]


def looks(said: Sequence[Brief], record: Callable[[int], Record]) -> list[Look]:
    """What the ranks say of each other's parts, in their order. ``record``: that of a rank's part, which is asked for where two
    differ."""
    writers = {name: rank for rank, brief in enumerate(said) for name in brief.own}
    out = []
    for reader, brief in enumerate(said):
        for name, (geometry, digest) in brief.others.items():
            if (writer := writers.get(name)) is None or said[writer].own[name][0] != geometry:
                continue
            is_same = said[writer].own[name][1] == digest
            found = () if is_same else tuple(_tensors(record(writer), name, record(reader)))
            out.append(Look(writer, reader, name, found))
    return out


def differences(looked: Sequence[Look]) -> list[Difference]:
    """Where it is not the same."""
    out = []
    for look in looked:
        if look.found:
            layers, tensors = (tuple(dict.fromkeys(each)) for each in zip(*look.found))
            out.append(Difference(look.writer, look.reader, layers, tensors))
    return out


def _tensors(writer: Record, name: str, reader: Record) -> Iterator[tuple[str, str]]:
    """(layer, tensor) in the blocks of a file whose checksums differ."""
    file = next(each for each in writer.files if each.name == name)
    crcs = array("I", base64.b64decode(checked(reader, OTHERS)[name][1]))
    differ = [i for i, (mine, its) in enumerate(zip(file.crc32c, crcs)) if mine != its]
    for layer in writer.layers:
        for tensor in (each for each in layer.tensors if each.file == file.name):
            first, last = tensor.begin // file.chunk_bytes, (tensor.begin + max(tensor.nbytes, 1) - 1) // file.chunk_bytes
            if bisect_left(differ, first) < bisect_right(differ, last):
                yield layer.name, tensor.key


class Suspects:
    """Who it is, from all looks since the first difference. ``world``: of two ranks nobody can tell. Problem: what is compared is
    the writer's part, so a rank that went wrong in a tensor that another one writes differs from that one alone, and it is by
    those who looked and agree that it is known."""

    def __init__(self, world: int):
        self._world = world
        self._differ: dict[tuple[str, str], set[int]] = {}  # by (file, tensor): the readers with other bits
        self._agree: dict[tuple[str, str], set[int]] = {}
        self._writers: dict[str, int] = {}

    def note(self, looked: Sequence[Look]) -> str:
        """What is known with these: which rank it is, or that it is not known yet."""
        for look in looked:
            self._writers[look.file] = look.writer
            other = {(look.file, tensor) for _, tensor in look.found}
            for place in other:
                self._differ.setdefault(place, set()).add(look.reader)
            for place in self._differ.keys() - other:
                if place[0] == look.file:
                    self._agree.setdefault(place, set()).add(look.reader)
        if self._world == 2:
            return "with two ranks nobody can tell which of them is right"
        return self._verdict(set().union(*(self._wrong(place) for place in self._differ)))

    def _wrong(self, place: tuple[str, str]) -> set[int]:
        """Who went wrong in this tensor; nobody if that cannot be known yet."""
        differ, agree = self._differ[place], self._agree.get(place, set()) - self._differ[place]
        if agree:
            return differ
        return {self._writers[place[0]]} if len(differ) > 1 else set()

    def _verdict(self, wrong: set[int]) -> str:
        if len(wrong) > 1:
            return f"ranks {', '.join(map(str, sorted(wrong)))} went wrong"
        if wrong:
            return f"all others that looked agree, so it is rank {wrong.pop()} that went wrong"
        return "the next checkpoints will tell which of them is right"
