"""At which step all ranks take their last checkpoint, when a signal has asked them to end."""

from __future__ import annotations

import logging
import time

from fxckpt.errors import RanksDisagree
from fxckpt.ranks.messages import Messages, named

log: logging.Logger = logging.getLogger("fxckpt")

PATIENCE = 2.0
"""Seconds that a rank waits at a step for the others to come to it. One that is behind comes soon, unless it is ahead and waits
for this one inside a collective: then this one goes on, and both meet at the next step."""

TRIES = 3
"""Steps at which a rank waits. If the others come to none, they were not asked to end."""

_SLICE = 0.002
_TAKE, _SKIP = b"take", b"skip"


class Ending:
    """One rank's side. A signal comes to ranks on both sides of a step, and a checkpoint of which each has another step is none.
    So each says at which step it could end, and the first that knows whether all are at that one says so for all."""

    def __init__(self, store: Messages, rank: int, world: int, prefix: str):
        with named():
            self._store = store.clone()
        self._rank, self._world, self._prefix = rank, world, prefix
        self._tries = 0

    def is_here(self, step: int) -> bool:
        """Is it at the step that is about to be made? False: at a later one."""
        try:
            with named():
                self._store.set(self._key(self._rank), str(step))
                if self._decided(step) == _TAKE:
                    return True
        except RanksDisagree as error:
            log.error("fxckpt: the last checkpoint is of a step that other ranks may not have: %s", error)
            return True
        self._tries += 1
        if self._tries == TRIES:
            log.error(
                "fxckpt: not all ranks were asked to end: this one's last checkpoint is of step %d, whatever they have", step
            )
        return self._tries >= TRIES

    def _decided(self, step: int) -> bytes:
        """What holds for all of this step."""
        ended, key = time.monotonic() + PATIENCE, f"{self._prefix}/step/{step}"
        while True:
            there = [rank for rank in range(self._world) if self._store.check([self._key(rank)])]
            at = [int(each) for each in self._store.multi_get([self._key(rank) for rank in there])]
            if len(at) == self._world and all(each == step for each in at):
                return self._store.compare_set(key, "", _TAKE.decode())
            if any(each > step for each in at) or time.monotonic() > ended:
                return self._store.compare_set(key, "", _SKIP.decode())
            if self._store.check([key]):
                return self._store.get(key)
            time.sleep(_SLICE)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/at/{rank}"
