"""Which checkpoint continues which, and which is given up next: decisions over what the store knows.

Only checkpoints that this process committed (the root's fsync returned) or verified count as good. What an earlier life
left is unknown until it is read: it is not relied on, and not thrown away before enough good ones exist.

What stays is the union of the newest ``keep`` good ones, those that were kept for good when they were written, and the
best one by a metric. The latter two need no slot of their own as long as they are among the newest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from fxckpt.errors import SetupError
from fxckpt.store.checks import is_number
from fxckpt.store.record import MAX, MIN, MINUTES, STEPS, Record

GOOD, UNKNOWN, BAD = "good", "unknown", "bad"

KeepBest = str | tuple[str, str] | None
"""As users give it: a metric of which less is better, or (metric, "min" or "max")."""


@dataclass(frozen=True)
class Policy:
    """What is kept: the newest ``keep``; beyond them, for good, one for each ``every`` steps and one for each ``minutes`` of the
    clock; and the best by a metric, ``best`` = (its name, "min" or "max"). Raises SetupError for what cannot be meant."""

    keep: int = 2
    every: int | None = None
    minutes: float | None = None
    best: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise SetupError(f"keep_every={self.every!r}: expected a whole number of steps >= 1, or None")
        if self.minutes is not None and not (is_number(self.minutes) and self.minutes > 0):
            raise SetupError(f"keep_minutes={self.minutes!r}: expected a number of minutes above 0, or None")

    @classmethod
    def make(cls, keep: int, keep_every: int | None, keep_minutes: float | None, keep_best: KeepBest) -> Policy:
        """From the options as users give them."""
        best = (keep_best, MIN) if isinstance(keep_best, str) else None if keep_best is None else keep_best
        if best is not None:
            pair = isinstance(best, (tuple, list)) and len(best) == 2 and all(isinstance(each, str) for each in best)
            if not pair or not best[0] or best[1] not in (MIN, MAX):
                meant = 'the name of a metric of which less is better ("loss"), or a pair ("accuracy", "max")'
                raise SetupError(f"keep_best={keep_best!r}: expected {meant}")
            best = (best[0], best[1])
        return cls(keep, keep_every, keep_minutes, best)

    def lasting(self, before: tuple[int, float] | None, step: int, time: float) -> str | None:
        """Whether a checkpoint of ``step`` and ``time`` (seconds since 1970) is kept for good, and why. It is the first one
        behind a multiple of ``every`` steps or of ``minutes``, ``before`` being the step and time of the checkpoint it
        continues: so one that failed or was not due is made up for by the next, in any life and branch."""
        then_step, then = before or (0, time)
        if self.every is not None and step // self.every > then_step // self.every:
            return STEPS
        if self.minutes is not None and time // (60 * self.minutes) > then // (60 * self.minutes):
            return MINUTES
        return None

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """How bad these metrics are: the lowest score is the best; None if the metric is missing or not finite."""
        value = metrics.get(self.best[0]) if self.best is not None else None
        if self.best is None or value is None or not math.isfinite(value):
            return None
        return value if self.best[1] == MIN else -value


@dataclass(frozen=True)
class CheckpointStatus:
    """What is known of one committed checkpoint. ``generation`` is -1 when its record cannot be read. ``lasting``: it is to be
    kept for good. ``score``: by ``Policy.score``."""

    generation: int
    parent: int | None
    trust: str
    lasting: bool = False
    score: float | None = None


Statuses = Sequence[CheckpointStatus]


def surplus(checkpoints: Statuses, keep: int, lineage: Collection[int], pinned: int | None) -> CheckpointStatus | None:
    """The checkpoint to give up first, or None if none may be. Bad ones go first, then abandoned ones (of a branch that a
    rollback left: not in ``lineage``), then the oldest. None goes if fewer than ``keep`` good ones would remain, a bad one if no
    good one exists at all; ``pinned``, the one that was loaded, does not go, nor do those ``beyond`` keep."""
    good = sum(each.trust == GOOD for each in checkpoints)
    kept = newest(checkpoints, keep, lineage, pinned) + beyond(checkpoints, keep, lineage, pinned)
    stay = {each.generation for each in kept}
    for each in sorted(checkpoints, key=lambda c: (c.trust != BAD, c.generation in lineage, c.generation)):
        if pinned is not None and each.generation == pinned:
            continue
        if good >= 1 if each.trust == BAD else good >= keep and each.generation not in stay:
            return each
    return None


def newest(checkpoints: Statuses, keep: int, lineage: Collection[int], pinned: int | None) -> list[CheckpointStatus]:
    """The ``keep`` good ones that stay: the one that was loaded, then those not abandoned, then the newest."""
    good = [each for each in checkpoints if each.trust == GOOD]
    return sorted(good, key=lambda c: (c.generation == pinned, c.generation in lineage, c.generation))[-keep:]


def beyond(checkpoints: Statuses, keep: int, lineage: Collection[int], pinned: int | None) -> list[CheckpointStatus]:
    """Those that stay though they are not among the ``newest``: kept for good, or the best (of equals the older one).
    Abandoned ones too: a rollback does not make a better checkpoint worse."""
    whole = [each for each in checkpoints if each.trust != BAD]
    scored = [each for each in whole if each.score is not None]
    best = min(scored, key=lambda c: (c.score, c.generation), default=None)
    enough = {each.generation for each in newest(checkpoints, keep, lineage, pinned)}
    return [each for each in whole if (each.lasting or each is best) and each.generation not in enough]


def excess(
    checkpoints: Statuses, keep: int, lineage: Collection[int], pinned: int | None, examine: Callable[[CheckpointStatus], str]
) -> list[CheckpointStatus]:
    """All that can be given up until ``keep`` are left beside those beyond it, in order. ``examine`` reads a checkpoint of
    unknown worth and returns what it is: asked, newest first, only when the decision hangs on it."""
    gone, left = [], list(checkpoints)
    while len(left) - len(apart := beyond(left, keep, lineage, pinned)) > keep:
        chosen = surplus(left, keep, lineage, pinned)
        if chosen is not None:
            gone.append(chosen)
            left = [each for each in left if each is not chosen]
            continue
        unknown = [each for each in left if each.trust == UNKNOWN and not any(each is other for other in apart)]
        if not unknown:
            break
        next_one = max(unknown, key=lambda c: (c.generation in lineage, c.generation))
        known = dataclasses.replace(next_one, trust=examine(next_one))
        left = [known if each is next_one else each for each in left]
    return gone


def ancestors(parents: Mapping[int, int | None], generation: int | None) -> set[int]:
    """``generation`` and those it was trained on from, as far back as ``parents`` tells. Past a gap (a parent that is gone)
    all counts as abandoned; it is older than all before the gap and would go first anyway."""
    line: set[int] = set()
    while generation is not None and generation not in line:
        line.add(generation)
        generation = parents.get(generation)
    return line


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
