"""Which checkpoint was trained on from which, as far back as the records tell."""

from __future__ import annotations

from fxckpt.store.record import Record
from fxckpt.store.retention import ancestors


class Lineage:
    """The generations of a store: the newest that was given out, and what each of them continues."""

    def __init__(self) -> None:
        self.newest: int = 0
        self._parents: dict[int, int | None] = {}  # of every generation whose record was there at open
        self._origins: dict[int | None, tuple[int, float] | None] = {}  # step and time of what the next may continue

    def adopt(self, record: Record) -> None:
        """Take in a checkpoint that was there at open."""
        self.newest = max(self.newest, record.generation)
        self._parents[record.generation] = record.parent
        self._origins[record.generation] = (record.step, record.time)

    def next(self) -> int:
        """A generation for a checkpoint that begins now."""
        self.newest += 1
        return self.newest

    def of(self, generation: int | None) -> set[int]:
        """This generation and those it was trained on from; none for None."""
        return ancestors(self._parents, generation)

    def origin(self, generation: int | None) -> tuple[int, float] | None:
        """Step and time (seconds since 1970) of a checkpoint that the next one continues; None: it is not known, or none."""
        return self._origins.get(generation)

    def note(self, record: Record, alive: set[int]) -> None:
        """What a checkpoint that continues this one has to know; ``alive`` are the generations that are there. A named save
        changes nothing for the ordinary ones: somebody may remove it."""
        own = (record.step, record.time)
        self._origins[record.generation] = own if record.name is None else self._origins.get(record.parent)
        alive = alive | set(self._parents) | {record.generation}
        self._origins = {each: origin for each, origin in self._origins.items() if each in alive}
