"""The monitor process. Three threads, none of which ever waits for the trainer to do something:

    feeder (main)   gives posted slots to the engine; watches the trainer's pidfd
    clerk           reads the socket: slots of the store, records of checkpoints that were handed over
    committer       waits until a handed-over checkpoint is durable, and commits it; in order

The trainer's end, however it comes, is the end of the socket's stream: what was handed over until then is committed, the
rest is dropped, and the process exits. A forked data loader's worker may hold the socket open after the trainer's death, so
that is learned from the pidfd.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Sequence

from fxckpt.engine import Engine
from fxckpt.engine.ring import Ring, write_from
from fxckpt.errors import FxckptError
from fxckpt.monitor import wire
from fxckpt.monitor.checkpoints import Checkpoints
from fxckpt.store.slots import Store

log: logging.Logger = logging.getLogger("fxckpt")

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Sent to whole groups and sessions to end the trainer; the monitor ends by itself right after it."""


class Clerk:
    """Carries out what the trainer asks, in order, and answers, to the end of the socket.

    ``wake`` has the feeder look again; ``over``: nothing will come any more. ``checkpoints`` is there once the trainer had the
    store opened.
    """

    def __init__(self, control: socket.socket, ring: Ring, wake: Callable[[], None]):
        self.checkpoints: Checkpoints | None = None
        self.over: bool = False
        self._control, self._ring, self._wake = control, ring, wake
        self._sending = threading.Lock()

    def read(self) -> None:
        try:
            while (frame := wire.receive(self._control)) is not None:
                message, blob = frame
                if message["op"] == "close":
                    break
                self._carry_out(message, blob)
        except BaseException:
            log.exception("the monitor's clerk failed; what was handed over is finished, then the monitor ends")
        finally:
            self.over = True
            self._wake()

    def stop(self) -> None:
        """The trainer died. What it sent is in the socket, and nothing else will come: come to the end of it."""
        self._control.shutdown(socket.SHUT_RD)

    def tell(self, message: wire.Message) -> None:
        """To the trainer, if it is still there."""
        with self._sending:
            try:
                wire.send(self._control, message)
            except OSError:
                log.debug("the trainer is gone: not told %s", message)

    def _carry_out(self, message: wire.Message, blob: memoryview) -> None:
        """One message; a question gets an answer, whatever happens."""
        method = getattr(self, "_do_" + message["op"])
        if "id" not in message:
            method(message, blob)
            return
        try:
            answer = {"answer": method(message, blob)}
        except Exception as error:
            answer = {"error": wire.pack_error(error)}
        self.tell({"id": message["id"], **answer})

    def _opened(self) -> Checkpoints:
        if self.checkpoints is None:
            raise FxckptError("the monitor's store is not open")
        return self.checkpoints

    def _do_open(self, message: wire.Message, _: memoryview) -> None:
        store = Store(message["directory"], **message["options"])
        store.open()
        store.note_lock("monitor")
        engine = Engine(threads=message["threads"], chunk_bytes=message["chunk_bytes"], staging_bytes=0)
        write_from(engine, self._ring)
        self.checkpoints = Checkpoints(store, engine, self._ring, self.tell)

    def _do_call(self, message: wire.Message, _: memoryview) -> object:
        """A method of the store that changes what it knows: ``require_loaded``, ``mark_loaded``, ``hold`` or ``reserve``."""
        if message["method"] not in ("require_loaded", "mark_loaded", "hold", "reserve"):
            raise FxckptError(f"the monitor's store has no {message['method']!r} for the trainer")
        return getattr(self._opened().store, message["method"])(*message["arguments"])

    def _do_acquire(self, message: wire.Message, _: memoryview) -> wire.Message:
        slot = self._opened().acquire(message["id"], message["name"], message["journal"])
        before, files = slot.what_waits()
        return {"key": message["id"], "path": slot.path, "before": before, "files": files}

    def _do_begin(self, message: wire.Message, _: memoryview) -> None:
        files = tuple((name, nbytes) for name, nbytes in message["files"])
        self._opened().begin(message["key"], message["checkpoint"], files)
        self._wake()

    def _do_hand_over(self, message: wire.Message, blob: memoryview) -> None:
        self._opened().hand_over(message, blob)

    def _do_abandon(self, message: wire.Message, _: memoryview) -> None:
        self._opened().abandon(message["key"], message["bad"])


def feed(control: socket.socket, ring: Ring, trainer: int) -> None:
    """Work until the trainer is gone and everything that it handed over is committed."""
    wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    clerk = Clerk(control, ring, lambda: os.eventfd_write(wake, 1))
    reader = threading.Thread(target=clerk.read, name="fxckpt-clerk")
    reader.start()
    poll = select.poll()
    for fd in (ring.posted, trainer, wake):
        poll.register(fd, select.POLLIN)
    while not clerk.over:
        for fd, _ in poll.poll():
            if fd != trainer:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                continue
            poll.unregister(fd)
            clerk.stop()
            if clerk.checkpoints is not None:
                clerk.checkpoints.note_finishing()
        if clerk.checkpoints is not None:
            clerk.checkpoints.feed(clerk.over)
    reader.join()
    if clerk.checkpoints is not None:
        clerk.checkpoints.note_finishing()
        clerk.checkpoints.feed(True)
        clerk.checkpoints.finish()


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
        feed(socket.socket(fileno=control), ring, trainer)
    except BaseException as error:
        _end_at_once(error)
    return 0


def _end_at_once(error: BaseException | None) -> None:
    """A thread that fails here is a defect: end the process, which the trainer notices, rather than hang."""
    log.critical("the monitor failed and ends", exc_info=error)
    os._exit(1)
