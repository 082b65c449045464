"""What became of each checkpoint, told to callbacks and to the records that come after it, by the thread that commits."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path

from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.listeners import Committed, Failed, Listeners
from fxckpt.store.about import About
from fxckpt.store.commit_loop import CommitLoop, Errand


class Reporter:
    """Of one run. ``stall``: what the thread that trains has waited so far, in seconds."""

    def __init__(self, about: About, loop: CommitLoop[InFlight], stall: Callable[[], float]):
        self.listeners: weakref.ref[Listeners] | None = None
        self._about, self._loop, self._stall = about, loop, stall

    def ended(self, pending: InFlight) -> None:
        """It was committed, failed or dropped. Of the last nobody is told: another one comes."""
        if pending.failure is not None:
            self.failed(pending.step, pending.failure)
        elif pending.error is None:
            self._committed(pending)

    def _committed(self, pending: InFlight) -> None:
        """Note it for the records that come, and tell of it."""
        record, generation, stall = pending.record, pending.slot.generation, self._stall()
        nbytes = sum(file.nbytes for file in pending.layout.files)
        begun, started = pending.begun
        seconds = time.monotonic() - started
        if generation is not None:
            times = record["time"], begun, begun + seconds
            self._about.note(pending.step, *times, nbytes, stall, record["metrics"], pending.link is not None)
        path = Path(pending.path) if pending.path else None
        number = 0 if pending.link is None else pending.link.number
        self._tell(Committed(pending.step, record["iteration"], path, generation, nbytes, seconds, stall, record["time"],
                             dict(record["metrics"]), number))  # fmt: skip

    def failed(self, step: int, error: BaseException) -> None:
        """One failed; by whatever thread that was found, the one that commits tells it."""
        event = Failed(step, error)
        if self._loop.is_current():
            self._tell(event)
        else:
            self._loop.put(Errand(lambda: self._tell(event)))

    def _tell(self, event: Committed | Failed) -> None:
        listeners = None if self.listeners is None else self.listeners()
        if listeners is not None:
            listeners.tell(event)
