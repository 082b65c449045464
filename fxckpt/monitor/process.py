"""The monitor process. Three threads, none of which ever waits for the trainer to do something:

    feeder (main)   gives posted slots to the engine; watches the trainer's pidfd
    clerk           reads the socket: slots of the store, records of checkpoints that were handed over
    committer       waits until a handed-over checkpoint is durable, and commits it; in order

The trainer's end, however it comes, is the end of the socket's stream: what was handed over until then is committed, the
rest is dropped, and the process exits. A forked data loader's worker may hold the socket open after the trainer's death, so
that is learned from the pidfd.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxckpt.engine import Engine
from fxckpt.engine.ring import Ring, emit_posted, write_from
from fxckpt.errors import Cancelled, Corrupt, FxckptError, SaveFailed
from fxckpt.monitor import wire
from fxckpt.store.record import RawTensor, Record
from fxckpt.store.slot import retires_slot
from fxckpt.store.slots import Store

log = logging.getLogger("fxckpt")

SLICE = 0.5
STUCK_AFTER = 300.0  # seconds without a byte written, when nobody is there any more to say how long to wait
SETTLE = 10.0  # seconds to wait for writes of a checkpoint that was given up
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Sent to whole groups and sessions to end the trainer; the monitor ends by itself right after it."""


@dataclass(eq=False)
class InFlight:
    """One checkpoint under way here."""

    key: int  # of its slot
    checkpoint: int  # in the trainer's engine
    slot: Any
    copy: Any = None  # of our engine; None if it could not begin
    handed_over: bool = False
    record: Record | None = None
    tensors: dict[str, RawTensor] | None = None
    frozen: Any = None
    error: Exception | None = None


class Monitor:
    """All of the process; ``run`` is its life."""

    def __init__(self, control: socket.socket, ring: Ring, trainer: int):
        self.control, self.ring, self.trainer = control, ring, trainer
        self.engine: Any = None
        self.store: Any = None
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()  # flights, and the life of their copies
        self._sending = threading.Lock()
        self._flights: dict[int, InFlight] = {}  # by the trainer's checkpoint
        self._slots: dict[int, Any] = {}  # acquired, by key
        self._plans: dict[tuple, Any] = {}
        self._newest = 0
        self._over = False  # nothing will come through the socket any more
        self._queue: queue.SimpleQueue[InFlight | None] = queue.SimpleQueue()

    # -- feeder ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until the trainer is gone and everything that it handed over is committed."""
        clerk = threading.Thread(target=self._read, name="fxckpt-clerk")
        committer = threading.Thread(target=self._commit_all, name="fxckpt-commit")
        clerk.start()
        committer.start()
        poll = select.poll()
        for fd in (self.ring.posted, self.trainer, self.wake):
            poll.register(fd, select.POLLIN)
        while not self._over:
            for fd, _ in poll.poll():
                if fd == self.trainer:
                    poll.unregister(fd)
                    self._trainer_died()
                else:
                    _clear(fd)
            self._feed()
        clerk.join()
        self._note_finishing()
        self._feed()
        self._drop_the_rest()
        self._queue.put(None)
        committer.join()
        if self.engine is not None:
            self.engine.close(SETTLE)
        if self.store is not None:
            self.store.close()

    def _trainer_died(self) -> None:
        """What it sent is in the socket, and nothing else will come: let the clerk come to the end of it."""
        self.control.shutdown(socket.SHUT_RD)
        self._note_finishing()

    def _note_finishing(self) -> None:
        """For the next life of the trainer, which waits for the lock."""
        if self.store is not None:
            try:
                self.store.note_lock("finishing")
            except OSError as error:
                log.warning("cannot note in the store's lock that its trainer is gone: %s", error)

    def _feed(self) -> None:
        """Give what was posted to the engine."""
        for posted in self.ring.next_posted():
            with self._lock:
                flight = self._flights.get(posted.checkpoint)
                if flight is None and posted.checkpoint > self._newest and not self._over:
                    continue  # the clerk has not come to its beginning yet, and wakes us when it has
                if flight is None or flight.copy is None or not emit_posted(flight.copy, posted):
                    self.ring.give_back(posted)

    def _drop_the_rest(self) -> None:
        """Checkpoints and slots that the trainer did not live to hand over."""
        with self._lock:
            left = [flight for flight in self._flights.values() if not flight.handed_over]
        for flight in left:
            flight.error = flight.error or Cancelled("the trainer ended before it handed this checkpoint over")
            self._end(flight)
        done = {flight.key for flight in self._flights.values()}
        for key in [key for key in self._slots if key not in done]:
            self.store.abandon(self._slots.pop(key), bad=False)

    # -- clerk -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Carry out the trainer's messages, in order."""
        try:
            while (frame := wire.receive(self.control)) is not None:
                message, blob = frame
                if message["op"] == "close":
                    break
                self._carry_out(message, blob)
        except BaseException:
            log.exception("the monitor's clerk failed; what was handed over is finished, then the monitor ends")
        finally:
            self._over = True
            _signal(self.wake)

    def _carry_out(self, message: dict[str, Any], blob: memoryview) -> None:
        """One message; a question gets an answer, whatever happens."""
        method = getattr(self, "_do_" + message["op"])
        if "id" not in message:
            method(message, blob)
            return
        try:
            answer = {"answer": method(message, blob)}
        except Exception as error:
            answer = {"error": wire.pack_error(error)}
        self._tell({"id": message["id"], **answer})

    def _do_open(self, message: dict[str, Any], _: memoryview) -> None:
        store = Store(message["directory"], **message["options"])
        store.open()
        store.note_lock("monitor")
        if self.engine is None:
            self.engine = Engine(threads=message["threads"], chunk_bytes=message["chunk_bytes"], staging_bytes=0)
            write_from(self.engine, self.ring)
        self.store = store

    def _do_call(self, message: dict[str, Any], _: memoryview) -> None:
        """A method of the store that changes what it knows."""
        if message["method"] not in ("require_loaded", "mark_loaded", "reserve"):
            raise FxckptError(f"the monitor's store has no {message['method']!r} for the trainer")
        getattr(self.store, message["method"])(*message["arguments"])

    def _do_acquire(self, message: dict[str, Any], _: memoryview) -> dict[str, Any]:
        slot = self.store.acquire(message["name"])
        self._slots[message["id"]] = slot
        return {"key": message["id"], "path": slot.path, "before": slot._before}

    def _do_begin(self, message: dict[str, Any], _: memoryview) -> None:
        """Open the slot's files. What was posted of it already can be fed from now on."""
        flight = InFlight(message["key"], message["checkpoint"], self._slots[message["key"]])
        files = tuple((name, nbytes) for name, nbytes in message["files"])
        try:
            flight.copy = self.engine.begin(self._plan(files), flight.slot.path, [name for name, _ in files])
        except (FxckptError, OSError) as error:
            flight.error = error
        with self._lock:
            self._flights[flight.checkpoint] = flight
            self._newest = flight.checkpoint
        _signal(self.wake)
        if flight.error is not None:
            self._end(flight)

    def _plan(self, files: tuple[tuple[str, int], ...]) -> Any:
        """Files whose every chunk comes as a whole: one layer for each."""
        if files not in self._plans:
            chunk = self.engine.chunk_bytes
            cuts = [(f, at, min(chunk, n - at), 1) for f, (_, n) in enumerate(files) for at in range(0, n, chunk)]
            geometry = [(layer, *cut) for layer, cut in enumerate(cuts)]
            self._plans = {files: self.engine.plan([(n, b"") for _, n in files], geometry, len(cuts))}
        return self._plans[files]

    def _do_hand_over(self, message: dict[str, Any], blob: memoryview) -> None:
        with self._lock:
            flight = self._flights.get(message["checkpoint"])
        if flight is None:
            return  # it ended, and the trainer was told why
        n = message["record"]
        try:
            flight.record = Record.from_bytes(bytes(blob[:n]), flight.slot.path)
        except Corrupt as error:
            flight.error = error
            self._end(flight)
            return
        flight.tensors = {}
        for key, dtype, shape, nbytes in message["tensors"]:
            flight.tensors[key] = RawTensor(dtype, tuple(shape), blob[n : n + nbytes])
            n += nbytes
        flight.frozen, flight.handed_over = message["frozen"], True
        self._queue.put(flight)

    def _do_abandon(self, message: dict[str, Any], _: memoryview) -> None:
        key = message["key"]
        with self._lock:
            flight = next((each for each in self._flights.values() if each.key == key), None)
            if flight is not None:
                flight.copy.cancel()  # the committer ends it if it has it already
        if flight is None:
            slot = self._slots.pop(key, None)
            if slot is not None:
                self.store.abandon(slot, bad=message["bad"])
            return
        if not flight.handed_over:
            flight.error = Cancelled("the trainer gave it up")
            self._end(flight)

    # -- committer -------------------------------------------------------------------------------------------------

    def _commit_all(self) -> None:
        while (flight := self._queue.get()) is not None:
            try:
                self._commit(flight)
            except Exception as error:
                flight.error = error
            self._end(flight)

    def _commit(self, flight: InFlight) -> None:
        """Wait for the disk, then make it a checkpoint."""
        written, since = -1, time.monotonic()
        while not flight.copy.durable(SLICE):
            now = self.engine.statistics()["bytes_written"]
            if now != written:
                written, since = now, time.monotonic()
            elif time.monotonic() - since > STUCK_AFTER:
                flight.copy.cancel()
                raise SaveFailed("write", flight.slot.path, detail=f"nothing was written for {STUCK_AFTER:g} s; gave up")
        if flight.frozen is not None:
            token, chunks = flight.frozen
            flight.slot.remember(token, {name: {int(i): crc for i, crc in each.items()} for name, each in chunks.items()})
        self.store.commit(flight.slot, flight.record, flight.tensors)

    def _end(self, flight: InFlight) -> None:
        """Return the slot if it was no success, and tell the trainer."""
        error = flight.error
        if error is not None:
            settled = True
            if flight.copy is not None:
                flight.copy.cancel()
                settled = flight.copy.settled(SETTLE)
            dropped = isinstance(error, Cancelled)
            self.store.abandon(flight.slot, bad=not settled or (not dropped and retires_slot(error)))
        with self._lock:
            del self._flights[flight.checkpoint]
            self._slots.pop(flight.key, None)
            if flight.copy is not None:
                flight.copy.release()
        self._tell(
            {
                "ended": flight.key,
                "generation": flight.slot.generation,
                "error": None if error is None else wire.pack_error(error),
            }
        )

    def _tell(self, message: dict[str, Any]) -> None:
        """To the trainer, if it is still there."""
        with self._sending:
            try:
                wire.send(self.control, message)
            except OSError:
                log.debug("the trainer is gone: not told %s", message)


def _signal(fd: int) -> None:
    os.eventfd_write(fd, 1)


def _clear(fd: int) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return


def main(arguments: Sequence[str]) -> int:
    """Descriptors: the socket, the shared memory, its two eventfds, the trainer's pidfd."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="fxckpt monitor: %(message)s")
    control, memory, posted, freed, trainer = map(int, arguments)
    for fd in (control, memory, posted, freed, trainer):
        os.set_inheritable(fd, False)
    ring = Ring.inherit(memory, posted, freed)
    threading.excepthook = lambda args: _end_at_once(args.exc_value)
    try:
        Monitor(socket.socket(fileno=control), ring, trainer).run()
    except BaseException as error:
        _end_at_once(error)
    return 0


def _end_at_once(error: BaseException | None) -> None:
    """A thread that fails here is a defect: end the process, which the trainer notices, rather than hang."""
    log.critical("the monitor failed and ends", exc_info=error)
    os._exit(1)
