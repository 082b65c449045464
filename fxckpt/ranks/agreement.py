"""An agreement of all ranks: each says something, and each hears what all others said, or an error names who is silent."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from fxckpt.errors import RanksDisagree
from fxckpt.ranks.heart import SILENCE, Heart, Pulse
from fxckpt.ranks.messages import Messages, named

log: logging.Logger = logging.getLogger("fxckpt")

_SLICE, _LOOK = 0.01, 0.2  # seconds between two looks for an answer, and between two looks at a pulse
SAY_AFTER = 30.0  # seconds after which it is said whom this rank waits for


class Agreement:
    """What one rank says and hears in one load, or another call that all ranks make together, inside a ``with`` block. ``limit``:
    seconds that a rank may take to come to its ``call``; from there on ``silence`` is how long it may show no sign of life.

    Rank 0 collects what each says and hands all of it to everyone, so ``n`` ranks send ``2 n`` messages, and who waits for
    somebody dead is told by rank 0, or notices that rank 0 is."""

    def __init__(
        self, store: Messages, rank: int, world: int, limit: float, silence: float = SILENCE, call: str = "fxckpt.load()"
    ):
        self.rank: int = rank
        self.world: int = world
        self.store: Messages = store
        self._limit, self._silence, self._call = limit, min(silence, limit), call
        with named():
            number = store.add(f"fxckpt/calls/{call}/{rank}", 1)  # the nth of each rank belongs together
            self.prefix: str = f"fxckpt/{call}/{number}"
            self._heart = Heart(store.clone(), self._beats_of(rank), self._silence)

    def __enter__(self) -> Agreement:
        with named():
            self._heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._heart.stop()

    def _beats_of(self, rank: int) -> str:
        return f"{self.prefix}/alive/{rank}"

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Say ``value`` (JSON), and return what all ranks said, in their order. Raises RanksDisagree if one is dead."""
        with named():
            if self.rank == 0:
                return self._collect(topic, value)
            self.store.set(f"{self.prefix}/{topic}/{self.rank}", json.dumps(value))
            heard = self._hear(f"{self.prefix}/{topic}/all", 0, topic)
        if isinstance(heard, str):
            raise RanksDisagree(heard)
        found: list[Any] = heard
        return found

    def _collect(self, topic: str, own: Any) -> list[Any]:
        """Rank 0: hear each, and tell all; or tell them who is dead."""
        everyone = f"{self.prefix}/{topic}/all"
        try:
            found = [own, *(self._hear(f"{self.prefix}/{topic}/{rank}", rank, topic) for rank in range(1, self.world))]
        except RanksDisagree as error:
            self.store.set(everyone, json.dumps(str(error)))
            raise
        self.store.set(everyone, json.dumps(found))
        return found

    def _hear(self, key: str, rank: int, topic: str) -> Any:
        """What that rank says, polled."""
        pulse = Pulse(self.store, self._beats_of(rank), self._silence, self._limit)
        looked = began = said = time.monotonic()
        while not self.store.check([key]):
            if (now := time.monotonic()) - looked > min(_LOOK, self._silence / 4):
                looked = now
                if pulse.is_dead():
                    raise RanksDisagree(self._who_is_dead(rank, pulse, topic))
                if now - said > SAY_AFTER:
                    said = now
                    what = f"is alive, and at it ({topic})" if pulse.beats else f"has not come to its {self._call} yet"
                    log.warning("fxckpt: rank %d has waited %.0f s for rank %d, which %s", self.rank, now - began, rank, what)
            time.sleep(_SLICE)
        return json.loads(self.store.get(key))

    def _who_is_dead(self, rank: int, pulse: Pulse, topic: str) -> str:
        """For a message."""
        if pulse.beats:
            return (
                f"rank {rank} of {self.world} was in its {self._call} and has shown no sign of life for {self._silence:g} s "
                f"({topic}): it is dead, or was stopped. Restart the whole job."
            )
        return (
            f"rank {rank} of {self.world} did not come to its {self._call} within {self._limit:g} s: it is dead, hangs, or does "
            "not call it, which all ranks must do equally often. Restart the whole job."
        )
