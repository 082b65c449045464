"""Checkpoints from the first emit to the commit, off the training thread: Saver.

The training thread begins a checkpoint, emits layers and closes it (``in_flight``); the engine's threads copy and write; one
Python thread waits for them and commits in order (``committer``). All waits happen in slices, so Ctrl-C works.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from fxckpt.engine import Checkpoint, Engine
from fxckpt.errors import FxckptError
from fxckpt.ranks import least_kept
from fxckpt.ranks.replication import Replication
from fxckpt.saving.committer import Committer, SlotSupply
from fxckpt.saving.flights import Flights, Tally, TrainingThread
from fxckpt.saving.guard import Guard
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.landing import Link
from fxckpt.saving.plan import Layout
from fxckpt.saving.ranks import Ranks
from fxckpt.saving.reporter import Reporter
from fxckpt.saving.stores import CheckpointSlot, CheckpointStore
from fxckpt.store.about import About
from fxckpt.store.commit_loop import SETTLE, CommitLoop, Errand
from fxckpt.store.slot import retires_slot

log: logging.Logger = logging.getLogger("fxckpt")


def _stall_of(tally: Tally, engine: Engine | None) -> Callable[[], float]:
    """Asks for the seconds that the training thread has waited."""
    return lambda: tally.wait_seconds + (0.0 if engine is None else engine.statistics()["stall_seconds"])


class Saver:
    """Begins a run's checkpoints, ``max_async`` at a time, and ends all of it. ``engine`` is None where fxckpt is turned off."""

    def __init__(
        self, engine: Engine | None, store: CheckpointStore, *, max_async: int, every: int | str = 1, keep: int = 1,
        replication: Replication | None = None,
    ):  # fmt: skip
        self.engine: Engine | None = engine
        self.store: CheckpointStore = store
        self.tally: Tally = Tally()
        self.about: About = About(every, os.getpid())
        self.trainer: TrainingThread = TrainingThread()
        self.loop: CommitLoop[InFlight] = CommitLoop(lambda: 0 if engine is None else engine.statistics()["bytes_written"])
        self.flights: Flights = Flights(self.loop, max_async, self.trainer)
        self.supply: SlotSupply = SlotSupply(store, self.flights)
        self.reporter: Reporter = Reporter(self.about, self.loop, _stall_of(self.tally, engine))
        self.ranks: Ranks = Ranks(store, least_kept(keep, max_async), 1 if engine is None else every, replication)
        self._committer = Committer(store, self.supply, self.flights, self.tally, self.reporter, self.ranks)
        self._records = 0  # of the journal that were begun
        self._pid = os.getpid()

    def stall_seconds(self) -> float:
        """Time the training thread has waited for us so far."""
        return _stall_of(self.tally, self.engine)()

    def not_begun(self, step: int, error: BaseException) -> None:
        """The checkpoint of this step could not be begun: count it, and have it told."""
        self.tally.note_failure(step, error)
        self.loop.start(self._committer)
        self.reporter.failed(step, error)

    def begin(self, step: int, layout: Layout, name: str | None = None, link: Link | None = None) -> InFlight:
        """Start a checkpoint, once fewer than ``max_async`` are in flight; ``name`` makes it a named save, ``link`` a record of
        the journal. Raises SaveFailed if none of them ends, or if the slot or its files cannot be had."""
        self.loop.start(self._committer)
        with self.tally.waiting():
            self.flights.wait_for_room()
            with self.supply.lock:
                return self._begin(step, layout, name, link)

    def _begin(self, step: int, layout: Layout, name: str | None, link: Link | None) -> InFlight:
        """Get a slot, open its files, and queue the checkpoint for the committer."""
        assert self.engine is not None  # a run that is turned off begins none
        slot = copy = pending = None
        begun = False
        try:
            slot = self.supply.take(layout, name, link is not None)
            on_disk = slot.recall(layout.frozen_token) if layout.frozen_token is not None else {}
            files = [file.name for file in layout.files]
            files += ["" for _ in layout.checked]
            known = [on_disk.get(name, {}) for name in files]
            waited = [slot.waited(name) if name else None for name in files]
            copy = self.engine.begin(layout.plan, slot.path, files, known, waited, slot.below)
            self.store.begin(slot, copy.id, layout.files, step)
            begun = True
            number = self.tally.started if link is None else self._records  # the first few are looked at from end to end
            pending = InFlight(step, layout, slot, copy, Guard(step, layout, number), link)
            if self.flights.tracer is not None:
                self.flights.tracer.began(copy.id, step, [layer.name for layer in layout.layers])
            with self.flights.lock:
                self.flights.add(pending)
                self.tally.started += 1
                self._records += link is not None
            return pending
        except BaseException as error:
            if pending is not None and self.flights.is_flying(pending):
                pending.give_up("it was interrupted when it had begun")
            else:
                self._take_back(slot, copy, error)
            if not begun and (tell := self.store.not_begun(step, name, str(error))) is not None:
                self.loop.put(Errand(tell))  # in its turn
            raise

    def _take_back(self, slot: CheckpointSlot | None, copy: Checkpoint | None, error: BaseException) -> None:
        """Nothing was written to this slot, and nobody else will hear of it."""
        if copy is not None:
            copy.release()
        if slot is not None:
            self.store.abandon(slot, bad=retires_slot(error))

    def flush(self, timeout: float | None, unclosed: bool = True) -> None:
        """Wait for what is in flight, as ``Flights.wait_for_all``; then raise the first error that was not raised yet."""
        self.flights.wait_for_all(timeout, unclosed)
        self.tally.raise_unreported()

    def stop(self, timeout: float | None, unclosed: bool = True) -> None:
        """End the committer, the engine and the store; what is still in flight after ``timeout`` is given up. A committer that
        is stuck in a system call is left behind, and keeps the store's lock: it may still rename."""
        try:
            self.flush(timeout, unclosed)
        finally:
            self.flights.drop_all("shutdown")
            ended = self.loop.end(min(SETTLE, 2 * self.loop.stuck_after))
            self.ranks.stop()
            if self.engine is not None:
                self.engine.close()
            if ended:
                self.store.close()
            else:
                left = f"the thread that commits is left behind{self.loop.operation()}"
                log.error("fxckpt: %s; the store stays locked until this process ends", left)

    def abandon(self) -> None:
        """The run is gone: commit what was closed, drop the rest, stop."""
        if self.engine is None or os.getpid() != self._pid:  # disabled; or a forked child, where no thread would end a wait
            return
        for pending in self.flights.under_way():
            if not pending.closed.is_set():
                pending.give_up("its run is gone")
        if self.loop.is_current():  # the garbage collector ran here: this thread cannot wait for its own work
            threading.Thread(target=self._stop_abandoned, name="fxckpt-abandon").start()
        else:
            self._stop_abandoned()

    def _stop_abandoned(self) -> None:
        try:
            self.stop(self.loop.stuck_after)
        except (FxckptError, TimeoutError) as error:
            log.error("fxckpt: %s", error)
