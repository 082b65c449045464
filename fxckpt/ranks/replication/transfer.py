"""One checkpoint from one rank's disk to another's, over a connection: what both sides say, and when.

giver: rank, size of the record, the record    is it one, of that rank? is there room?
taker: "send", or "here" if it has it and it verifies, or "refused" and why
giver: all files, in the record's order        each chunk compared with the record and written; synced, renamed
taker: "durable", or "refused" and why
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

from fxckpt.errors import Corrupt, StoreError
from fxckpt.ranks.choice import Key, key_of
from fxckpt.ranks.replication.wire import ANSWER, Line, Lost
from fxckpt.store.about import known_as
from fxckpt.store.reader import Reader
from fxckpt.store.replica_folder import ReplicaFolder

RANKS = 1 << 20
"""No job has so many."""


def give(line: Line, reader: Reader, held: Collection[Key] = ()) -> None:
    """Send a checkpoint, which nothing recycles meanwhile, from its files. ``held``: what is not to be given up for it. When this
    returns, the other side has it durably. Raises ``Lost``, ``Refused``; ``NoCheckpoint`` or ``Corrupt`` if it is not there."""
    with reader.held() as files:
        line.say({"rank": reader.record.rank, "record": len(reader.raw), "held": list(held)})
        line.send_record(reader.raw)
        line.allow(0, ANSWER)
        if _answer(line, "send", "here") == "here":
            return
        line.allow(reader.record.nbytes)
        for file in reader.record.files:
            line.send_file(files[file.name], file.nbytes)
        line.allow(0, ANSWER)
        _answer(line, "durable")


def take(line: Line, folder: ReplicaFolder) -> tuple[int, str]:
    """Receive one, and tell the other side what became of it; returns its rank and what its directory is called. Raises ``Lost``,
    ``Refused``, and what was wrong with it: ``Corrupt``, ``StoreError``, ``OSError``."""
    line.allow(0)
    said = line.hear()
    rank, held = rank_of(said), _keys(said.get("held"))
    raw = line.record(said.get("record"))
    with contextlib.ExitStack() as stack:
        try:
            arrival = stack.enter_context(folder.arriving(rank, raw))
            if not arrival.is_here:
                line.say({"answer": "send"})
                line.allow(arrival.record.nbytes)
                arrival.receive(line.read)
        except (Corrupt, StoreError, OSError) as error:
            line.say({"refused": str(error)[:1000]})
            raise
        folder.retain(rank, [*held, known_as(arrival.record)])
        line.say({"answer": "here" if arrival.is_here else "durable"})
    return rank, arrival.entry


def rank_of(said: dict[str, Any]) -> int:
    """The rank that a message names."""
    rank = said.get("rank")
    if type(rank) is not int or not 0 <= rank < RANKS:
        raise Lost(f"rank {str(rank)[:40]}")
    return rank


def key_in(sent: Any) -> Key:
    """A key in a message."""
    try:
        return key_of(sent)
    except (TypeError, ValueError) as error:
        raise Lost("a message of another kind") from error


def _keys(sent: Any) -> list[Key]:
    if type(sent) is not list:
        raise Lost("a message of another kind")
    return [key_in(each) for each in sent]


def _answer(line: Line, *expected: str) -> str:
    answer = line.hear().get("answer")
    if answer not in expected:
        raise Lost(f"it answers {str(answer)[:40]!r}")
    return str(answer)
