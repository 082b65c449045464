"""What the ranks that write one checkpoint together tell each other, over the process group's store.

A rank says that its part of a checkpoint is durable, or that it gave the checkpoint up; rank 0 tells what became of it. Each has
one message that it replaces: the newest few, so that nothing piles up. A checkpoint is known by its step, its name, and how many
of that step and name there were in this run since the last load, which all ranks agree on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

KEPT = 32
"""Checkpoints that a message tells of: many more than can be in flight."""

Key = str


@dataclass(frozen=True)
class Done:
    """A rank's part is durable, in the directory ``entry`` of its own; ``sha256`` is that of its record."""

    entry: str
    sha256: str


@dataclass(frozen=True)
class Committed:
    """Rank 0 committed it: its generation, and the path of its directory below the store's."""

    generation: int
    entry: str


@dataclass(frozen=True)
class GivenUp:
    """By whoever says so. ``why``: what it failed of; empty: it was dropped, and another one comes. ``unlike``: since ranks took
    a record of the journal there, and others none, or another one."""

    why: str
    unlike: bool = False


Word = Done | Committed | GivenUp
_KINDS = {kind.__name__: kind for kind in (Done, Committed, GivenUp)}


@dataclass
class Said:
    """One side's newest words by key, in the order in which its checkpoints began. ``life`` is that of the last load, which is
    agreed on: what was said before is of no checkpoint any more."""

    life: str = ""
    words: dict[Key, Word] = field(default_factory=dict)

    def say(self, key: Key, word: Word) -> None:
        """One word more; the oldest are forgotten."""
        self.words[key] = word
        for old in list(self.words)[:-KEPT]:
            del self.words[old]

    def to_bytes(self) -> str:
        return json.dumps([self.life, {key: [type(word).__name__, vars(word)] for key, word in self.words.items()}])

    @classmethod
    def from_bytes(cls, raw: bytes) -> Said:
        life, words = json.loads(raw)
        return cls(life, {key: _KINDS[kind](**fields) for key, (kind, fields) in words.items()})


class Begun:
    """The keys of one rank's checkpoints, in their order."""

    def __init__(self) -> None:
        self._keys: dict[Key, None] = {}
        self._count: dict[tuple[int, str | None], int] = {}

    def next(self, step: int, name: str | None) -> Key:
        """That of one that begins."""
        count = self._count[step, name] = self._count.get((step, name), 0) + 1
        if len(self._count) > 2 * KEPT:
            del self._count[next(iter(self._count))]
        key = f"{step}.{count}" if name is None else f"{step}.{count}.{name}"
        self._keys[key] = None
        if len(self._keys) > 2 * KEPT:
            del self._keys[next(iter(self._keys))]
        return key

    def behind(self, key: Key) -> Iterator[Key]:
        """Those that began later."""
        keys = list(self._keys)
        return iter(keys[keys.index(key) + 1 :]) if key in self._keys else iter(())


def answer(said: Said, life: str, key: Key, begun: Begun) -> Word | None:
    """What the other side has said of this checkpoint; None: nothing yet. It keeps to the order of its checkpoints: one that says
    something of a later one has nothing to say of this one any more."""
    if said.life != life:
        return None
    if (found := said.words.get(key)) is not None:
        return found
    return GivenUp("") if any(each in said.words for each in begun.behind(key)) else None
