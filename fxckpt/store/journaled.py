"""Steps of the journal as whoever loads sees them: a checkpoint, and the unbroken row of records behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxckpt.errors import Corrupt
from fxckpt.store import names
from fxckpt.store.reader import Candidate, directory_of
from fxckpt.store.record import Record


@dataclass(frozen=True)
class Journaled:
    """The step of its last record. ``records``: one at least, in order, each on the one before it, the first on ``base``."""

    base: Candidate
    records: tuple[Candidate, ...]

    @property
    def path(self) -> Path:
        """The directory of the last record."""
        return self.records[-1].path

    @property
    def record(self) -> Record:
        """The last one."""
        return self.records[-1].record

    def steps(self) -> Iterator[Journaled]:
        """Of each of its records, in order, the row up to it."""
        return (Journaled(self.base, self.records[:count]) for count in range(1, len(self.records) + 1))

    def cut(self, count: int) -> Journaled | None:
        """With its first records only; None without any."""
        return Journaled(self.base, self.records[:count]) if count > 0 else None


class Broken(Exception):
    """A step of a journal cannot be had: the first ``good`` records are not concerned, and ``error`` says what is wrong
    behind."""

    def __init__(self, good: int, error: Corrupt):
        super().__init__(str(error))
        self.good: int = good
        self.error: Corrupt = error


def journaled(found: Sequence[Candidate | Corrupt], records: Sequence[Candidate | Corrupt]) -> list[Journaled]:
    """Of each checkpoint with records behind it all of these, as far as none is missing."""
    bases = [each for each in found if isinstance(each, Candidate)]
    rows = [(base, tuple(_row(base.record.generation, records))) for base in bases]
    return [Journaled(base, row) for base, row in rows if row]


def _row(base: int, records: Sequence[Candidate | Corrupt]) -> Iterator[Candidate]:
    """The records on this checkpoint, in order, up to the first that is missing."""
    after: dict[int, Candidate] = {}
    for each in records:
        if isinstance(each, Candidate) and (journal := each.record.journal) is not None and journal.base == base:
            after.setdefault(journal.after, each)  # newest first
    generation, number = base, 1
    while (found := after.get(generation)) is not None and found.record.journal is not None:
        if found.record.journal.number != number:
            return
        yield found
        generation, number = found.record.generation, number + 1


def cut_off(rows: Sequence[Journaled], records: Sequence[Candidate | Corrupt]) -> list[Corrupt]:
    """What of the records no step can be made with, newest first: damaged ones, and those behind one that is missing."""
    reached = {each.path for row in rows for each in row.records}
    out = []
    for each in records:
        if isinstance(each, Corrupt):
            out.append(each)
        elif each.path not in reached and (journal := each.record.journal) is not None:
            what = f"what it builds on is missing: record {journal.number} on the checkpoint of generation {journal.base}"
            out.append(Corrupt(each.path / names.COMMIT, what))
    return out


def step_of(each: Corrupt) -> int | None:
    """The step of a record that cannot be used, as its directory says."""
    return names.step_of(os.path.basename(directory_of(each)), names.RECORDS)
