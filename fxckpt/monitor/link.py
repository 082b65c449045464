"""The socket to the monitor, seen from the trainer: messages, questions and their answers, slots of the other side."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import signal
import socket
import struct
import subprocess
import threading
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from fxckpt.engine import SLICE, Patience, io
from fxckpt.errors import SaveFailed
from fxckpt.monitor import wire
from fxckpt.monitor.courier import Courier
from fxckpt.store.folder import file_id

log: logging.Logger = logging.getLogger("fxckpt")

PATIENCE = 600.0  # seconds to wait for a monitor that says nothing; as long as training waits for a disk that hangs


class RemoteSlot:
    """A slot of the monitor's store; what each method does: see ``fxckpt.saving.stores.CheckpointSlot``."""

    def __init__(
        self, key: int, path: str, name: str | None, before: Sequence[Any] | None, files: Mapping[str, Sequence[int]]
    ):  # fmt: skip
        self.key: int = key
        self.path: str = path
        self.name: str | None = name
        self.checkpoint = 0
        self.generation: int | None = None  # of the checkpoint, once it is committed
        self.frozen: list[Any] | None = None  # token, chunks and their size to remember
        self.over: threading.Event = threading.Event()
        self.error: Exception | None = None
        self._before, self._files = before, files

    below = io.CWD  # its files are opened by the monitor

    def was_replaced(self) -> bool:
        """The monitor looks, before it opens them."""
        return False

    def waited(self, file: str) -> None:
        """The monitor looks again, when it opens them."""

    def opened(self, inodes: Mapping[str, int]) -> None:
        """The monitor knows."""

    def remember(self, token: Hashable, chunks: Mapping[str, Mapping[int, int]], chunk_bytes: int) -> None:
        """Goes along when the checkpoint is handed over."""
        self.frozen = [_digest(token), chunks, chunk_bytes]

    def recall(self, token: Hashable) -> dict[str, dict[int, int]]:
        """Of a file that was touched since the monitor looked, nothing: what is not sent, it could not write."""
        if self._before is None or self._before[0] != _digest(token):
            return {}
        same = {name: chunks for name, chunks in self._before[1].items() if self._is_same(name)}
        return {name: {int(i): digest for i, digest in chunks.items()} for name, chunks in same.items()}

    def _is_same(self, name: str) -> bool:
        try:
            return file_id(os.lstat(os.path.join(self.path, name))) == tuple(self._files[name])
        except (OSError, KeyError):
            return False

    def ended(self, timeout: float) -> bool:
        over = self.over.wait(timeout)
        if self.error is not None:
            raise self.error
        return over

    def end(self, error: Exception | None) -> None:
        """It is committed, or will not be."""
        if not self.over.is_set():
            self.error = error
            self.over.set()


def _digest(token: Hashable) -> str:
    return hashlib.sha256(repr(token).encode()).hexdigest()


_links: weakref.WeakSet[Link] = weakref.WeakSet()
"""Of this process; a forked child closes its copies of their sockets. The engine's descriptors are closed in C."""


def _in_child() -> None:
    for link in list(_links):
        link.control.close()


os.register_at_fork(after_in_child=_in_child)


class Link:
    """The socket to the monitor, the process behind it, and the thread that listens.

    It knows the store's slots but not the store, so that the thread keeps nothing alive.
    """

    def __init__(self, control: socket.socket, process: subprocess.Popen[bytes], directory: str):
        self.control: socket.socket = control
        self.process: subprocess.Popen[bytes] = process
        self.directory: str = directory
        self.lost: SaveFailed | None = None
        self.closing = False
        self.slots: dict[int, RemoteSlot] = {}
        self.newest: int | None = None  # generation that it committed last
        self.rotten: list[tuple[int, Exception | None]] = []  # what it read back and does not verify, by ``Store.read_back``
        self._silent = False  # it has not answered in time, and said nothing since
        self._numbers = itertools.count(1)  # of questions
        self._answers: dict[int, wire.Message | None] = {}  # to those that somebody waits for; None: not yet
        self.asked_for: set[int] = set()  # numbers of questions for a slot, until the store has it
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # an answer came, or it is lost
        _links.add(self)
        control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(PATIENCE), int(PATIENCE % 1 * 1e6)))
        try:
            self._courier = Courier(control, lambda: control.shutdown(socket.SHUT_RDWR))
            self.thread: threading.Thread = threading.Thread(target=self._listen, name="fxckpt-monitor", daemon=True)
            self.thread.start()
        except BaseException:
            control.shutdown(socket.SHUT_RDWR)  # the monitor ends, though the courier may still have the socket
            raise

    def send(self, message: wire.Message, blobs: Sequence[bytes | memoryview] = ()) -> None:
        """Raises SaveFailed if the monitor is gone, or has read nothing for ``PATIENCE``."""
        frame = self._courier.take(message, blobs)
        if not Patience(PATIENCE).until(lambda slice: frame.sent.wait(slice) or not self._courier.alive()):
            raise self._silence()
        if isinstance(frame.error, BlockingIOError):
            raise self._silence() from frame.error
        if frame.error is not None or not frame.sent.is_set():
            raise self.loss() from frame.error

    def _silence(self) -> SaveFailed:
        """The error for a monitor that is stopped, or hangs in the disk."""
        what = f"the monitor process {self.process.pid} has said nothing for {PATIENCE:g} s: it is stopped, or the disk hangs"
        return SaveFailed("monitor", self.directory, detail=what)

    def number(self) -> int:
        """That of the next question."""
        return next(self._numbers)

    def ask(self, message: wire.Message, number: int | None = None) -> Any:
        """Send a question, of this ``number``, and wait for the answer; raises what the monitor raised. SaveFailed after
        ``PATIENCE``, and from then on at once, until it says something."""
        if self._silent and self.lost is None:
            raise self._silence()
        number, patience = number or self.number(), Patience(PATIENCE)
        try:
            self._answers[number] = None
            self.send({**message, "id": number})
            with self._lock:
                while (found := self._answers[number]) is None:
                    if self.lost is not None:
                        raise self.loss()
                    if not patience.left():
                        self._silent = True
                        raise self._silence()
                    self._changed.wait(SLICE)
        finally:
            self._answers.pop(number, None)
        if "error" in found:
            raise wire.unpack_error(found["error"])
        return found["answer"]

    def loss(self) -> SaveFailed:
        """Why it is gone; a new exception each time, because raising one adds to it."""
        lost = self.lost
        return SaveFailed("monitor", self.directory, detail="the monitor process is gone" if lost is None else lost.detail)

    def _listen(self) -> None:
        while (frame := wire.receive(self.control)) is not None:
            self._silent = False
            self._hear(frame[0])
        self._lose()
        self._courier.end()

    def _hear(self, message: wire.Message) -> None:
        if "ended" in message:
            slot = self.slots.pop(message["ended"], None)
            if message["error"] is None:
                self.newest = max(self.newest or 0, message["generation"])
            if slot is not None:
                slot.generation, slot.path = message["generation"], message["path"]
                slot.end(None if message["error"] is None else wire.unpack_error(message["error"]))
            return
        if "rotten" in message:
            error = message["error"]
            self.rotten.append((message["rotten"], None if error is None else wire.unpack_error(error)))
            return
        with self._lock:
            if message["id"] in self._answers:
                self._answers[message["id"]] = message
                self._changed.notify_all()

    def _lose(self) -> None:
        """The stream ended, which only the end of the process does."""
        try:
            status = self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            status = None
        how = "closed its socket" if status is None else f"exited with status {status}"
        if status is not None and status < 0:
            how = f"was ended by signal {-status} ({signal.Signals(-status).name})"
        detail = f"the monitor process {self.process.pid} {how}"
        with self._lock:
            self.lost = SaveFailed("monitor", self.directory, detail=detail)
            left, self.slots = list(self.slots.values()), {}
            self._changed.notify_all()
        for slot in left:
            slot.end(self.loss())
        if not self.closing:
            log.error("fxckpt: %s; checkpoints in flight are lost, those committed are not", detail)
