"""The checkpoints in flight, how many there may be, every wait for them, and what became of them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from fxckpt.engine import SLICE
from fxckpt.errors import SaveFailed
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.tracing import Tracer
from fxckpt.store.commit_loop import CommitLoop, StallDetector

log: logging.Logger = logging.getLogger("fxckpt")

LONGEST, SLOWEST = 0.02, 1e9
"""An operation on a tensor has ended after so many seconds, and one more for each ``SLOWEST`` bytes, where nothing says that
it has."""

FAREWELL = 60.0
"""Seconds that a process which ends with an exception waits for what other ranks have to do: the same has befallen them, or they
are dead."""


class TrainingThread:
    """Which thread trains, and whether it came by: ``progress_ticks`` counts how often it did so, between two operations."""

    def __init__(self) -> None:
        self.thread: threading.Thread = threading.current_thread()  # that of the last step
        self.progress_ticks: int = 0
        self._inside = False  # it waits in our code

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait of whatever thread."""
        trains = threading.current_thread() is self.thread
        self._inside = self._inside or trains
        try:
            yield
        finally:
            self._inside = self._inside and not trains

    def comes_by(self) -> None:
        """This is the thread, at the beginning of a step; it waits for nothing, though Ctrl-C may have left it said so."""
        self.thread, self._inside = threading.current_thread(), False
        self.progress_ticks += 1

    def let_come_by(self, nbytes: int) -> None:
        """Wait until no operation in place that began before can be under way: it counts itself in the tensor's version when it
        ends. ``nbytes``: the largest tensor's."""
        ended, before = time.monotonic() + LONGEST + nbytes / SLOWEST, self.progress_ticks
        while self.progress_ticks == before and not self._inside and time.monotonic() < ended:
            time.sleep(0.001)


@dataclass
class Tally:
    """The counters of ``opt.ckpt.statistics()``, and the first failure that nobody was told of. Steps, seconds."""

    started: int = 0
    committed: int = 0
    records: int = 0  # of the journal, among these
    skipped: int = 0
    failed: int = 0
    last_handed_over: int | None = None
    last_committed: int | None = None
    last_error: BaseException | None = None
    unreported: BaseException | None = None
    wait_seconds: float = 0.0
    mixed: list[Exception] = field(default_factory=list)  # why checkpoints in a row would have mixed two iterations

    def note_failure(self, step: int, error: BaseException) -> None:
        """A checkpoint failed: say so at once, count it, keep it for ``raise_unreported``."""
        self.failed += 1
        self.last_error = error
        self.unreported = self.unreported or error
        log.error("fxckpt: the checkpoint of step %d failed: %s", step, error)

    def raise_unreported(self) -> None:
        """Raise the first failure that nobody has been told of."""
        error, self.unreported = self.unreported, None
        if error is not None:
            raise error

    def forget(self, error: BaseException) -> None:
        """This failure was raised already."""
        if self.unreported is error:
            self.unreported = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the training thread waits for."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.wait_seconds += time.perf_counter() - started


class Flights:
    """Checkpoints begun and not ended yet, oldest first, ``max_async`` at most; ``loop`` commits them in this order.

    ``lock`` guards them, and ``changed`` is notified when one ends: a condition as a block, other than its lock, may be left
    taken by Ctrl-C. ``tracer`` is there while somebody records.
    """

    def __init__(self, loop: CommitLoop[InFlight], max_async: int, trainer: TrainingThread):
        self.loop: CommitLoop[InFlight] = loop
        self.max_async: int = max_async
        self.trainer: TrainingThread = trainer
        self.lock: threading.RLock = threading.RLock()
        self.changed: threading.Condition = threading.Condition(self.lock)
        self.tracer: Tracer | None = None
        self._flying: list[InFlight] = []
        self._leaves: float | None = None  # when waits for other ranks end
        self._hung: Hashable = None  # the signs of progress when a wait was given up

    def under_way(self) -> list[InFlight]:
        """All of them. Only the training thread begins one."""
        if not self._flying:
            return []
        with self.lock:
            return list(self._flying)

    def forget(self) -> None:
        """In a forked child: they are the parent's, and so are the threads that may have had the lock."""
        self.lock = threading.RLock()
        self.changed, self._flying = threading.Condition(self.lock), []

    def add(self, pending: InFlight) -> None:
        """One more, to be committed after all others."""
        with self.lock:
            try:
                self._flying.append(pending)
                self.loop.put(pending)
            except BaseException:  # Ctrl-C, and whether it was put in is not known; once more does no harm
                if pending in self._flying:
                    self.loop.put(pending)
                raise

    def is_flying(self, pending: InFlight) -> bool:
        """Is it one of them?"""
        with self.lock:
            return pending in self._flying

    def remove(self, pending: InFlight) -> None:
        """It has ended; ``lock`` is held."""
        self._flying.remove(pending)
        pending.release()
        self.changed.notify_all()

    def drop_all(self, why: str) -> None:
        """Give up every one."""
        for pending in self.under_way():
            pending.give_up(why)

    def leave(self) -> None:
        """The process ends with an exception: other ranks are waited for no longer than ``FAREWELL``."""
        self._leaves = time.monotonic() + FAREWELL

    def has_left(self) -> bool:
        """Is that over?"""
        return self._leaves is not None and time.monotonic() > self._leaves

    def patience(self) -> StallDetector:
        """For one wait. Longer than the loop's own, which ends what hangs where it can be ended."""
        return StallDetector(2 * self.loop.stuck_after, self._signs)

    def _signs(self) -> Hashable:
        """Changes when anything in flight makes progress."""
        return self.loop.written(), tuple((p.step, p.phase) for p in list(self._flying))

    def what_is_stuck(self) -> str:
        """Each checkpoint in flight with what is being waited for, and the file operation that the committer is in."""
        each = "; ".join(f"step {p.step} is {p.phase}" for p in list(self._flying))
        return f"{each}{self.loop.operation()}"

    def _hangs(self, waited: StallDetector) -> bool:
        """Whether training is to stop waiting; it does not wait a second time on what hung before and has not moved."""
        if self._hung == (signs := self._signs()) or waited.over():
            self._hung = signs
            return True
        return False

    def wait_for_room(self) -> None:
        """Until one more may begin. Raises SaveFailed if none of them moves."""
        waited = None
        with self.trainer.waiting(), self.lock:
            while len(self._flying) >= self.max_async:
                waited = waited or self.patience()
                if self._hangs(waited):
                    raise SaveFailed("wait", self._flying[0].path, detail=f"the disk hangs: {self.what_is_stuck()}")
                self.changed.wait(SLICE)

    def wait_for_all(self, timeout: float | None, unclosed: bool = True) -> None:
        """Wait until all that is in flight now has ended; without ``unclosed``, all whose step has closed.

        Raises TimeoutError, which names the steps and what is stuck, after ``timeout`` seconds, or without one once nothing has
        moved for as long as ``patience`` has.
        """
        began, waited = time.monotonic(), self.patience()
        with self.trainer.waiting(), self.lock:
            started = {p for p in self._flying if unclosed or p.closed.is_set()}  # another thread may train on, and begin more
            while left := [p for p in self._flying if p in started]:
                late = timeout is not None and time.monotonic() - began >= timeout
                if late or (timeout is None and waited.over()):
                    steps = ", ".join(str(p.step) for p in left)
                    what = f"after {time.monotonic() - began:.3g} s the checkpoints of steps {steps} are not durable yet"
                    raise TimeoutError(f"{what}: {self.what_is_stuck()}")
                self.changed.wait(SLICE if timeout is None else min(SLICE, max(began + timeout - time.monotonic(), 0.001)))

    def wait_for(self, pending: InFlight) -> None:
        """Until this one is committed or has failed. Raises TimeoutError as ``wait_for_all`` does."""
        waited = self.patience()
        with self.trainer.waiting(), self.lock:
            while not pending.done.is_set():
                self.changed.wait(SLICE)
                if waited.over() and not pending.done.is_set():
                    raise TimeoutError(f"the checkpoint of step {pending.step} is not durable yet: {self.what_is_stuck()}")
