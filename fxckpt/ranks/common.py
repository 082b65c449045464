"""Keeps one step that all ranks have: what each rank promises to hold, and what rank 0 decides from it. No messages here.

Problem: a rank knows what the others hold only as of a while ago. If each gave up what is older than the newest step that it
believes to be common, two ranks could each give up what the other one relies on.

Solution: a rank *promises* to hold its newest checkpoints, and goes on holding them until rank 0 has seen its next promise.
Rank 0 decides on a step that is in the promises of all. So whatever was decided, every rank holds it; and what was decided before
goes only where the newer decision was heard. One promise at a time waits for its answer, so what is held stays few.

Replicas on other ranks' disks: a step is of use there only if it is there of every rank. So rank 0 names one step at a time that
all of them send, and the next one when all have said how that went. A target is the newest common step in the same decision, so
every rank has it when it hears of it, and holds it from then on, as it holds the last two that all have sent: one may rot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxckpt.ranks.choice import COMPLETE, Key, key_of


def least_kept(keep: int, max_async: int) -> int:
    """Checkpoints that each rank keeps at least, so that with ``max_async`` in flight the slowest still finds its newest one with
    all others: who is ahead of it has as many more."""
    return max(keep, max_async + 1)


@dataclass(frozen=True)
class Promise:
    """What a rank holds, oldest first, until its next promise, of a higher ``version``, was seen."""

    version: int = 0
    keys: tuple[Key, ...] = ()

    def to_json(self) -> list[object]:
        return [self.version, self.keys]

    @classmethod
    def from_json(cls, found: Sequence[object]) -> Promise:
        """JSON knows no tuples."""
        version, keys = found
        assert isinstance(version, int) and isinstance(keys, list)
        return cls(version, tuple(map(key_of, keys)))


Sent = tuple[Key, bool]
"""The last target that a rank is done with: is its replica durable?"""


@dataclass(frozen=True)
class Aim:
    """``target``: the step that all ranks send to each other. ``complete``: the newest ``COMPLETE`` of which every replica is
    durable, oldest first."""

    target: Key | None = None
    complete: tuple[Key, ...] = ()

    @property
    def keys(self) -> list[Key]:
        """What is held for it, here and where the replicas are."""
        return [*self.complete, *([] if self.target is None else [self.target])]


def aim_next(before: Aim, common: Key | None, sent: Sequence[Sent | None]) -> Aim:
    """Rank 0's aim, with the newest common step and what each rank has said of the target: stays until all have said it."""
    if before.target is not None and not all(each is not None and each[0] == before.target for each in sent):
        return before
    good = before.target is not None and all(each is not None and each[1] for each in sent)
    done = (before.target,) if good and before.target is not None and before.target not in before.complete else ()
    return Aim(common, (*before.complete, *done)[-COMPLETE:])


@dataclass(frozen=True)
class Decision:
    """What rank 0 says: the newest step that all have promised, which promises it has ``seen``, by rank, and the ``aim`` of
    replicas."""

    common: Key | None = None
    seen: tuple[int, ...] = ()
    aim: Aim = Aim()

    def to_json(self) -> list[object]:
        return [self.common, self.seen, self.aim.target, self.aim.complete]

    @classmethod
    def from_json(cls, found: Sequence[object]) -> Decision:
        """JSON knows no tuples."""
        common, seen, target, complete = found
        assert isinstance(seen, list) and isinstance(complete, list)
        return cls(_key(common), tuple(seen), Aim(_key(target), tuple(map(key_of, complete))))


def _key(sent: object) -> Key | None:
    assert sent is None or isinstance(sent, list)
    return None if sent is None else key_of(sent)


class Holder:
    """What one rank holds for the others' sake. ``loaded``: with what all of them began; ``complete``: of what every rank had a
    replica then."""

    def __init__(self, rank: int, loaded: Key | None, complete: Sequence[Key] = ()):
        self._rank = rank
        self.common: Key | None = loaded
        self.aim: Aim = Aim(None, tuple(complete))
        self.promise: Promise = Promise(0, () if loaded is None else (loaded,))
        self._seen = self.promise

    @property
    def waits(self) -> bool:
        """Has rank 0 not seen the last promise yet? Then there is no next one."""
        return self._seen is not self.promise

    def held(self) -> set[Key]:
        """What this rank may not give up."""
        return {*self._seen.keys, *self.promise.keys, *self.aim.keys} | (set() if self.common is None else {self.common})

    def make(self, keys: Sequence[Key]) -> Promise:
        """The next promise: these are there, oldest first, and stay."""
        assert not self.waits
        self.promise = Promise(self.promise.version + 1, tuple(keys))
        return self.promise

    def hear(self, decision: Decision) -> None:
        """What rank 0 decided."""
        if decision.seen[self._rank] >= self.promise.version:
            self._seen = self.promise
        self.common, self.aim = decision.common, decision.aim


def decide(before: Decision, promises: Sequence[Promise]) -> Decision:
    """The newest step that all promise, in rank 0's order; the one before while there is none."""
    first, *others = [each.keys for each in promises]
    shared = [key for key in first if all(key in keys for keys in others)]
    return Decision(shared[-1] if shared else before.common, tuple(each.version for each in promises), before.aim)
