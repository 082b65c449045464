"""The checkpoints under way in the monitor: what was posted of them is written, and what was handed over is committed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fxckpt.engine import SLICE, Checkpoint, Engine, Plan
from fxckpt.engine.ring import Ring, emit_posted
from fxckpt.errors import Cancelled, Corrupt, FxckptError
from fxckpt.monitor import wire
from fxckpt.store.commit_loop import SETTLE, CommitLoop, give_back
from fxckpt.store.dtypes import RawTensor
from fxckpt.store.record import Record
from fxckpt.store.slot import Slot, retires_slot
from fxckpt.store.slots import Store

log: logging.Logger = logging.getLogger("fxckpt")


@dataclass(eq=False)
class InFlight:
    """One checkpoint under way here."""

    key: int  # of its slot
    number: int  # in the trainer's engine
    slot: Slot
    copy: Checkpoint  # of our engine
    record: Record | None = None  # once it was handed over
    tensors: dict[str, RawTensor] = field(default_factory=dict)  # of the extra state, likewise

    @property
    def path(self) -> str:
        return self.slot.path

    def give_up(self, why: str) -> None:
        self.copy.cancel()


class Checkpoints:
    """All checkpoints and slots that the trainer asked for. The clerk begins, hands over and abandons; the feeder feeds; a
    ``CommitLoop`` commits. ``tell`` sends the trainer a message."""

    def __init__(self, store: Store, engine: Engine, ring: Ring, tell: Callable[[wire.Message], None]):
        self.store: Store = store
        self._engine, self._ring, self._tell = engine, ring, tell
        self._lock = threading.Lock()  # flights, and the life of their copies
        self._flights: dict[int, InFlight] = {}  # by the trainer's number
        self._slots: dict[int, Slot] = {}  # acquired, by key
        self._plans: dict[tuple[tuple[str, int], ...], Plan] = {}
        self._newest = 0
        self._loop: CommitLoop[InFlight] = CommitLoop(lambda: engine.statistics()["bytes_written"])
        self._loop.start(self)

    # -- what the trainer asks for -----------------------------------------------------------------------------------

    def acquire(self, key: int, name: str | None, journal: bool) -> Slot:
        """A slot of the store, known by this key from now on."""
        slot = self._slots[key] = self.store.acquire(name, journal)
        return slot

    def begin(self, key: int, number: int, files: tuple[tuple[str, int], ...]) -> None:
        """Open the slot's files (name, bytes). What was posted of this checkpoint already can be fed from now on."""
        slot = self._slots[key]
        try:
            if slot.was_replaced():  # since the trainer got it
                journal = self.store.is_record(slot)
                self.store.abandon(slot, bad=False)
                slot = self.acquire(key, slot.name, journal)
            self.store.begin(slot, number, [])
            which = [name for name, _ in files]
            waited = [slot.waited(name) for name in which]
            copy = self._engine.begin(self._plan(files), slot.path, which, waited=waited, below=slot.below)
            slot.opened(dict(zip(which, copy.inodes())))
        except (FxckptError, OSError) as error:
            self._newest = number
            self.store.abandon(self._slots.pop(key), bad=retires_slot(error))
            self._tell_end(key, slot, error)
            return
        with self._lock:
            self._newest, self._flights[number] = number, InFlight(key, number, slot, copy)

    def _plan(self, files: tuple[tuple[str, int], ...]) -> Plan:
        """Files whose every chunk comes as a whole: one layer for each."""
        if files not in self._plans:
            chunk = self._engine.chunk_bytes
            cuts = [(f, at, min(chunk, n - at), 1) for f, (_, n) in enumerate(files) for at in range(0, n, chunk)]
            geometry = [(layer, *cut) for layer, cut in enumerate(cuts)]
            self._plans = {files: self._engine.plan([(n, b"") for _, n in files], geometry, len(cuts))}
        return self._plans[files]

    def hand_over(self, message: wire.Message, blob: memoryview) -> None:
        """All that is not bulk came: record and tensors of the extra state. It can be committed once its bytes are written."""
        with self._lock:
            flight = self._flights.get(message["checkpoint"])
        if flight is None:
            return  # it ended, and the trainer was told why
        at = message["record"]
        try:
            record = Record.from_bytes(bytes(blob[:at]), flight.path)
        except Corrupt as error:
            self.end(flight, error)
            return
        for key, dtype, shape, nbytes in message["tensors"]:
            flight.tensors[key] = RawTensor(dtype, tuple(shape), blob[at : at + nbytes])
            at += nbytes
        if message["frozen"] is not None:
            token, chunks, size = message["frozen"]
            digests = {name: {int(i): digest for i, digest in each.items()} for name, each in chunks.items()}
            flight.slot.remember(token, digests, size)
        flight.record = record
        self._loop.put(flight)

    def abandon(self, key: int, bad: bool) -> None:
        """The trainer gave this slot up, with the checkpoint in it if there is one."""
        with self._lock:
            flight = next((each for each in self._flights.values() if each.key == key), None)
            if flight is not None:
                flight.copy.cancel()  # the committer ends it if it has it already
        if flight is None:
            slot = self._slots.pop(key, None)
            if slot is not None:
                self.store.abandon(slot, bad=bad)
        elif flight.record is None:
            self.end(flight, Cancelled("the trainer gave it up"))

    # -- the feeder's side -------------------------------------------------------------------------------------------

    def feed(self, over: bool) -> None:
        """Give what was posted to the engine; ``over``: nothing more will begin."""
        for posted in self._ring.next_posted():
            with self._lock:
                flight = self._flights.get(posted.checkpoint)
                if flight is None and posted.checkpoint > self._newest and not over:
                    continue  # the clerk has not come to its beginning yet, and wakes us when it has
                if flight is None or not emit_posted(flight.copy, posted):
                    self._ring.give_back(posted)

    def note_finishing(self) -> None:
        """For the next life of the trainer, which waits for the lock."""
        try:
            self.store.note_lock("finishing")
        except OSError as error:
            log.warning("cannot note in the store's lock that its trainer is gone: %s", error)

    def finish(self) -> None:
        """Drop what the trainer did not live to hand over, commit the rest, and close."""
        with self._lock:
            left = [flight for flight in self._flights.values() if flight.record is None]
        for flight in left:
            self.end(flight, Cancelled("the trainer ended before it handed this checkpoint over"))
        with self._lock:
            used = {flight.key for flight in self._flights.values()}
            unused = [self._slots.pop(key) for key in list(self._slots) if key not in used]
        for slot in unused:
            self.store.abandon(slot, bad=False)
        self._loop.end()
        self._engine.close(SETTLE)
        self.store.close()

    # -- the committer's side ----------------------------------------------------------------------------------------

    def commit(self, flight: InFlight) -> None:
        """Wait for the disk, then make it a checkpoint."""
        self._loop.wait(flight, lambda: flight.copy.durable(SLICE))
        assert flight.record is not None  # it was handed over
        self.store.commit(flight.slot, flight.record, flight.tensors)

    def end(self, flight: InFlight, error: Exception | None) -> None:
        """Return the slot if it was no success, and tell the trainer."""
        if error is not None:
            give_back(self.store, flight.slot, flight.copy, error)
        with self._lock:
            del self._flights[flight.number]
            self._slots.pop(flight.key, None)
            flight.copy.release()
        self._tell_end(flight.key, flight.slot, error)

    def rest(self, busy: Callable[[], bool]) -> None:
        """Have a checkpoint read back, and tell the trainer of one that does not verify."""
        if (found := self.store.read_back(busy)) is not None:
            step, error = found
            self._tell({"rotten": step, "error": None if error is None else wire.pack_error(error)})

    def _tell_end(self, key: int, slot: Slot, error: Exception | None) -> None:
        packed = None if error is None else wire.pack_error(error)
        self._tell({"ended": key, "generation": slot.generation, "path": slot.path, "error": packed})
