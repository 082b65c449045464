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
    ``store`` (empty: it has none). ``beside``: digests of the stores beside which they were written. ``life``: what the life that
    begins may be called. ``error``: why it cannot say more."""

    keys: Sequence[Sequence[object]]
    damaged: int
    directory: str
    elsewhere: bool
    store: str
    beside: Sequence[str]
    life: str
    error: str


def newest_common(said: Sequence[Said], banned: Collection[Key]) -> Key | None:
    """The first key in rank 0's order that every rank has and nobody found damaged; None if there is none."""
    first, *others = [[_key(key) for key in each["keys"]] for each in said]
    held = [set(keys) for keys in others]
    return next((key for key in first if key not in banned and all(key in keys for keys in held)), None)


def _key(sent: Sequence[object]) -> Key:
    """JSON knows no tuples."""
    step, iteration, life = sent
    return int(str(step)), int(str(iteration)), str(life)


def stores_digest(stores: Sequence[str]) -> str:
    """Short for the ids of all ranks' stores, in order. A record holds it: which stores belong together."""
    return hashlib.sha256("\n".join(stores).encode()).hexdigest()[:32]


def none_was_common(said: Sequence[Said]) -> bool:
    """Is it certain that no step was ever committed on all ranks, though some have checkpoints? It is if one rank has none, as a
    store with one committed checkpoint never gives up the last; if its store is the one that it was; and if nothing is damaged.
    A store that was lost and made anew has another id than the others' records tell."""
    if any(each["damaged"] or each["error"] or each["elsewhere"] or not each["store"] for each in said):
        return False
    if all(each["keys"] for each in said):
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
