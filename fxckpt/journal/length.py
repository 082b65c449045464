"""How many steps lie between two full checkpoints where ``journal="auto"`` leaves that to us: chosen once, from the first steps.

    bytes of a step               record + (full - record) / steps
    what a load takes longer      (steps - 1) * (record / bandwidth + update)

A longer journal has fewer bytes, and ever fewer of them to save; each of its steps may have to be made again.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from fxckpt.saving.landing import Landing

ENOUGH = 1 / 32
"""To the bytes of the records, full checkpoints are to add this share at most: 64 steps for AdamW, whose state is two more."""

SAMPLES = 8
"""Records that are durable, and steps, before anything is chosen."""


@dataclass(frozen=True)
class Measured:
    """Bytes of a full checkpoint and of a ``record``; bytes a second to the disk; seconds of a step without its waits, and of
    its update; ``room``: records on one checkpoint that the disk has space for."""

    full: int
    record: int
    bandwidth: float
    step_seconds: float
    update_seconds: float
    room: int

    @property
    def again(self) -> float:
        """Seconds that a step takes which is made again."""
        return self.record / self.bandwidth + self.update_seconds


@dataclass(frozen=True)
class Choice:
    """Steps from one full checkpoint to the next, 1 for no journal; and why so many, in words."""

    steps: int
    why: str


def choose(found: Measured, restore_seconds: float) -> Choice:
    """As few steps as have nearly all that a journal saves and as the disk keeps up with, but no more than ``load`` can make
    again in ``restore_seconds``, and than there is room for."""
    enough = math.ceil((found.full - found.record) / (found.record * ENOUGH))
    if enough <= 1:
        return Choice(1, "a record has nearly the bytes of a full checkpoint, so none are written")
    wanted = Choice(enough, "more steps would have hardly fewer bytes")
    spare = found.bandwidth * found.step_seconds - found.record  # bytes that the disk takes in a step beside its record
    if spare > 0 and (keeps_up := math.ceil((found.full - found.record) / spare)) > enough:
        wanted = Choice(keeps_up, "with fewer steps the disk would not keep up")
    restored = Choice(1 + int(restore_seconds / found.again), f"load() is to take {restore_seconds:g} s longer at most")
    fits = Choice(1 + found.room, "there is no room for more records on the disk")
    chosen = min(wanted, restored, fits, key=lambda each: each.steps)
    late = "; records alone are more than the disk keeps up with, so training will wait" if spare <= 0 else ""
    return Choice(chosen.steps, chosen.why + late)


def describe(found: Measured, choice: Choice) -> str:
    """What was chosen and why, in one line."""
    sizes = f"{found.full / 1e6:.3g} MB a full checkpoint, {found.record / 1e6:.3g} MB a record"
    speed = f"{found.bandwidth / 1e6:.4g} MB/s to the disk, {found.step_seconds:.3g} s a step"
    if choice.steps == 1:
        return f"journal='auto': a full checkpoint at every step: {choice.why} ({sizes}; {speed})"
    longest = f"load() makes {choice.steps - 1} steps again at most, in about {(choice.steps - 1) * found.again:.2g} s"
    return f"journal='auto': a full checkpoint every {choice.steps} steps: {choice.why} ({sizes}; {speed}; {longest})"


class Trial:
    """What is measured of a run until a choice can be made. ``room``: of records of so many bytes, how many on one checkpoint
    the disk has space for."""

    def __init__(self, restore_seconds: float, room: Callable[[int], int]):
        self.restore_seconds: float = restore_seconds
        self._room = room
        self._begun: deque[float] = deque(maxlen=SAMPLES + 1)  # when updates began, by a clock that stands still in waits
        self._updates: deque[float] = deque(maxlen=SAMPLES)
        self._last, self._update = 0.0, 0.0  # the last of these instants; seconds of updates since the last checkpoint
        self._fulls: deque[Landing] = deque(maxlen=SAMPLES)
        self._records: deque[Landing] = deque(maxlen=SAMPLES)

    def updated(self, before: tuple[float, float], after: tuple[float, float]) -> None:
        """An update ran between these instants, each with the seconds that training had waited by then."""
        self._last = before[0] - before[1]
        self._update += after[0] - after[1] - self._last

    def taken(self, landing: Landing, record: bool) -> None:
        """A checkpoint, or a record, is under way, with the updates since the last one."""
        self._begun.append(self._last)
        self._updates.append(self._update)
        self._update = 0.0
        (self._records if record else self._fulls).append(landing)

    def measured(self) -> Measured | None:
        """All of it, once enough steps are durable."""
        fulls, records = ([each for each in found if each.seconds > 0] for found in (self._fulls, self._records))
        if not fulls or len(records) < SAMPLES // 2 or len(self._begun) <= SAMPLES:
            return None
        record = max(each.nbytes for each in records)
        bandwidth = max(each.nbytes / each.seconds for each in (*fulls, *records))
        seconds = statistics.median(b - a for a, b in pairwise(self._begun))
        update = max(min(self._updates), 0.0)  # waits are measured by another clock
        return Measured(fulls[-1].nbytes, record, bandwidth, max(seconds, 0.0), update, self._room(record))
