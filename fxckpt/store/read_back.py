"""Which committed checkpoints are read back, and when: what a disk lost is better known while training still runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from fxckpt.errors import Corrupt, NoCheckpoint, SetupError
from fxckpt.store.files import DAMAGE
from fxckpt.store.reader import Reader
from fxckpt.store.slot import Slot

OFF, SAMPLED, ALL = MODES = ("off", "sampled", "all")

SHARE = 0.02
"""Of the time, so much is spent on reading back samples at most."""

LEAST = 30.0
"""Seconds between two samples at least."""


class Interrupted(Exception):
    """There is something to commit: reading can wait."""


class ReadBack:
    """Chooses among what was committed: nothing, each one, or the newest whenever the disk is idle and the time for it has come.
    Used by the thread that commits. ``share``: of the time, for samples."""

    def __init__(self, mode: str, share: float = SHARE):
        if mode not in MODES:
            raise SetupError(f"read_back={mode!r}: expected one of {', '.join(map(repr, MODES))}")
        self._mode, self._share = mode, share
        self._waiting: tuple[Slot, int] | None = None  # committed last, and its step
        self._next = time.monotonic()

    def committed(self, slot: Slot, step: int) -> None:
        """One more may be read."""
        if self._mode != OFF:
            self._waiting = slot, step

    def read(self, busy: Callable[[], bool]) -> tuple[Slot, int, Corrupt] | None:
        """Read what is due, if anything is, and say what is wrong with it. A sample stops, and is put off, as soon as the thread
        is ``busy``. Raises ``OSError`` for what says nothing about the disk."""
        if self._waiting is None or (self._mode == SAMPLED and (busy() or time.monotonic() < self._next)):
            return None
        (slot, step), began = self._waiting, time.monotonic()
        try:
            Reader(slot.path).verify(lambda _: self._stop_if(busy))
        except Interrupted:
            return None
        except NoCheckpoint:  # given up meanwhile
            wrong = None
        except Corrupt as error:
            wrong = error
        except OSError as error:
            if error.errno not in DAMAGE:
                raise
            wrong = Corrupt(slot.path, f"it cannot be read back: {error}")
        else:
            wrong = None
        now = time.monotonic()
        self._waiting, self._next = None, now + max((now - began) / self._share, LEAST)
        return None if wrong is None else (slot, step, wrong)

    def _stop_if(self, busy: Callable[[], bool]) -> None:
        if self._mode == SAMPLED and busy():
            raise Interrupted
