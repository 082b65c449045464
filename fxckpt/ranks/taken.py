"""The parts of one checkpoint, as rank 0 takes them: it moves their files, and reads a record where what it says in short will
not do."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fxckpt.engine import io
from fxckpt.errors import Corrupt, RanksDisagree
from fxckpt.ranks.briefs import Brief
from fxckpt.ranks.words import Done
from fxckpt.store import names
from fxckpt.store.checks import MAX_BYTES
from fxckpt.store.folder import Folder
from fxckpt.store.parts import read_part
from fxckpt.store.record import Part, Record


class Taken:
    """What all ranks say of their parts, whose files lie in ``folder`` once they were moved. ``first`` is rank 0's record,
    ``done`` what each other rank said, all of them. Raises RanksDisagree where one says what no rank does."""

    def __init__(self, folder: Folder, first: Record, done: Mapping[int, Done]):
        self._folder, self._world = folder, len(done) + 1
        self._done, self._records = dict(sorted(done.items())), {0: first}
        for rank, word in self._done.items():
            if not word.brief.is_of(rank, self._world):
                files = ", ".join(word.brief.files)
                raise RanksDisagree(f"rank {rank} says that it wrote {files}: these are no files of its own")
        self.briefs: list[Brief] = [Brief.of(first), *(word.brief for word in self._done.values())]

    def _name(self, rank: int) -> str:
        """What the file of a rank's record is called."""
        return names.of_rank(names.PART, rank, self._world)

    def _files(self, rank: int) -> dict[str, int]:
        """All files of a rank's part, that of its record too, with their bytes."""
        return {**self._done[rank].brief.files, self._name(rank): self._done[rank].nbytes}

    @property
    def parts(self) -> tuple[Part, ...]:
        """How rank 0's record names those of the others."""
        return tuple(Part(self._name(rank), word.sha256) for rank, word in self._done.items())

    def move_from(self, ranks: Folder) -> dict[str, int]:
        """Take the files out of the directories below ``ranks``, and return them all with their bytes. Those of the checkpoint
        that was here before go back to the ranks, which write into them again."""
        there, moved = set(self._folder.names()), dict[str, int]()
        for rank, word in self._done.items():
            with ranks.within(names.rank_name(rank)) as own, own.within(word.entry) as given:
                for file in (files := self._files(rank)):
                    if file in there:
                        self._folder.rename(file, file + names.SPARE, given)
                    given.rename(file, file, self._folder)
            moved |= files
        return moved

    def record(self, rank: int) -> Record:
        """That of a rank's part, read the first time that it is asked for. Raises Corrupt if it is not what the rank said."""
        if rank not in self._records:
            part = Part(self._name(rank), self._done[rank].sha256)
            with self._folder.opened(part.name, os.O_RDONLY) as fd:
                if (nbytes := os.fstat(fd).st_size) > MAX_BYTES:
                    raise Corrupt(self._folder.at(part.name), f"it has {nbytes} bytes, more than any record")
                self._records[rank] = read_part(part, io.pread(fd, nbytes, 0), self._folder.at(part.name))
        return self._records[rank]

    def records(self) -> list[Record]:
        """Those of all ranks."""
        return [self.record(rank) for rank in range(self._world)]
