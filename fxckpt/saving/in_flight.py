"""One checkpoint between its first emit and its end: InFlight."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fxckpt.engine import Checkpoint, Latch, Sources, Streams
from fxckpt.saving.guard import Guard
from fxckpt.saving.landing import Landing, Link
from fxckpt.saving.plan import Layout
from fxckpt.saving.stores import CheckpointSlot
from fxckpt.store.dtypes import Tensor


@dataclass(eq=False)
class InFlight:
    """One checkpoint under way: what it is written from and to, and how far it has come."""

    step: int
    layout: Layout
    slot: CheckpointSlot
    copy: Checkpoint  # the engine's side
    guard: Guard
    link: Link | None = None  # of a record of the journal
    landing: Landing = field(default_factory=Landing)
    captured: bool = False  # buffers and early state are in
    beside: dict[str, int] = field(default_factory=dict)  # of the first of several ranks: fingerprints of layout.beside
    record: dict[str, Any] = field(default_factory=dict)  # fields and extra state's tensors; callables are asked at the commit
    closed: Latch = field(default_factory=Latch)
    done: Latch = field(default_factory=Latch)
    phase: str = "waiting for its step to close"  # what the committer is at, for messages
    given_up: str | None = None
    replaced: bool = False  # it was given up for another one of the same step
    failure: Exception | None = None  # what it failed of, counted and logged
    error: Exception | None = None  # why it was not committed, once it is done
    begun: tuple[float, float] = field(default_factory=lambda: (time.time(), time.monotonic()))  # by both clocks
    lock: threading.RLock = field(default_factory=threading.RLock)  # between emits, give_up and release; handlers of signals, too

    @property
    def path(self) -> str:
        """The directory that it is written to; empty if nothing is."""
        return self.slot.path

    def emit(self, layer: int, sources: Sources, streams: Streams | None) -> None:
        """Hand a layer to the engine; nothing once it has ended, which it may in the middle of a step (its monitor died)."""
        with self.lock:
            if not self.done.is_set():
                self.copy.emit(layer, sources, streams)

    def close(self, record: dict[str, Any], tensors: dict[str, Tensor | Callable[[], Tensor]]) -> None:
        """The step is complete: with this the checkpoint can be committed."""
        self.record = {**record, "state_tensors": tensors}
        self.closed.set()

    def fail(self, error: Exception) -> bool:
        """Note what it failed of; False if that was known, and counted, already."""
        with self.lock:
            first, self.failure = self.failure is None, self.failure or error
            self.landing.failed = True
        return first

    def give_up(self, why: str) -> None:
        """Drop it: fences are released at once, the committer returns its slot."""
        with self.lock:
            if self.done.is_set():
                return
            self.given_up = self.given_up or why  # again where Ctrl-C came to the first call
            self.landing.failed = True
            self.copy.cancel()
            if self.link is not None:
                self.link.cancel()
        self.closed.set()

    def release(self) -> None:
        """Free the engine's side; nothing may cancel it afterwards."""
        with self.lock:
            self.done.set()
            self.copy.release()
            if self.link is not None:
                self.link.release()
