"""What is done on the thread that commits: each checkpoint is taken to its commit, and a slot got ready for the next."""

from __future__ import annotations

import errno
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from fxckpt.engine import SLICE, PatientLock
from fxckpt.errors import Cancelled, FxckptError, NoSpace, RanksDisagree, SaveFailed
from fxckpt.ranks.rendezvous import Unlike
from fxckpt.ranks.replicas import BESIDE, checksums
from fxckpt.saving import tracing
from fxckpt.saving.flights import Flights, Tally
from fxckpt.saving.guard import Changed, Mixed
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.landing import Landing
from fxckpt.saving.plan import Layout
from fxckpt.saving.ranks import Ranks
from fxckpt.saving.reporter import Reporter
from fxckpt.saving.stores import CheckpointSlot, CheckpointStore
from fxckpt.store.about import ALIKE, CHECKED
from fxckpt.store.commit_loop import give_back
from fxckpt.store.journaled import durable_steps
from fxckpt.store.record import FileRecord, Record

log: logging.Logger = logging.getLogger("fxckpt")


class SlotSupply:
    """Asks the store for slots. ``ready`` is one that the committer has prepared: training need not wait for its syncs;
    ``ready_record`` the same for a record of the journal, where any are asked for."""

    def __init__(self, store: CheckpointStore, flights: Flights):
        self.ready: CheckpointSlot | None = None
        self.ready_record: CheckpointSlot | None = None
        self._journals = False  # records are asked for, too
        self._store, self._flights = store, flights
        # Held while the store is asked for a slot and until that slot's checkpoint is in flight: the store counts what it hands
        # out, and refuses more than max_async.
        self.lock: PatientLock = PatientLock(lambda: 2 * flights.loop.stuck_after, self._hangs)
        self._reserved: dict[bool, dict[str, int]] = {}  # what the store has set space aside for

    def _hangs(self) -> SaveFailed:
        """The loop's thread hangs while it prepares a slot."""
        what = f"the disk hangs: getting a slot ready{self._flights.loop.operation()}"
        return SaveFailed("wait", self._store.root, detail=what)

    def take(self, layout: Layout, name: str | None, journal: bool = False) -> CheckpointSlot:
        """The slot that was prepared, or a new one, with space for these files; ``lock`` is held."""
        self._journals |= journal
        self._reclaim()
        self._reserve(layout, journal)
        if journal:
            slot, self.ready_record = self.ready_record, None
        else:
            slot, self.ready = self.ready, None
        if slot is not None and slot.error is None:  # else it went with its monitor
            if name is None and not _was_replaced(slot):
                return slot
            self._store.abandon(slot, bad=False)
        return self._store.acquire(name, journal) if journal else self._store.acquire(name)

    def _reclaim(self) -> None:
        """A slot of no checkpoint in flight was lost to Ctrl-C on its way here, and goes back."""
        used = [each.slot for each in self._flights.under_way()]
        self._store.reclaim([*used, *(each for each in (self.ready, self.ready_record) if each is not None)])

    def _reserve(self, layout: Layout, journal: bool) -> None:
        """Have disk space set aside, at the first checkpoint and when the files' sizes changed. Raises NoSpace at the
        first one: a run that does not fit is a wrong setup. Later it is a failed save. Of records, which differ in what is in
        them, the first and larger ones count."""
        files = {file.name: file.nbytes for file in layout.files}
        before = self._reserved.get(journal)
        if files == before or (journal and before is not None and sum(files.values()) <= sum(before.values())):
            return
        try:
            self._store.reserve(files, journal) if journal else self._store.reserve(files)
        except NoSpace as error:
            if before is None:
                raise
            raise SaveFailed("fallocate", self._store.root, None, errno.ENOSPC, str(error)) from error
        self._reserved[journal] = files

    def prepare(self, wanted: Callable[[], bool]) -> None:
        """Get the next slot ready now, on the thread that commits: where records are asked for, one of each kind."""
        try:
            with self.lock:
                if self.ready is None and wanted():
                    self._reclaim()
                    self.ready = self._store.acquire()
                if self._journals and self.ready_record is None and wanted():
                    self._reclaim()
                    self.ready_record = self._store.acquire(None, True)
        except (OSError, FxckptError) as error:
            log.debug("no slot prepared: %s", error)  # begin() asks again, and fails the checkpoint if it must


def _was_replaced(slot: CheckpointSlot) -> bool:
    """Has somebody put another directory in its place? Where nobody may look, asking the store for another slot says why."""
    try:
        return slot.was_replaced()
    except OSError:
        return True


class Committer:
    """Waits until a checkpoint's step has closed, its bytes are copied, unchanged and durable; commits it, counts it and gets
    the next slot ready."""

    def __init__(
        self, store: CheckpointStore, supply: SlotSupply, flights: Flights, tally: Tally, reporter: Reporter, ranks: Ranks
    ):
        self._store, self._supply, self._flights, self._tally, self._reporter = store, supply, flights, tally, reporter
        self._ranks = ranks
        self._last = Landing()  # of the last full checkpoint

    def commit(self, pending: InFlight) -> None:
        """Take it to the commit. Raises what went wrong; Cancelled if it was given up."""
        if pending.done.is_set():
            return  # it was put in twice
        while not self._or_lost(pending, pending.closed.wait(SLICE)):
            continue
        _check_wanted(pending)
        if pending.link is not None:
            pending.link.check()
        pending.phase = "being copied out of memory"
        self._wait(pending, lambda: pending.copy.copied(SLICE))
        self._wait(pending, lambda: pending.link is None or pending.link.copied(SLICE))
        self._flights.trainer.let_come_by(pending.layout.largest)
        pending.guard.check_unchanged()
        if pending.link is not None:
            pending.link.take_digest()
        _check_wanted(pending)  # a later step looked first: what is on disk already, cancel() does not undo
        if not self._store.hands_over:
            self._tally.last_handed_over = pending.step
        pending.phase = f"being written to {pending.path or 'nowhere'}"
        self._wait(pending, lambda: pending.copy.durable(SLICE))
        files = _file_records(pending)
        tensors = {key: value() if callable(value) else value for key, value in pending.record.pop("state_tensors").items()}
        fields = {name: value() if callable(value) else value for name, value in pending.record.items()}
        if pending.link is not None:
            pending.phase = "waiting for the answer whether its step can be made again"
            fields["journal"] = pending.link.record()
        if pending.layout.alike:
            fields["state"] = {**fields["state"], ALIKE: pending.layout.alike, CHECKED: _checksums(pending)}
        started, tracer = time.monotonic_ns(), self._flights.tracer
        self._wait(pending, lambda: self._joined(pending))
        pending.phase = f"being committed in {pending.path}"
        record = self._ranks.described(Record(files=files, **fields))
        self._store.commit(pending.slot, record, tensors)
        self._tally.last_handed_over = pending.step
        pending.phase = "waiting for rank 0, which commits it" if self._store.part[0] else pending.phase
        self._wait(pending, lambda: self._ended(pending))
        if pending.slot.generation is None:
            return
        self._ranks.committed(record, pending.slot.generation)
        if tracer is not None:
            tracer.add(f"commit of step {pending.step}", tracing.COMMITS, started, step=pending.step)
        self._tally.last_committed = pending.step

    def _wait(self, pending: InFlight, ready: Callable[[], bool]) -> None:
        """Wait for the engine, the disk or other ranks; see ``CommitLoop.wait``."""
        self._flights.loop.wait(pending, lambda: self._or_lost(pending, ready()), lambda: self._doing(pending))

    def _doing(self, pending: InFlight) -> str:
        """What is being waited for, where that may be other ranks."""
        if self._store.part[1] == 1:
            return ""
        return f". It was {pending.phase}. All ranks must call save() alike, or one of them hangs or is dead"

    def _joined(self, pending: InFlight) -> bool:
        """Have the other ranks that write it done their part?"""
        _check_wanted(pending)
        if missing := self._store.missing(pending.slot, SLICE):
            pending.phase = f"waiting for the parts of ranks {', '.join(map(str, missing[:8]))}{' ...' if missing[8:] else ''}"
            self._check_not_left(pending)
        return not missing

    def _ended(self, pending: InFlight) -> bool:
        """Has the commit, in another process perhaps, come to its end?"""
        if not (over := pending.slot.ended(SLICE)) and self._store.part[0]:
            self._check_not_left(pending)
        return over

    def _check_not_left(self, pending: InFlight) -> None:
        """Raises RanksDisagree where this process ends with an exception, and others have had their time."""
        if self._flights.has_left():
            raise RanksDisagree(
                f"this process ends with an exception, and waits no longer for a checkpoint that is {pending.phase}: who does "
                "not answer hangs, or is dead. Restart the whole job: it goes on from the checkpoint before"
            )

    def _or_lost(self, pending: InFlight, ready: bool) -> bool:
        """Is it ready? Raises why it will not be, if it went with the process that writes it."""
        if not ready and pending.slot.error is not None:
            pending.give_up("the monitor could not write it")
            raise pending.slot.error
        return ready

    def end(self, pending: InFlight, error: Exception | None) -> None:
        """Return the slot, count, log, let waiters go on; then prepare."""
        if pending.done.is_set():
            return
        dropped = isinstance(error, Cancelled) or (error is not None and not pending.fail(error))
        if error is not None:
            pending.phase = f"being given up in {pending.path}"
            give_back(self._store, pending.slot, pending.copy, error)
        pending.error = error = error and (pending.failure or error)
        _land(pending)
        if error is None and pending.link is None:
            self._last = pending.landing
        if error is not None:
            traceback.clear_frames(error.__traceback__)  # they hold the checkpoint, and it holds what it copied
        with self._flights.lock:
            if error is None:
                self._tally.committed += pending.slot.generation is not None
                self._tally.records += pending.slot.generation is not None and pending.link is not None
                self._tally.mixed.clear()
            elif dropped:
                self._tally.skipped += pending.failure is None and not pending.replaced
                said = logging.WARNING if isinstance(error, Changed) and not pending.replaced else logging.INFO
                log.log(said, "fxckpt: the checkpoint of step %d was dropped: %s", pending.step, error)
            else:
                self._tally.note_failure(pending.step, error)
            if isinstance(error, Mixed):
                self._tally.mixed.append(error)
        pending.phase = "told to callbacks"  # without a lock, and before those who wait for it go on
        self._reporter.ended(pending)
        with self._flights.lock:
            self._flights.remove(pending)
        flights = self._flights
        self._supply.prepare(lambda: not flights.loop.ending and len(flights.under_way()) < flights.max_async)

    def rest(self, busy: Callable[[], bool]) -> None:
        """Have a checkpoint or a record of the journal read back. One that does not verify has failed after all, and neither it
        nor a step that is made again from it is the last one that is safe."""
        if (found := self._store.read_back(busy)) is None:
            return
        step, error = found
        self._last.failed = True  # no further record of the journal is to build on it
        with self._flights.lock:
            left = durable_steps(self._store.root)
            if self._tally.last_committed not in left:
                self._tally.last_committed = left[-1] if left else None
            if error is not None:
                self._tally.note_failure(step, error)  # last: who asks for the statistics takes no lock
        if error is not None:
            self._reporter.failed(step, error)


def _land(pending: InFlight) -> None:
    """Note what became of it, for records of a journal that build on it."""
    landing = pending.landing
    landing.failed, landing.generation = pending.error is not None, pending.slot.generation
    landing.unlike = isinstance(pending.error, Unlike)
    if pending.error is None:
        landing.nbytes = sum(file.nbytes for file in pending.layout.files)
        landing.seconds = time.monotonic() - pending.begun[1]


def _check_wanted(pending: InFlight) -> None:
    """Raises Cancelled if it was given up."""
    if pending.given_up is not None:
        raise Cancelled(pending.given_up)


def _checksums(pending: InFlight) -> dict[str, Any]:
    """What this rank has in place of another one's part; see ``ranks.replicas``."""
    layout = pending.layout
    numbers = range(len(layout.files), len(layout.files) + len(layout.checked))
    found = checksums(layout.files, layout.checked, [pending.copy.crcs(i) for i in numbers], layout.sum_bytes)
    return {**found, BESIDE: pending.beside}


def _file_records(pending: InFlight) -> tuple[FileRecord, ...]:
    """The files with the checksums of their chunks; the slot remembers those that hold nothing but frozen parameters."""
    layout = pending.layout
    crcs = [pending.copy.crcs(i) for i in range(len(layout.files))]
    pending.slot.opened(dict(zip([file.name for file in layout.files], pending.copy.inodes())))
    if layout.frozen_token is not None:
        pending.slot.remember(layout.frozen_token, layout.frozen_chunks(crcs), layout.plan.chunk_bytes)
    return tuple(FileRecord(f.name, f.nbytes, layout.sum_bytes, c) for f, c in zip(layout.files, crcs))
