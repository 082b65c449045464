"""The monitor's end of the socket: carries out what the trainer asks, in order, and answers."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

from fxckpt.engine import Engine
from fxckpt.engine.ring import Ring, write_from
from fxckpt.errors import FxckptError
from fxckpt.monitor import wire
from fxckpt.monitor.checkpoints import Checkpoints
from fxckpt.store.slots import Store

log: logging.Logger = logging.getLogger("fxckpt")


class Clerk:
    """Reads the socket to its end. ``wake`` has the feeder look again; ``over``: nothing will come any more.

    ``checkpoints`` is there once the trainer had the store opened.
    """

    def __init__(self, control: socket.socket, ring: Ring, wake: Callable[[], None]):
        self.checkpoints: Checkpoints | None = None
        self.over: bool = False
        self._control, self._ring, self._wake = control, ring, wake
        self._sending = threading.Lock()

    def read(self) -> None:
        """Carry out the trainer's messages, in order."""
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

    def _do_call(self, message: wire.Message, _: memoryview) -> None:
        """A method of the store that changes what it knows."""
        if message["method"] not in ("require_loaded", "mark_loaded", "reserve"):
            raise FxckptError(f"the monitor's store has no {message['method']!r} for the trainer")
        getattr(self._opened().store, message["method"])(*message["arguments"])

    def _do_acquire(self, message: wire.Message, _: memoryview) -> wire.Message:
        slot = self._opened().acquire(message["id"], message["name"])
        return {"key": message["id"], "path": slot.path, "before": slot._before}

    def _do_begin(self, message: wire.Message, _: memoryview) -> None:
        files = tuple((name, nbytes) for name, nbytes in message["files"])
        self._opened().begin(message["key"], message["checkpoint"], files)
        self._wake()

    def _do_hand_over(self, message: wire.Message, blob: memoryview) -> None:
        self._opened().hand_over(message, blob)

    def _do_abandon(self, message: wire.Message, _: memoryview) -> None:
        self._opened().abandon(message["key"], message["bad"])
