"""Steps of the journal as whoever loads sees them: a checkpoint, and the unbroken row of records behind it; and all steps that
are durable, by either."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxckpt.errors import Corrupt
from fxckpt.store import names
from fxckpt.store.directory import local_path
from fxckpt.store.reader import Candidate, candidates, directory_of, records
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


Loadable = Candidate | Journaled
"""What a load restores: a checkpoint, or a step behind one."""


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


def durable_steps(directory: str | os.PathLike[str]) -> list[int]:
    """List the steps that ``load(step=...)`` can restore: those of checkpoints, named saves included, and those of the journal,
    which :func:`checkpoints` leaves out. Safe while a trainer writes there.

    Only records are read: what is damaged, or builds on what is missing, is left out; ``fxckpt verify`` reads everything.

    Args:
        directory: the store, as given to ``compile_step``.

    Returns:
        Each step once, in the order in which they were written: the last one is the newest that is durable. None for a directory
        that is missing or empty.

    Raises:
        NotAStore: the directory holds something else.
        SetupError: it is a URL, or names a variable that is not set.
    """
    root = local_path(directory)
    logged = records(root)  # first: what was given up meanwhile, with its checkpoint, is of no newer step than what is there now
    found = [each for each in candidates(root) if isinstance(each, Candidate)]
    both = [*found, *(each for row in journaled(found, logged) for each in row.records)]
    newest_first = sorted(both, key=lambda each: each.record.generation, reverse=True)
    return list(dict.fromkeys(each.record.step for each in newest_first))[::-1]


def step_of(each: Corrupt) -> int | None:
    """The step of a record that cannot be used, as its directory says."""
    return names.step_of(os.path.basename(directory_of(each)), names.RECORDS)
