"""What each record of a run repeats of the run as a whole: where its store began, the model's configuration, how it went so far.

It lies in the record's ``state``, beside what is restored, so that it goes wherever a checkpoint is copied, and is true of the
branch that the checkpoint is of. Whoever shows it takes it as it comes: what is malformed is not shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxckpt.store.checks import is_count, is_number, is_str, list_of, map_of, optional
from fxckpt.store.names import STATE, kind_of
from fxckpt.store.record import Record
from fxckpt.store.typed_json import decode_state, encode_state

IMPORTED, ORIGIN, CONFIG, HISTORY, JOB = "imported", "origin", "config", "history", "job"
"""Members of ``state``: of an import's own record; of those that continue it; the text of ``config.json``; the past; which life
of which job of several ranks wrote it."""

ALIKE, CHECKED, DIVERGED = "alike", "checked", "diverged"
"""Where ranks write a checkpoint together: a digest of the tensors that all have; what a rank has in place of what another one
writes; which ranks were seen to differ, and in what."""

ROWS, NEWEST = 64, 32  # rows of a history at most; of these the newest stay when every second of the others goes


@dataclass(frozen=True)
class Passed:
    """A checkpoint that was committed, or a record of the ``journal``. Times in seconds since 1970; ``begun`` and ``committed``
    are None of one that was loaded: a process began there. ``written`` (bytes) and ``stall`` (seconds that training waited) are
    sums since the first one."""

    step: int
    time: float
    begun: float | None
    committed: float | None
    nbytes: int
    written: int
    stall: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    journal: bool = False

    def to_row(self) -> list[Any]:
        """As a record has it."""
        metrics = {name: encode_state(float(value), {}) for name, value in self.metrics.items()}
        row = [self.step, self.time, self.begun, self.committed, self.nbytes, self.written, self.stall, metrics]
        return [*row, True] if self.journal else row


@dataclass(frozen=True)
class Job:
    """Of several ranks, each with a store of its own. ``life``: drawn anew, the same on all ranks, whenever they agree on what to
    load. ``stores``: a digest of the ids of all ranks' stores, by which is known which belong together. ``common``: the newest
    step that was known to be committed on all ranks; None of none. ``number`` is higher than that of every life before, as far as
    the ranks knew: it orders lives where generations of several stores meet."""

    life: str = ""
    stores: str = ""
    common: int | None = None
    number: int = 0

    def to_state(self) -> dict[str, Any]:
        """The member of a record's ``state``."""
        return {JOB: dataclasses.asdict(self)}


_CHECKS = (is_count, is_number, optional(is_number), optional(is_number), is_count, is_count, is_number, map_of(lambda _: True))


class About:
    """Of one run. ``every``, ``pid`` and ``journal``, the steps from one full checkpoint to the next, are for whoever watches it.
    The thread that commits notes, another one asks, without a lock, which the handler of a signal could find taken by what it
    interrupted: what is asked for is only ever replaced."""

    def __init__(self, every: int | str, pid: int):
        self.config: str | None = None  # the model's, as JSON
        self.journal: int = 1
        self._run = {"every": every, "pid": pid}
        self._origin: Mapping[str, Any] | None = None
        self._rows: tuple[list[Any], ...] = ()
        self._last: Passed | None = None
        self._base = 0.0  # seconds of stall to be added to those of this process

    def continue_from(self, record: Record, stall: float) -> None:
        """A checkpoint was loaded, and none is in flight. ``stall``: seconds so far, of this process."""
        past = history(record)
        self._origin, self.config = origin(record), self.config or config(record)
        self._rows, self._last = tuple(each.to_row() for each in past), past[-1]
        self._base = past[-1].stall - stall

    def note(
        self, step: int, time: float, begun: float, committed: float, nbytes: int, stall: float, metrics: Any,
        journal: bool = False,
    ) -> None:  # fmt: skip
        """One more was committed. ``stall``: seconds, of this process; ``journal``: it is a record of the journal."""
        written = nbytes + (self._last.written if self._last is not None else 0)
        times = round(time, 3), round(begun, 3), round(committed, 3)
        self._last = Passed(step, *times, nbytes, written, round(self._base + stall, 4), metrics, journal)
        self._rows = _thinned((*self._rows, self._last.to_row()))

    def to_state(self) -> dict[str, Any]:
        """The members that go into a record's ``state``."""
        journal = {"journal": self.journal} if self.journal > 1 else {}
        found: dict[str, Any] = {HISTORY: {**self._run, **journal, "rows": list(self._rows)}}
        if self._origin is not None:
            found[ORIGIN] = dict(self._origin)
        if self.config is not None:
            found[CONFIG] = self.config
        return found


def _thinned(rows: tuple[list[Any], ...]) -> tuple[list[Any], ...]:
    """``ROWS`` of these at most: every second of the older ones goes, of records of the journal as long as there are any."""
    if len(rows) <= ROWS:
        return rows
    older = rows[:-NEWEST]
    records = [number for number, row in enumerate(older) if len(row) > len(_CHECKS)]
    gone = {*(records[::2] or range(1, len(older), 2))}
    return (*(row for number, row in enumerate(older) if number not in gone), *rows[-NEWEST:])


def _member(record: Record, name: str) -> Any:
    """What a record's ``state`` has under this name."""
    return record.state.get(name) if isinstance(record.state, dict) else None


def origin(record: Record) -> dict[str, Any] | None:
    """Of what its store began as an import: ``source``, ``format`` and ``time``; None if it was none."""
    for name in (IMPORTED, ORIGIN):
        found = _member(record, name)
        if isinstance(found, dict) and is_number(found.get("time")) and is_str(found.get("format")):
            try:
                source = decode_state(found.get("source"), {})
            except Exception:  # another program's
                continue
            return {"source": str(source), "format": found["format"], "time": found["time"]}
    return None


def imported(record: Record) -> dict[str, Any] | None:
    """What an import's own record says of it; None of a checkpoint that a run wrote."""
    found = _member(record, IMPORTED)
    return found if isinstance(found, dict) else None


def config(record: Record) -> str | None:
    """The text of the model's ``config.json``, if it is known."""
    found = _member(record, CONFIG)
    return found if isinstance(found, str) else None


def job(record: Record) -> Job:
    """Which life of which job wrote it; empty if its ranks agreed on nothing."""
    found = _member(record, JOB)
    found = found if isinstance(found, dict) else {}
    life, stores = (value if isinstance(value := found.get(name), str) else "" for name in ("life", "stores"))
    number = found["number"] if is_count(found.get("number")) else 0
    return Job(life, stores, found["common"] if is_count(found.get("common")) else None, number)


def known_as(record: Record) -> tuple[int, int, str]:
    """What makes checkpoints of several ranks those of one instant: step, iteration, and the life that wrote them."""
    return record.step, record.iteration, job(record).life


def order_of(record: Record) -> tuple[int, int]:
    """By which the checkpoints of one rank are older or newer, in whatever stores: their life's number, and the generation."""
    return job(record).number, record.generation


def newest_life(records: Iterable[Record]) -> int:
    """The highest number of the lives that wrote these; 0 of none."""
    return max((job(record).number for record in records), default=0)


def diverged(record: Record) -> list[tuple[int, int, list[str], list[str]]]:
    """Where replicas differed: who wrote, who had other bits, in which layers and tensors."""
    found = _member(record, DIVERGED)
    rows = found if isinstance(found, list) else []
    return [tuple(row) for row in rows if _is_difference(row)]


def _is_difference(row: Any) -> bool:
    names = list_of(is_str)
    return type(row) is list and len(row) == 4 and all(map(is_count, row[:2])) and all(map(names, row[2:]))


def watched(record: Record) -> tuple[int | str | None, int | None, int | None]:
    """``every``, the process id and ``journal`` of the run that wrote it, as far as they are known."""
    found = _member(record, HISTORY)
    found = found if isinstance(found, dict) else {}
    every, pid, journal = (found.get(name) for name in ("every", "pid", "journal"))
    known = every if is_count(every) or is_str(every) else None
    return known, pid if is_count(pid) else None, journal if isinstance(journal, int) and journal > 1 else None


def history(record: Record) -> list[Passed]:
    """The checkpoints that it continues, thinned out, and itself, oldest first."""
    found = _member(record, HISTORY)
    rows = found.get("rows") if isinstance(found, dict) else None
    past = [_passed(row) for row in rows if _is_row(row)] if isinstance(rows, list) else []
    last = past[-1] if past else Passed(0, 0.0, None, None, 0, 0, 0.0)
    nbytes = sum(file.nbytes for file in record.files if kind_of(file.name) != STATE)
    journal = record.journal is not None
    own = Passed(record.step, record.time, None, None, nbytes, last.written + nbytes, last.stall, record.metrics, journal)
    return [*(each for each in past if each.step <= record.step), own]


def _is_row(row: Any) -> bool:
    if type(row) is not list or row[len(_CHECKS) :] not in ([], [True]):
        return False
    return len(row) >= len(_CHECKS) and all(check(value) for check, value in zip(_CHECKS, row))


def _passed(row: list[Any]) -> Passed:
    """A row of a record; a metric that is no number is left out."""
    *numbers, noted = row[: len(_CHECKS)]
    metrics = {name: value for name, value in decode_state(noted, {}).items() if isinstance(value, float)}
    return dataclasses.replace(Passed(*numbers), metrics=metrics, journal=len(row) > len(_CHECKS))
