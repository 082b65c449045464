"""Which checkpoint all ranks start from, by what each of them says that it has: decisions, without a message."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, TypedDict

Key = tuple[int, int, str]
"""What makes two ranks' checkpoints one of the job: step, iteration, and the life that wrote it (all ranks of a life began
together)."""


COMPLETE = 2
"""Steps of which every rank has a replica, and that stay."""


class Kept(NamedTuple):
    """A checkpoint on some rank's disk, its own or a replica: whose it is, and what orders it among others of that rank.
    ``amid``: it was saved amid an iteration; ``number``: of the life that wrote it."""

    rank: int
    step: int
    iteration: int
    life: str
    amid: bool
    number: int
    generation: int

    @property
    def key(self) -> Key:
        """By which it is known on all ranks."""
        return self.step, self.iteration, self.life


class Said(TypedDict):
    """What one rank says when a load begins. ``keys``: its checkpoints in the order in which it would load them. ``kept``: with
    replicas, all that lies on its disk, whosever it is. ``damaged``: how many more have a record that cannot be read.
    ``elsewhere``: they lie in another store than the run's own, whose id is ``store`` (empty: it has none). ``at_stake``: what
    it has in memory has some value. ``beside``: digests of the stores beside which they were written. ``common``: a step that
    all ranks have was known when one of them was written. ``life``: what the life that begins may be called; ``number``: that of
    the last one it knows of. ``error``: why it cannot say more."""

    keys: Sequence[Sequence[object]]
    kept: Sequence[Sequence[object]]
    damaged: int
    directory: str
    elsewhere: bool
    at_stake: bool
    store: str
    beside: Sequence[str]
    common: bool
    life: str
    number: int
    error: str


def newest_common(said: Sequence[Said], banned: Collection[Key]) -> Key | None:
    """The first key in rank 0's order that every rank has, by itself or as a replica somewhere, and nobody found damaged; None if
    there is none."""
    first, *others = [available(said, rank) for rank in range(len(said))]
    held = [set(keys) for keys in others]
    return next((key for key in first if key not in banned and all(key in keys for keys in held)), None)


def available(said: Sequence[Said], rank: int) -> list[Key]:
    """What this rank can load, in its order: what it has itself, and what of it lies with others."""
    own = [key_of(key) for key in said[rank]["keys"]]
    found = [each for _, each in _all_kept(said) if each.rank == rank]
    found.sort(key=lambda each: (each.amid, -each.number, -each.generation))
    return list(dict.fromkeys([*(each.key for each in found), *own]))


def holders(said: Sequence[Said], rank: int, key: Key) -> list[int]:
    """The ranks on whose disks this rank's checkpoint lies."""
    return [at for at, each in _all_kept(said) if each.rank == rank and each.key == key]


def safe(said: Sequence[Said], newest: Key) -> list[Key]:
    """The newest few steps, up to this one, that every rank has on two disks: no single one takes them away. Oldest first."""
    order = available(said, 0)
    older = order[order.index(newest) :] if newest in order else []
    whole = [key for key in older if all(len(set(holders(said, rank, key))) > 1 for rank in range(len(said)))]
    return whole[:COMPLETE][::-1]


def _all_kept(said: Sequence[Said]) -> Iterator[tuple[int, Kept]]:
    """With the rank on whose disk it lies."""
    for at, each in enumerate(said):
        for row in each["kept"]:
            rank, step, iteration, life, amid, number, generation = row
            key = key_of((step, iteration, life))
            yield at, Kept(int(str(rank)), *key, bool(amid), int(str(number)), int(str(generation)))


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
    if any(each.rank != at for at, each in _all_kept(said)):  # only what is common is sent to another rank's disk
        return False
    together = stores_digest([each["store"] for each in said])
    return all(set(each["beside"]) <= {together} for each in said)


def described(said: Sequence[Said]) -> str:
    """What each rank has, a line a rank, for a message."""
    return "".join(f"\n  rank {rank}: {_one(each)}{_replicas(said, rank)}" for rank, each in enumerate(said))


def _replicas(said: Sequence[Said], rank: int) -> str:
    """What of its checkpoints lies elsewhere than it has it."""
    own = {key_of(key) for key in said[rank]["keys"]}
    found = [f"{key[0]} with rank {holders(said, rank, key)[0]}" for key in available(said, rank) if key not in own]
    return f", and replicas of step {', '.join(found)}" if found else ""


def _one(each: Said) -> str:
    """What one rank has."""
    if each["error"]:
        return each["error"]
    steps = ", ".join(str(key[0]) for key in each["keys"]) or "none"
    return f"steps {steps} in {each['directory']}" + (f", {each['damaged']} damaged" if each["damaged"] else "")
