"""Which checkpoint is given up next: pure decisions over what the store knows.

Only checkpoints that this process committed (the root's fsync returned) or verified count as good. What an earlier life
left is unknown until it is read: it is not relied on, and not thrown away before enough good ones exist.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

GOOD, UNKNOWN, BAD = "good", "unknown", "bad"


@dataclass(frozen=True)
class Standing:
    """What is known of one committed checkpoint. ``generation`` is -1 when its record cannot be read."""

    generation: int
    parent: int | None
    trust: str


def surplus(checkpoints: Sequence[Standing], keep: int, lineage: Collection[int],
            pinned: int | None) -> Standing | None:
    """The checkpoint to give up first, or None if none may be.

    Bad ones go first, then abandoned ones (of a branch that a rollback left: not in ``lineage``), then the oldest.
    None goes if fewer than ``keep`` good ones would remain, a bad one if no good one exists at all; ``pinned``, the one
    that was loaded, does not go.
    """
    good = sum(each.trust == GOOD for each in checkpoints)
    for each in sorted(checkpoints, key=lambda c: (c.trust != BAD, c.generation in lineage, c.generation)):
        if pinned is not None and each.generation == pinned:
            continue
        needed = 1 if each.trust == BAD else keep
        if good - (each.trust == GOOD) >= needed:
            return each
    return None


def ancestors(parents: Mapping[int, int | None], generation: int) -> set[int]:
    """``generation`` and those it was trained on from, as far back as ``parents`` tells.

    Past a gap (a parent that is gone) everything counts as abandoned; that changes no decision, because whatever lies
    behind the gap is older than all before it and would go first anyway.
    """
    line: set[int] = set()
    at: int | None = generation
    while at is not None and at not in line:
        line.add(at)
        at = parents.get(at)
    return line
