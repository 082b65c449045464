"""Tells the other ranks that this one lives, whatever it is busy with, and tells whether another one does."""

from __future__ import annotations

import threading
import time

from fxckpt.ranks.messages import Messages

SILENCE = 60.0
"""Seconds without a beat after which a rank that had begun is dead. Many beats, as the machine may be busy."""

BEATS = 30  # in that time


class Heart:
    """A thread that counts up a number of this rank's, over a connection of its own, from ``start`` to ``stop``: restoring may
    take any time. It beats as long as the process runs, so it says of a disk that hangs no more than that.

    ``limit``: seconds of silence after which a rank is dead."""

    def __init__(self, store: Messages, key: str, limit: float):
        self._store, self._key, self._interval = store, key, limit / BEATS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fxckpt-heart", daemon=True)

    def start(self) -> None:
        """Beat from now on. Raises what the store raises if the first beat does not arrive."""
        self._store.add(self._key, 1)
        self._thread.start()

    def stop(self) -> None:
        """No more. A thread that is stuck in a dead store is left behind."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _beat(self) -> None:
        try:
            while not self._over.wait(self._interval):
                self._store.add(self._key, 1)
        except RuntimeError:  # the store is gone, which the rank's own thread finds out, too
            return


class Pulse:
    """Whether another rank is alive, by its beats. ``limit``: seconds that it may be silent once it has begun, ``patience``:
    before."""

    def __init__(self, store: Messages, key: str, limit: float, patience: float):
        self._store, self._key, self._limit, self._patience = store, key, limit, patience
        self.beats: int = 0
        self._since = time.monotonic()

    def silent_for(self) -> float:
        """Seconds since the last beat that was heard here."""
        if (beats := self._store.add(self._key, 0)) != self.beats:
            self.beats, self._since = beats, time.monotonic()
        return time.monotonic() - self._since

    def is_dead(self) -> bool:
        """Has it been silent for too long?"""
        return self.silent_for() > (self._limit if self.beats else self._patience)
