"""Which checkpoint all ranks start from, by what each of them says that it has: decisions, without a message."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import TypedDict

Key = tuple[int, int, str]
"""What makes two ranks' checkpoints one of the job: step, iteration, and the life that wrote it (all ranks of a life began
together)."""


class Said(TypedDict):
    """What one rank says when a load begins. ``keys``: its checkpoints in the order in which it would load them. ``damaged``: how
    many more have a record that cannot be read. ``elsewhere``: they lie in another store than the run's own, whose id is
    ``store`` (empty: it has none). ``beside``: digests of the stores beside which they were written. ``common``: a step that all
    ranks have was known when one of them was written. ``life``: what the life that begins may be called. ``error``: why it cannot
    say more."""

    keys: Sequence[Sequence[object]]
    damaged: int
    directory: str
    elsewhere: bool
    store: str
    beside: Sequence[str]
    common: bool
    life: str
    error: str


def newest_common(said: Sequence[Said], banned: Collection[Key]) -> Key | None:
    """The first key in rank 0's order that every rank has and nobody found damaged; None if there is none."""
    first, *others = [[key_of(key) for key in each["keys"]] for each in said]
    held = [set(keys) for keys in others]
    return next((key for key in first if key not in banned and all(key in keys for keys in held)), None)


def key_of(sent: Sequence[object]) -> Key:
    """A key as it came in JSON, which knows no tuples."""
    step, iteration, life = sent
    return int(str(step)), int(str(iteration)), str(life)


def stores_digest(stores: Sequence[str]) -> str:
    """Short for the ids of all ranks' stores, in order. A record holds it: which stores belong together."""
    return hashlib.sha256("\n".join(stores).encode()).hexdigest()[:32]


def none_was_common(said: Sequence[Said]) -> bool:
    """Is it certain that no step was ever common to all ranks, though some have checkpoints? A common one is never given up
    (``common.py``). So it is, unless a record tells of one, something is damaged, or a store was lost: one that was made anew has
    another id than the others' records tell."""
    if any(each["damaged"] or each["error"] or each["elsewhere"] or each["common"] or not each["store"] for each in said):
        return False
    together = stores_digest([each["store"] for each in said])
    return all(set(each["beside"]) <= {together} for each in said)


def described(said: Sequence[Said]) -> str:
    """What each rank has, a line a rank, for a message."""
    return "".join(f"\n  rank {rank}: {_one(each)}" for rank, each in enumerate(said))


def _one(each: Said) -> str:
    """What one rank has."""
    if each["error"]:
        return each["error"]
    steps = ", ".join(str(key[0]) for key in each["keys"]) or "none"
    return f"steps {steps} in {each['directory']}" + (f", {each['damaged']} damaged" if each["damaged"] else "")
