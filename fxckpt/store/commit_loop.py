"""The thread that takes checkpoints to their commit, in order, in the trainer and in the monitor's process.

What a commit consists of differs between the two: it comes in as ``Work``.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fxckpt.engine import Patience, io
from fxckpt.errors import Cancelled, SaveFailed
from fxckpt.store.slot import retires_slot

log: logging.Logger = logging.getLogger("fxckpt")

STUCK_AFTER = 300.0
"""Seconds without a byte written after which a checkpoint is given up."""

SETTLE = 10.0
"""Seconds to wait for writes of a checkpoint that was given up, before its slot is put aside for good."""

OwnSlot = Any
"""A slot that the same store's ``acquire`` gave: each store knows its own kind."""


class Copy(Protocol):
    """The engine's side of a checkpoint, see ``fxckpt.engine.Checkpoint``."""

    def cancel(self) -> None: ...
    def settled(self, timeout: float) -> bool: ...


class SlotOwner(Protocol):
    """A store, as far as it takes back slots, see ``Store.abandon``."""

    def abandon(self, slot: OwnSlot, *, bad: bool, why: str = "") -> None: ...


class Committable(Protocol):
    """A checkpoint in flight, which is written to the directory ``path`` until it is given up."""

    @property
    def path(self) -> str: ...
    def give_up(self, why: str) -> None: ...


F = TypeVar("F", bound=Committable)
F_contra = TypeVar("F_contra", bound=Committable, contravariant=True)


class Work(Protocol[F_contra]):
    """What is done with each checkpoint, on the thread that commits."""

    def commit(self, flight: F_contra) -> None:
        """Wait for what it needs, and commit it. Raises what went wrong."""

    def end(self, flight: F_contra, error: Exception | None) -> None:
        """It is over: committed, or ended by this error."""

    def rest(self, busy: Callable[[], bool]) -> None:
        """What can be done between two checkpoints, as long as the thread is not ``busy``: the next one has come."""


class StallDetector:
    """Notices that nothing moves: ``over()``, asked every slice, once ``signs()`` has not changed for so many seconds in which
    this process ran."""

    def __init__(self, seconds: float, signs: Callable[[], Hashable]):
        self._patience, self._signs, self._last = Patience(seconds), signs, signs()

    def over(self) -> bool:
        now = self._signs()
        if now != self._last:
            self._last = now
            self._patience.restart()
        return not self._patience.left()


@dataclass(frozen=True)
class Errand:
    """Something else that the loop's thread does, in turn. It must not raise."""

    function: Callable[[], object]


class CommitLoop(Generic[F]):
    """Does the work of each checkpoint that is put in, one after the other, on a thread of its own. ``written`` changes with
    every byte that reaches the disk, ``stuck_after`` is in seconds."""

    def __init__(self, written: Callable[[], float], stuck_after: float = STUCK_AFTER):
        self.stuck_after = stuck_after
        self.ending: bool = False  # nothing will be put in any more
        self.written = written
        self._queue: queue.SimpleQueue[F | Errand | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, work: Work[F]) -> None:
        """Start the thread, before anything is put in; nothing if it runs."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, args=(work, self._queue), name="fxckpt-commit", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except BaseException:  # Ctrl-C, and whether it runs is not known: if so, it ends
                self._queue.put(None)
                self._queue, self._thread = queue.SimpleQueue(), None
                raise

    def put(self, flight: F | Errand) -> None:
        self._queue.put(flight)

    def end(self, timeout: float | None = None) -> bool:
        """Finish what was put in, and end the thread; False if it is stuck after ``timeout`` seconds."""
        self.ending = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.alive()

    def is_current(self) -> bool:
        """Is this the loop's own thread, which cannot wait for itself?"""
        return threading.current_thread() is self._thread

    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def operation(self) -> str:
        """The file operation that the thread is in, for messages: ``", in fsync"``; empty if it is in none."""
        found = None if self._thread is None else io.running(self._thread.ident)
        return "" if found is None else f", in {found}"

    def wait(self, flight: F, ready: Callable[[], bool], doing: Callable[[], str] = str) -> None:
        """Call ``ready``, which waits for a slice, until it says so. Gives the checkpoint up and raises SaveFailed once nothing
        was written for ``stuck_after`` seconds: a disk that hangs costs this checkpoint, not training. ``doing`` says more."""
        stalled = StallDetector(self.stuck_after, self.written)
        while not ready():
            if stalled.over():
                flight.give_up("the disk hangs")
                raise SaveFailed("write", flight.path, detail=f"nothing was written for {self.stuck_after:g} s; gave up{doing()}")

    def _run(self, work: Work[F], flights: queue.SimpleQueue[F | Errand | None]) -> None:
        while (flight := flights.get()) is not None:
            if isinstance(flight, Errand):
                flight.function()
                continue
            try:
                work.commit(flight)
            except Exception as error:
                work.end(flight, error)
            else:
                work.end(flight, None)
            del flight  # nothing of it is kept alive until the next one comes
            try:
                work.rest(lambda: not flights.empty())
            except Exception:
                log.exception("fxckpt: a checkpoint could not be read back")


def give_back(store: SlotOwner, slot: OwnSlot, copy: Copy, error: BaseException) -> None:
    """Return the slot of a checkpoint that ended with this error. A write that hangs in the disk may still land: until it has,
    nobody else may have the slot's files."""
    copy.cancel()
    why = "" if isinstance(error, Cancelled) else str(error)
    store.abandon(slot, bad=not copy.settled(SETTLE) or retires_slot(error), why=why)
