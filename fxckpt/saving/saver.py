"""Checkpoints under way: from the first emit to the commit, off the training thread.

The training thread begins a checkpoint, emits layers and closes it; the engine's threads copy and write; one Python
thread, the committer, waits for them and commits in order. All waits happen in slices, so Ctrl-C works.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxckpt.compat.tensors import version_of
from fxckpt.errors import Cancelled, FxckptError, NoSpace, SaveFailed
from fxckpt.saving import tracing
from fxckpt.saving.plan import Layout
from fxckpt.store.record import FileRecord, Record
from fxckpt.store.slot import retires_slot

log = logging.getLogger("fxckpt")

SLICE = 0.2
"""Seconds that one wait inside the engine lasts before Python looks whether it should stop."""

LONGEST, SLOWEST = 0.02, 1e9
"""An operation on a tensor has ended after so many seconds, and one more for each ``SLOWEST`` bytes, where nothing says that
it has."""

SETTLE = 10.0
"""Seconds to wait for writes of a checkpoint that was given up, before its slot is put aside for good."""


@dataclass(eq=False)
class InFlight:
    """One checkpoint under way."""

    step: int
    layout: Layout
    slot: Any  # store.Slot; None when nothing is written (mock)
    copy: Any  # engine.Checkpoint
    keep: list[Any] = field(default_factory=list)  # what must stay alive until it is copied
    versions: dict[int, tuple[Sequence, list[int]]] = field(default_factory=dict)  # layer -> its tensors, after the step
    looking: threading.Lock = field(default_factory=threading.Lock)  # held while they are compared and forgotten
    record: dict[str, Any] = field(default_factory=dict)  # the fields of the record, set when the step closes
    tensors: dict[str, Any] = field(default_factory=dict)  # of the extra state
    closed: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    deferred: list[tuple[int, Sequence]] = field(default_factory=list)  # layers to copy when the turn ends, and their tensors
    late: dict[str, Callable] = field(default_factory=dict)  # tensors of the extra state that a device still copies, by key
    turn: bool = False  # begun inside a turn of fxckpt.steps
    captured: bool = False  # buffers and early state are in
    phase: str = "waiting for its step to close"  # what the committer is at, for messages
    given_up: str | None = None
    error: BaseException | None = None
    failure: Exception | None = None  # what it failed of, counted and logged
    lock: Any = field(default_factory=threading.RLock)  # between emits, giving it up and releasing it; handlers of signals, too

    def note_versions(self) -> None:
        """Remember how what was handed over looks at the end of its step. Not at its emit: tensors that are views of one
        buffer count their changes together, and later updates of the same step are no changes behind our back."""
        for tensors, versions in self.versions.values():
            if not versions:
                versions.extend(map(version_of, tensors))

    def unwatch(self, layer: int) -> None:
        """A step that waits for this layer's copies may change it now; ``note_versions`` takes that back."""
        if (found := self.versions.get(layer)) is not None:
            found[1].clear()

    def emit(self, layer: int, sources: Any, streams: Any) -> None:
        """Hand a layer to the engine; nothing once it has ended, which it may in the middle of a step (its monitor died)."""
        with self.lock:
            if not self.done.is_set():
                self.copy.emit(layer, sources, streams)

    def close(self, record: dict[str, Any], tensors: dict[str, Any]) -> None:
        """The step is complete: with this the checkpoint can be committed."""
        self.record, self.tensors = record, tensors
        self.closed.set()

    def fail(self, error: Exception) -> bool:
        """Note what it failed of; False if that was known, and counted, already."""
        with self.lock:
            first = self.failure is None
            self.failure = self.failure or error
        return first

    def give_up(self, why: str) -> None:
        """Drop it: fences are released at once, the committer returns its slot."""
        with self.lock:
            if self.given_up is not None or self.done.is_set():
                return
            self.given_up = why
            self.copy.cancel()
        self.closed.set()

    def release(self) -> None:
        """Free the engine's side; nothing may cancel it afterwards."""
        with self.lock:
            self.done.set()
            self.copy.release()


class StallDetector:
    """Notices that nothing moves: ``over()`` once ``signs()`` has not changed for so many seconds."""

    def __init__(self, seconds: float, signs: Callable[[], Any]):
        self._seconds, self._signs = seconds, signs
        self._last, self._since = signs(), time.monotonic()

    def over(self) -> bool:
        now = self._signs()
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        return time.monotonic() - self._since > self._seconds


class Saver:
    """Takes checkpoints to the store, ``max_async`` at most at a time.

    ``store`` is None for ``writer="mock"``: everything happens but the write and the commit.
    """

    def __init__(self, engine, store, *, max_async: int, stuck_after: float = 300.0):
        self.engine, self.store, self.max_async, self.stuck_after = engine, store, max_async, stuck_after
        self.remote = getattr(store, "hands_over", False)  # a monitor writes and commits
        self._pid = os.getpid()
        self.started = self.committed = self.skipped = self.failed = 0
        self.last_handed_over: int | None = None
        self.last_committed: int | None = None
        self.last_error: BaseException | None = None
        self.unreported: BaseException | None = None
        self.wait_seconds = 0.0
        self.tracer: Any = None  # tracing.Tracer while somebody records
        self.trainer = threading.current_thread()  # the thread of the last step, ...
        self.progress_ticks = 0  # ... how often it came by, between two operations, ...
        self._inside = 0  # ... and whether it waits in here
        self._lock = threading.Condition()
        # Held while the store is asked for a slot and until that slot is in _flying: the store counts what it hands out,
        # and refuses more than max_async.
        self._slots = threading.Lock()
        self._reserved: dict[str, int] | None = None  # what the store has set space aside for
        self._hung: Any = None  # the signs of progress when a wait was given up
        self._queue: collections.deque[InFlight] = collections.deque()
        self._flying: list[InFlight] = []
        self._ready: Any = None
        self._stop = False
        self._thread: threading.Thread | None = None

    # -- the training thread's side ---------------------------------------------------------------------------------

    def flying(self) -> int:
        """Checkpoints begun and neither committed nor failed."""
        with self._lock:
            return len(self._flying)

    def stall_seconds(self) -> float:
        """Time the training thread has waited for us so far."""
        return self.wait_seconds + self.engine.statistics()["stall_seconds"]

    def under_way(self) -> list[InFlight]:
        """The checkpoints begun and not ended yet, oldest first. Only the training thread begins one."""
        if not self._flying:
            return []
        with self._lock:
            return list(self._flying)

    def patience(self) -> StallDetector:
        """For one wait. Longer than the committer's own, which ends what hangs where it can be ended."""
        return StallDetector(2 * self.stuck_after, self._signs)

    def _signs(self) -> Any:
        """Changes when anything in flight makes progress."""
        return self.engine.statistics()["bytes_written"], tuple((p.step, p.phase) for p in list(self._flying))

    def _what_is_stuck(self) -> str:
        """Each checkpoint in flight with what is being waited for, and the file operation that the committer is in."""
        each = "; ".join(f"step {p.step} is {p.phase}" for p in list(self._flying))
        return f"{each}{self._operation()}"

    def _operation(self) -> str:
        """The system call that the committer is in, if it is in one."""
        from fxckpt.engine import io

        operation = io.running(self._thread.ident) if self._thread is not None else None
        return f", in {operation}" if operation is not None else ""

    def _hangs(self, waited: StallDetector) -> bool:
        """Whether training is to stop waiting; it does not wait a second time on what hung before and has not moved."""
        if self._hung == (signs := self._signs()) or waited.over():
            self._hung = signs
            return True
        return False

    def begin(self, step: int, layout: Layout, *, wait: bool, name: str | None = None) -> InFlight | None:
        """Start a checkpoint; None when ``max_async`` are in flight and ``wait`` is false (counted as skipped).

        Raises SaveFailed when the slot or its files cannot be had.
        """
        if not self._room(wait):
            self.skipped += 1
            return None
        started = time.perf_counter()
        try:
            if not self._slots.acquire(timeout=2 * self.stuck_after):
                raise SaveFailed("wait", self.store.root, detail=f"the disk hangs: getting a slot ready{self._operation()}")
            try:
                pending = self._begin(step, layout, name)
            finally:
                self._slots.release()
        finally:
            self.wait_seconds += time.perf_counter() - started
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fxckpt-commit", daemon=True)
            self._thread.start()
        return pending

    def _begin(self, step: int, layout: Layout, name: str | None) -> InFlight:
        """Get a slot, open its files, and queue the checkpoint for the committer."""
        self._reserve(layout)
        slot = self._slot(name)
        try:
            on_disk = slot.recall(layout.frozen_token) if slot is not None and layout.frozen_token is not None else {}
            copy = self.engine.begin(
                layout.plan, slot.path if slot is not None else "", layout.names, [on_disk.get(name, {}) for name in layout.names]
            )
            if self.remote:
                self.store.begin(slot, copy, layout.files)
        except BaseException as error:
            if slot is not None:
                self.store.abandon(slot, bad=retires_slot(error))
            raise
        pending = InFlight(step, layout, slot, copy)
        if self.tracer is not None:
            self.tracer.began(copy.id, step, [layer.name for layer in layout.layers])
        with self._lock:
            self._flying.append(pending)
            self._queue.append(pending)
            self.started += 1
            self._lock.notify_all()
        return pending

    def _reserve(self, layout: Layout) -> None:
        """Have disk space set aside, at the first checkpoint and when the files' sizes changed. Raises NoSpace at the
        first one: a run that does not fit is a wrong setup. Later it is a failed save."""
        files = {file.name: file.nbytes for file in layout.files}
        if self.store is None or files == self._reserved:
            return
        try:
            self.store.reserve(files)
        except NoSpace as error:
            if self._reserved is None:
                raise
            raise SaveFailed("fallocate", self.store.root, None, errno.ENOSPC, str(error)) from error
        self._reserved = files

    def _room(self, wait: bool) -> bool:
        """Wait for one of the checkpoints in flight to end, if there are too many. Raises SaveFailed if none moves."""
        started, waited = time.perf_counter(), None
        with self._waiting(), self._lock:
            try:
                while len(self._flying) >= self.max_async and wait:
                    waited = waited or self.patience()
                    if self._hangs(waited):
                        raise SaveFailed(
                            "wait",
                            self._flying[0].slot.path if self._flying[0].slot else "",
                            detail=f"the disk hangs: {self._what_is_stuck()}",
                        )
                    self._lock.wait(SLICE)
            finally:
                self.wait_seconds += time.perf_counter() - started
            return len(self._flying) < self.max_async

    def _slot(self, name: str | None) -> Any:
        """The slot the committer has prepared, or a new one; ``_slots`` is held."""
        if self.store is None:
            return None
        slot, self._ready = self._ready, None
        if self.remote and slot is not None and slot.error is not None:
            slot = None  # it went with its monitor
        if slot is not None and name is None:
            return slot
        if slot is not None:
            self.store.abandon(slot, bad=False)
        return self.store.acquire(name)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around a wait of whatever thread."""
        trains = threading.current_thread() is self.trainer
        self._inside += trains
        try:
            yield
        finally:
            self._inside -= trains

    def flush(self, timeout: float | None, unclosed: bool = True) -> None:
        """Wait until all that is in flight now has ended; without ``unclosed``, all whose step has closed.

        Raises the first error not yet raised; TimeoutError, which names the steps and what is stuck, after ``timeout`` seconds,
        or without one once nothing has moved for twice ``stuck_after``.
        """
        began, waited = time.monotonic(), self.patience()
        with self._waiting(), self._lock:
            started = {p for p in self._flying if unclosed or p.closed.is_set()}  # another thread may train on, and begin more
            while left := [p for p in self._flying if p in started]:
                late = timeout is not None and time.monotonic() - began >= timeout
                if late or (timeout is None and waited.over()):
                    steps = ", ".join(str(p.step) for p in left)
                    raise TimeoutError(
                        f"after {time.monotonic() - began:.3g} s the checkpoints of steps {steps} are not "
                        f"durable yet: {self._what_is_stuck()}"
                    )
                self._lock.wait(SLICE if timeout is None else min(SLICE, max(began + timeout - time.monotonic(), 0.001)))
        self.raise_unreported()

    def wait_for(self, pending: InFlight) -> None:
        """Until this one is committed or has failed. Raises TimeoutError as ``flush`` does."""
        waited = self.patience()
        with self._waiting():
            while not pending.done.wait(SLICE):
                if waited.over():
                    raise TimeoutError(f"the checkpoint of step {pending.step} is not durable yet: {self._what_is_stuck()}")

    def raise_unreported(self) -> None:
        """Raise the first failure that nobody has been told of."""
        error, self.unreported = self.unreported, None
        if error is not None:
            raise error

    def forget(self, error: BaseException) -> None:
        """This failure was raised already."""
        if self.unreported is error:
            self.unreported = None

    def drop_all(self, why: str) -> None:
        """Give up every checkpoint in flight."""
        with self._lock:
            flying = list(self._flying)
        for pending in flying:
            pending.give_up(why)

    def abandon(self) -> None:
        """The run is gone: commit what was closed, drop the rest, stop."""
        if self.engine is None or os.getpid() != self._pid:  # disabled; or a forked child, where no thread would end a wait
            return
        with self._lock:
            unclosed = [p for p in self._flying if not p.closed.is_set()]
        for pending in unclosed:
            pending.give_up("its run is gone")
        try:
            self.stop(self.stuck_after)
        except (FxckptError, TimeoutError) as error:
            log.error("fxckpt: %s", error)

    def stop(self, timeout: float | None, unclosed: bool = True) -> None:
        """End the committer, the engine and the store; what is still in flight after ``timeout`` is given up.

        A committer that is stuck in a system call is left behind, and keeps the store's lock: it may still rename.
        """
        try:
            self.flush(timeout, unclosed)
        finally:
            self.drop_all("shutdown")
            with self._lock:
                self._stop = True
                self._lock.notify_all()
            if self._thread is not None:
                self._thread.join(timeout=min(SETTLE, 2 * self.stuck_after))
            self.engine.close()
            if self._thread is not None and self._thread.is_alive():
                log.error(
                    "fxckpt: the thread that commits is left behind%s; the store stays locked until this process ends",
                    self._operation(),
                )
            elif self.store is not None:
                self.store.close()

    # -- the committer's side ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Commit what is in the queue, in order, until ``stop``."""
        while True:
            with self._lock:
                while not self._queue and not self._stop:
                    self._lock.wait()
                if self._stop and not self._queue:
                    return
                pending = self._queue.popleft()
            self._finish(pending)
            self._prepare()

    def _finish(self, pending: InFlight) -> None:
        """Take one checkpoint to its end, whatever that is."""
        try:
            self._commit(pending)
        except Cancelled as error:
            self._ended(pending, pending.failure or error, dropped=True)
        except Exception as error:
            first = pending.fail(error)
            self._ended(pending, pending.failure, dropped=not first)
        else:
            self._ended(pending, None, dropped=False)

    def _commit(self, pending: InFlight) -> None:
        self._wait(pending, lambda: pending.closed.wait(SLICE), limit=False)
        if pending.given_up is not None:
            raise Cancelled(pending.given_up)
        pending.phase = "being copied out of memory"
        self._wait(pending, lambda: pending.copy.copied(SLICE))
        ended, progress_ticks = time.monotonic() + LONGEST + pending.layout.largest() / SLOWEST, self.progress_ticks
        while self.progress_ticks == progress_ticks and not self._inside and time.monotonic() < ended:
            time.sleep(0.001)  # an operation in place counts itself when it ends: one that began before may be under way
        pending.layout.check_unchanged(pending)
        if pending.given_up is not None:  # a later step looked first: what is on disk already, cancel() does not undo
            raise Cancelled(pending.given_up)
        pending.keep.clear()
        if not self.remote:
            self.last_handed_over = pending.step
        pending.phase = f"being written to {pending.slot.path if pending.slot is not None else 'nowhere'}"
        self._wait(pending, lambda: pending.copy.durable(SLICE))  # with a monitor: in the shared memory, or written
        if self.store is None:
            return
        layout = pending.layout
        crcs = [pending.copy.crcs(i) for i in range(len(layout.files))]
        files = tuple(FileRecord(f.name, f.nbytes, layout.chunk_bytes, tuple(c)) for f, c in zip(layout.files, crcs))
        if layout.frozen_token is not None:
            pending.slot.remember(layout.frozen_token, layout.frozen_chunks(crcs))
        tensors = {**pending.tensors, **{key: wait() for key, wait in pending.late.items()}}
        fields = {name: value() if callable(value) else value for name, value in pending.record.items()}
        record = Record(files=files, **fields)
        started, tracer = time.monotonic_ns(), self.tracer
        pending.phase = f"being committed in {pending.slot.path}"
        if self.remote:
            self.store.hand_over(pending.slot, record, tensors)
            self.last_handed_over = pending.step
            self._wait(pending, lambda: pending.slot.ended(SLICE))
        else:
            self.store.commit(pending.slot, record, tensors)
        if tracer is not None:
            tracer.add(f"commit of step {pending.step}", tracing.COMMITS, started, step=pending.step)
        self.last_committed = pending.step

    def _wait(self, pending: InFlight, ready: Callable[[], bool], limit: bool = True) -> None:
        """Wait in slices; a disk that writes nothing for ``stuck_after`` seconds costs this checkpoint, not training."""
        waited = StallDetector(self.stuck_after, lambda: self.engine.statistics()["bytes_written"])
        while not ready():
            if self.remote and pending.slot.error is not None:
                pending.give_up("the monitor could not write it")
                raise pending.slot.error
            if limit and waited.over():
                path = pending.slot.path if pending.slot is not None else ""
                pending.give_up("the disk hangs")
                raise SaveFailed("write", path, detail=f"nothing was written for {self.stuck_after:g} s; gave up")

    def _ended(self, pending: InFlight, error: BaseException | None, dropped: bool) -> None:
        """Count, log, return the slot, and let waiters go on."""
        if error is not None and pending.slot is not None:
            pending.phase = f"being given up in {pending.slot.path}"
            # A write that hangs in the disk may still land: until it has, nobody else may have the slot's files.
            settled = pending.copy.settled(SETTLE)
            self.store.abandon(pending.slot, bad=not settled or (not dropped and retires_slot(error)))
        pending.error = error
        with self._lock:
            self._flying.remove(pending)
            if error is None:
                self.committed += self.store is not None
            elif dropped:
                self.skipped += pending.failure is None
                log.info("fxckpt: the checkpoint of step %d was dropped: %s", pending.step, error)
            else:
                self.note_failure(pending.step, error)
            pending.release()
            self._lock.notify_all()

    def note_failure(self, step: int, error: BaseException) -> None:
        """A checkpoint failed: say so at once, count it, keep it for ``flush``."""
        self.failed += 1
        self.last_error = error
        self.unreported = self.unreported or error
        log.error("fxckpt: the checkpoint of step %d failed: %s", step, error)

    def _prepare(self) -> None:
        """Get the next slot ready now, so that the training thread need not wait for its fsyncs."""
        with self._slots:
            if self.store is None or self._ready is not None or self._stop or self.flying() >= self.max_async:
                return
            try:
                self._ready = self.store.acquire()
            except (OSError, FxckptError) as error:
                log.debug("no slot prepared: %s", error)  # begin() asks again, and fails the checkpoint if it must
