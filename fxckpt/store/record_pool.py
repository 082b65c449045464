"""The directories of the journal's records: as many as its checkpoints' are kept for, and given up with them.

A record is worth something with its checkpoint and all records between, so retention decides by checkpoints alone: records go
before the checkpoint that they build on, those on a checkpoint that is not among the newest too, and those that a rollback cut
off when the next checkpoint is durable.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable

from fxckpt.errors import NoSpace
from fxckpt.store import names
from fxckpt.store.files import space
from fxckpt.store.pool import SMALL_FILES, Pool
from fxckpt.store.retention import CheckpointStatus
from fxckpt.store.slot import Slot

log: logging.Logger = logging.getLogger("fxckpt")


def records_that_fit(root: str, keep: int, nbytes: int) -> int:
    """How many records of so many bytes on each of ``keep`` checkpoints, and on one more for a moment, the disk has space for.
    Where nothing is written, or nobody can tell, as many as anybody wants."""
    try:
        free, _ = space(root)
    except OSError:
        return sys.maxsize
    return free // ((keep + 1) * (nbytes + SMALL_FILES // 8))


class RecordPool(Pool):
    """Slots for records. Of each committed one ``CheckpointStatus.parent`` is the checkpoint that it builds on."""

    kind = names.RECORDS

    def __init__(self, root: str, keep: int, max_async: int, each: int):
        """``each``: records on a checkpoint at most."""
        super().__init__(root, keep, max_async)
        self.limit: int = (keep + 1) * each + max_async
        self._each = each
        self._longest = 0, 0  # records that were committed on the checkpoint before, and on this one so far
        self._cut: set[int] = set()  # generations that a rollback left behind

    def base_of(self, generation: int) -> int | None:
        """The checkpoint that the record of this generation builds on; None if there is no such record."""
        with self.mutex:
            return next((known.parent for known in self._committed.values() if known.generation == generation), None)

    def loaded(self, base: int | None, generation: int | None) -> None:
        """Training goes on from this record, or checkpoint: what lies behind it on the same one is cut off."""
        with self.mutex:
            known = self._committed.values()
            newer = {k.generation for k in known if k.parent == base and base is not None and k.generation > (generation or 0)}
            self._cut = newer

    def recorded(self, number: int) -> None:
        """The record of this number on its checkpoint was committed."""
        self._longest = self._longest[0], number

    def release_space(self, bases: Collection[int]) -> None:
        """A checkpoint was committed, and these are the newest: give up what builds on others, or was cut off, and remove slots
        beyond what records have taken of late: the journal may have become shorter, or there is none any more."""
        with self.moves:
            self._give_up(s for s, k in self._snapshot() if k.parent not in bases or k.generation in self._cut)
            longest, self._longest = max(self._longest), (self._longest[1], 0)
            if longest or not self._each:
                self._trim((self.keep + 1) * longest + (self.max_async if longest else 0))
        with self.mutex:
            self._cut = set()
            self.lineage.clear()  # nothing asks for it here, and it grows with each record

    def _trim(self, most: int) -> None:
        """Remove slots that wait, until there are so many at most."""
        with self.mutex:
            surplus = len(self._free) + len(self._committed) + len(self._busy) - most
            going = [self._free.pop() for _ in range(min(max(surplus, 0), len(self._free)))]
        for slot in going:
            self.remove(slot)

    def give_up_on(self, base: int) -> None:
        """This checkpoint is about to go."""
        with self.moves:
            self._give_up(slot for slot, known in self._snapshot() if known.parent == base)

    def _snapshot(self) -> list[tuple[Slot, CheckpointStatus]]:
        with self.mutex:
            return list(self._committed.items())

    def _give_up(self, slots: Iterable[Slot]) -> None:
        chosen = list(slots)
        with self.mutex:
            for slot in chosen:
                self._committed.pop(slot, None)
        self.recycle(*chosen)

    def _make_room(self) -> None:
        """One more slot may always be made: how many there are follows from the checkpoints."""

    def retain(self) -> None:
        """Checkpoints decide."""

    def _reserve(self, files: dict[str, int]) -> None:  # type: ignore[override]
        """Records come one by one, and few runs fill a disk by them: whether all would fit is looked at, no blocks are set
        aside."""
        free, _ = space(self.root)
        with self.mutex:
            there = len(self._free) + len(self._committed) + len(self._busy)
        need = max(self.limit - there, 0) * (sum(files.values()) + SMALL_FILES // 8)
        if need > free:
            raise NoSpace(
                f"{self.limit} records of a journal of {sum(files.values()):,} bytes (those on keep={self.keep} checkpoints, on "
                f"the one before them, and {self.max_async} being written) need {need:,} bytes more in {self.root}, which has "
                f"{free:,} bytes free. Make room, lower journal or keep, or name a directory on another disk"
            )
