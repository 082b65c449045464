"""What the ranks that write one checkpoint together tell each other, over the process group's store.

A rank says that its part of a checkpoint is durable, or that it gave the checkpoint up; rank 0 tells what became of it. Each has
one message that it replaces: the newest few, so that nothing piles up. A checkpoint is known by its step, its name, and how many
of that step and name there were in this run since the last load, which all ranks agree on."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fxckpt.ranks.briefs import Brief
from fxckpt.store import names
from fxckpt.store.checks import Check, Malformed, is_anything, is_count, is_str, members, need

KEPT = 32
"""Checkpoints that a message tells of: many more than can be in flight."""

Key = str


@dataclass(frozen=True)
class Done:
    """A rank's part is durable, in the directory ``entry`` of its own; ``nbytes`` and ``sha256`` are those of its record, and
    ``brief`` is what it says in short."""

    entry: str
    nbytes: int
    sha256: str
    brief: Brief


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
_CHECKS: dict[type, dict[str, Check]] = {
    Done: {"entry": lambda value: is_str(value) and names.is_slot(value), "nbytes": is_count,
           "sha256": lambda value: is_str(value) and re.fullmatch("[0-9a-f]{64}", value) is not None, "brief": is_anything},
    Committed: {"generation": is_count, "entry": is_str},
    GivenUp: {"why": is_str, "unlike": lambda value: type(value) is bool},
}  # fmt: skip


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

    def forget(self, key: Key) -> None:
        """Nobody asks for this word any more."""
        self.words.pop(key, None)

    def to_bytes(self) -> str:
        return json.dumps([self.life, {key: [type(word).__name__, dataclasses.asdict(word)] for key, word in self.words.items()}])

    @classmethod
    def from_bytes(cls, raw: bytes) -> Said:
        """What another rank said, of this version or of another one. Raises Malformed."""
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"it is no JSON: {error}") from error
        need(type(found) is list and len(found) == 2 and is_str(found[0]) and type(found[1]) is dict, "it is no list of words")
        return cls(found[0], {key: _word(value) for key, value in found[1].items()})


def _word(value: Any) -> Word:
    """One of them. Raises Malformed."""
    need(type(value) is list and len(value) == 2 and is_str(value[0]) and value[0] in _KINDS, lambda: f"a word is {value!r:.80}")
    kind = _KINDS[value[0]]
    fields = members(value[1], _CHECKS[kind], value[0])
    return Done(**{**fields, "brief": Brief.from_json(fields["brief"])}) if kind is Done else kind(**fields)


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
