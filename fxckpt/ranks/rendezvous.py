"""The messages of one store that several ranks write together: what this rank says, and what it hears."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from fxckpt.errors import Cancelled, RanksDisagree
from fxckpt.ranks.messages import Messages, named
from fxckpt.ranks.words import Begun, GivenUp, Key, Said, Word, answer
from fxckpt.store.checks import Malformed

SLICE = 0.005
"""Seconds between two looks for an answer, by the thread that commits."""

EACH = 0.0001
"""Where there are many ranks, so much longer between two looks for each: the store is one process, and all ask it for rank 0's
answer at the same time, as rank 0 asks for those of all."""

FAREWELL = 10.0
"""Seconds that rank 0 stays at the end for others to hear the last word: one of them may be dead."""


class Unlike(Cancelled):
    """Ranks took a record of the journal, and others none, or another one: the next one is a full checkpoint on all."""


def given_up(rank: int, word: GivenUp) -> Exception:
    """The error for a checkpoint that another rank gave up."""
    if word.unlike:
        return Unlike("the ranks do not agree on whether it is a record of the journal, or on which one")
    if not word.why:
        return Cancelled(f"rank {rank} dropped it")
    return RanksDisagree(f"rank {rank} failed: {word.why}")


def _said(rank: int, raw: bytes) -> Said:
    """What a rank's message says. Raises RanksDisagree for what no rank of this version says."""
    try:
        return Said.from_bytes(raw)
    except Malformed as error:
        raise RanksDisagree(
            f"what rank {rank} says is not understood ({error}): all ranks of a job must run the same version of fxckpt"
        ) from error


class Rendezvous:
    """Of one rank. ``prefix``: of its messages, the same on all ranks and for no other store. Thread-safe."""

    def __init__(self, store: Messages, rank: int, world: int, prefix: str):
        self.rank: int = rank
        self.world: int = world
        with named():
            self._store = store.clone()  # the thread that trains may wait in its own connection
        self._served_by = store  # rank 0's may be the server, which ends with it, and others still listen
        self._prefix = prefix
        self._spoke: set[int] = set()  # ranks that have said anything
        self._said, self._begun = Said(), Begun()
        self._lock, self._sending = threading.RLock(), threading.RLock()  # the first is never held while a message is on its way

    def begins(self, step: int, name: str | None) -> Key:
        """By what a checkpoint that begins here is known to the others."""
        with self._lock:
            return self._begun.next(step, name)

    def missed(self, step: int, name: str | None, why: str) -> Callable[[], None]:
        """The same of one that could not be begun; returns what tells the others."""
        key = self.begins(step, name)

        def tell() -> None:
            with suppress(RanksDisagree):  # they wait in vain, and give it up
                self.say(key, GivenUp(why))

        return tell

    def renew(self, life: str) -> None:
        """All ranks have agreed on a load, and a life begins: what was said before is over."""
        with self._lock:
            self._said, self._begun = Said(life), Begun()

    def say(self, key: Key, word: Word) -> None:
        """Tell the others. Raises RanksDisagree if they cannot be told."""
        with self._sending, named():
            with self._lock:
                self._said.say(key, word)
                message = self._said.to_bytes()
            self._store.set(self._key(self.rank), message)

    def heard(self, key: Key, ranks: Sequence[int], timeout: float) -> dict[int, Word]:
        """What these ranks have said of a checkpoint: once all have, or one of them gave it up, or after ``timeout`` seconds.
        Raises RanksDisagree if nothing can be heard."""
        ended, found = time.monotonic() + timeout, dict[int, Word]()
        while True:
            found |= self._look(key, [rank for rank in ranks if rank not in found])
            given_up = any(isinstance(word, GivenUp) for word in found.values())
            if given_up or len(found) == len(ranks) or time.monotonic() > ended:
                return found
            time.sleep(max(SLICE, EACH * (len(ranks) - len(found) if self.rank == 0 else self.world)))

    def _look(self, key: Key, ranks: Sequence[int]) -> dict[int, Word]:
        """The same now, of those that have said something."""
        with named():
            self._spoke |= {rank for rank in ranks if rank not in self._spoke and self._store.check([self._key(rank)])}
            there = [rank for rank in ranks if rank in self._spoke]
            raw = self._store.multi_get([self._key(rank) for rank in there]) if there else []
        with self._lock:
            words = {rank: answer(_said(rank, each), self._said.life, key, self._begun) for rank, each in zip(there, raw)}
        return {rank: word for rank, word in words.items() if word is not None}

    def forget(self, key: Key) -> None:
        """What became of this checkpoint was heard, so nobody asks for what this rank said of it: the next message is shorter."""
        with self._lock:
            self._said.forget(key)

    def leave(self) -> None:
        """Nothing more is said. Rank 0 stays until all others have heard what it said last, or for ``FAREWELL`` seconds."""
        ended = time.monotonic() + FAREWELL
        others = range(1, self.world) if self.rank == 0 and self._said.words else ()
        with suppress(RanksDisagree), named():
            self._store.set(f"{self._key(self.rank)}/left", "")
            while others and time.monotonic() < ended and not self._store.check([f"{self._key(rank)}/left" for rank in others]):
                time.sleep(SLICE)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"
