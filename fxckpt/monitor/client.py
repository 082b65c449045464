"""The trainer's end: starts the monitor, and stands in for the ``Store`` that only the monitor has."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from fxckpt.engine.ring import Ring, post_into, release, revive
from fxckpt.errors import Cancelled, FxckptError, SaveFailed, SetupError
from fxckpt.monitor import limits, wire
from fxckpt.store.lock import wait_for_monitor
from fxckpt.store.record import Record, raw_tensor

log = logging.getLogger("fxckpt")

SLICE = 0.2
PATIENCE = 600.0  # seconds to wait for a monitor that says nothing; as long as training waits for a disk that hangs
EXIT_PATIENCE = 60.0  # seconds that the monitor may take to end after everything in flight was waited for
FUTILE = 3  # monitors in a row that may end without having committed anything, before no more is started
PROGRAM = ("-m", "fxckpt.monitor")  # what Python is asked to run
CONFUSING = ("PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONPROFILEIMPORTTIME")  # variables meant for the trainer alone


class RemoteSlot:
    """A slot of the monitor's store; the ``Slot`` of this side."""

    def __init__(self, key: int, path: str, name: str | None, before: Any):
        self.key, self.path, self.name = key, path, name
        self.checkpoint = 0
        self.generation: int | None = None  # of the checkpoint, once it is committed
        self.frozen: Any = None
        self.over = threading.Event()
        self.error: Exception | None = None
        self._before = before

    def remember(self, token: Hashable, chunks: Mapping[str, Mapping[int, int]]) -> None:
        """As ``Slot.remember``; goes along when the checkpoint is handed over."""
        self.frozen = [_digest(token), chunks]

    def recall(self, token: Hashable) -> dict[str, dict[int, int]]:
        """As ``Slot.recall``."""
        if self._before is None or self._before[0] != _digest(token):
            return {}
        return {name: {int(i): crc for i, crc in chunks.items()} for name, chunks in self._before[1].items()}

    def ended(self, timeout: float) -> bool:
        """Wait until it is committed; False after ``timeout`` seconds. Raises why it failed."""
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

    def __init__(self, control: socket.socket, process: subprocess.Popen, directory: str):
        self.control, self.process, self.directory = control, process, directory
        self.lost: SaveFailed | None = None
        self.closing = False
        self._silent = False  # it has not answered in time, and said nothing since
        self.slots: dict[int, RemoteSlot] = {}
        self.newest: int | None = None  # generation that it committed last
        _links.add(self)
        control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(PATIENCE), int(PATIENCE % 1 * 1e6)))
        self._sending, self._changed = threading.Lock(), threading.Condition()
        self._numbers = itertools.count(1)
        self._answers: dict[int, Any] = {}
        self._unwanted: set[int] = set()  # questions whose asker was interrupted
        self.thread = threading.Thread(target=self._listen, name="fxckpt-monitor", daemon=True)
        self.thread.start()

    def send(self, message: dict[str, Any], blobs: Sequence[Any] = ()) -> None:
        """Raises SaveFailed if the monitor is gone, or has read nothing for ``PATIENCE``."""
        if not self._sending.acquire(timeout=PATIENCE):
            raise self._silence()
        try:
            wire.send(self.control, message, blobs)
        except BlockingIOError as error:  # half a frame is sent, and nothing can follow it
            self.control.shutdown(socket.SHUT_RDWR)
            raise self._silence() from error
        except OSError as error:
            raise self.loss() from error
        finally:
            self._sending.release()

    def _silence(self) -> SaveFailed:
        """The error for a monitor that is stopped, or hangs in the disk."""
        return SaveFailed(
            "monitor",
            self.directory,
            detail=f"the monitor process {self.process.pid} has said nothing for "
            f"{PATIENCE:g} s: it is stopped, or the disk hangs",
        )

    def ask(self, message: dict[str, Any]) -> Any:
        """Send a question and wait for the answer; raises what the monitor raised. SaveFailed after ``PATIENCE``, and from
        then on at once, until it says something."""
        if self._silent and self.lost is None:
            raise self._silence()
        number, asked = next(self._numbers), time.monotonic()
        try:
            self.send({**message, "id": number})
            with self._changed:
                while number not in self._answers:
                    if self.lost is not None:
                        raise self.loss()
                    if time.monotonic() - asked > PATIENCE:
                        self._silent = True
                        raise self._silence()
                    self._changed.wait(SLICE)
                found = self._answers.pop(number)
        except BaseException:
            with self._changed:
                found = self._answers.pop(number, None)
                self._unwanted.add(number)
            if found is not None:
                self._decline(found)
            raise
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

    def _hear(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            slot = self.slots.pop(message["ended"], None)
            if message["error"] is None:
                self.newest = max(self.newest or 0, message["generation"])
            if slot is not None:
                slot.generation = message["generation"]
                slot.end(None if message["error"] is None else wire.unpack_error(message["error"]))
            return
        with self._changed:
            unwanted = message["id"] in self._unwanted
            self._unwanted.discard(message["id"])
            if not unwanted:
                self._answers[message["id"]] = message
                self._changed.notify_all()
        if unwanted:
            self._decline(message)

    def _decline(self, message: dict[str, Any]) -> None:
        """Nobody waits for this answer any more: if it is a slot, it is given back."""
        if isinstance(message.get("answer"), dict):
            try:
                self.send({"op": "abandon", "key": message["answer"]["key"], "bad": False})
            except SaveFailed as error:
                log.debug("%s", error)

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
        with self._changed:
            self.lost = SaveFailed("monitor", self.directory, detail=detail)
            left, self.slots = list(self.slots.values()), {}
            self._changed.notify_all()
        for slot in left:
            slot.end(self.loss())
        if not self.closing:
            log.error("fxckpt: %s; checkpoints in flight are lost, those committed are not", detail)


class MonitorStore:
    """What a ``Saver`` needs of a store, done by the monitor. ``hands_over`` tells it that there is one.

    The engine must be made with ``mock=True`` and ``staging_bytes`` of two chunks or more, which become the ring.
    """

    hands_over = True

    def __init__(self, directory: str, engine: Any, *, threads: int, **options: Any):
        self.root = os.path.abspath(os.fspath(directory))
        self._engine, self._threads, self._options = engine, threads, options
        self._slots = engine.staging_bytes // engine.chunk_bytes
        self._pid = os.getpid()
        self._link: Link | None = None
        self._ring: Ring | None = None
        self._continues: tuple[int | None] | None = None  # the generation that was loaded or committed last, if any was
        self._futile = 0  # monitors that ended without committing anything
        self._starting = threading.RLock()
        self._said = -1
        if self._slots < 2:
            raise SetupError(
                f'writer="monitor" shares staging_mb with the monitor process, two chunks of '
                f"{engine.chunk_bytes >> 20} MiB at least: staging_mb is {engine.staging_bytes >> 20}"
            )

    @property
    def pid(self) -> int | None:
        """Of the monitor process."""
        return None if self._link is None else self._link.process.pid

    def open(self) -> None:
        """Start the monitor if it does not run, and have it open the store. Raises what ``Store.open`` raises."""
        if self._link is None:
            self._start()
        link = self._link
        try:
            link.ask(
                {
                    "op": "open",
                    "directory": self.root,
                    "options": self._options,
                    "threads": self._threads,
                    "chunk_bytes": self._engine.chunk_bytes,
                }
            )
        except SaveFailed as error:
            if link.lost is None:
                raise
            raise SetupError(f'writer="monitor" could not start: {error}. Its own message is on stderr') from error

    def _start(self) -> None:
        """Make the shared memory (once), start the process with it, and give the engine both."""
        first = self._ring is None
        ring = self._ring = self._ring or self._make_ring()
        ours, theirs = socket.socketpair()
        trainer = os.pidfd_open(os.getpid())
        try:
            process = _spawn([theirs.fileno(), ring.fd, ring.posted, ring.freed, trainer])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(trainer)
        self._link = Link(ours, process, self.root)
        monitor = os.pidfd_open(process.pid)
        try:
            post_into(self._engine, ring, monitor) if first else revive(self._engine, monitor)  # they duplicate it
        finally:
            os.close(monitor)
        for text in limits.found() if first else ():
            log.warning("fxckpt: what the monitor cannot survive: %s", text)

    def _restart(self, link: Link) -> None:
        """The monitor is gone: start another one, which goes on from what was committed last. Raises SaveFailed."""
        if link.newest is not None:
            self._continues = (link.newest,)
        self._futile = 0 if link.newest is not None else self._futile + 1
        if self._futile > FUTILE:
            raise link.loss()
        link.control.close()
        try:
            self._start()
            wait_for_monitor(self.open)
            if self._continues is not None:
                self._call("mark_loaded", *self._continues)
        except (FxckptError, OSError) as error:
            raise SaveFailed("monitor", self.root, detail=f"it could not be started again: {error}") from error
        log.warning("fxckpt: another monitor was started, process %d", self.pid)

    def _make_ring(self) -> Ring:
        size, left = self._slots * self._engine.chunk_bytes, limits.memory_available()
        advice = "Ask for less with staging_mb, or give the container more memory (the size of /dev/shm does not matter)"
        if size > left:
            raise SetupError(
                f'writer="monitor" needs {size >> 20} MiB of shared memory, of which {left >> 20} MiB are free. ' + advice
            )
        try:
            return Ring.make(self._slots, self._engine.chunk_bytes)
        except SaveFailed as error:
            raise SetupError(f'writer="monitor" needs {size >> 20} MiB of shared memory: {error}. {advice}') from error

    def _check(self) -> Link:
        if os.getpid() != self._pid:
            raise Cancelled(f"the store {self.root} belongs to the parent process (pid {self._pid})")
        if self._link is None:
            raise Cancelled(f"the store {self.root} is closed")
        return self._link

    def require_loaded(self) -> None:
        """As ``Store.require_loaded``."""
        self._call("require_loaded")

    def reserve(self, files: Mapping[str, int]) -> None:
        """As ``Store.reserve``."""
        self._call("reserve", dict(files))

    def mark_loaded(self, generation: int | None) -> None:
        """As ``Store.mark_loaded``."""
        self._call("mark_loaded", generation)
        self._continues = (generation,)

    def _call(self, method: str, *arguments: Any) -> None:
        self._alive().ask({"op": "call", "method": method, "arguments": arguments})

    def _alive(self) -> Link:
        """The link to a monitor that is not known to be gone; starts another one if need be."""
        with self._starting:
            link = self._check()
            if link.lost is not None:
                self._restart(link)
            return self._check()

    def acquire(self, name: str | None = None) -> RemoteSlot:
        """As ``Store.acquire``."""
        link = self._alive()
        found = link.ask({"op": "acquire", "name": name})
        slot = RemoteSlot(found["key"], found["path"], name, found["before"])
        link.slots[slot.key] = slot
        return slot

    def begin(self, slot: RemoteSlot, copy: Any, files: Sequence[Any]) -> None:
        """The engine began this checkpoint; the monitor opens its files."""
        slot.checkpoint = copy.id
        self._say(sum(file.nbytes for file in files))
        self._check().send(
            {"op": "begin", "key": slot.key, "checkpoint": slot.checkpoint, "files": [[file.name, file.nbytes] for file in files]}
        )

    def _say(self, state: int) -> None:
        """What the ring's size guarantees for a state of this size; once."""
        if state == self._said or not state:
            return
        self._said = state
        ring = self._slots * self._engine.chunk_bytes
        if ring >= state:
            what = "a step that closed is handed over as fast as memory can be copied, whatever the disk does"
        else:
            what = (
                f"a step is handed over when all but {ring >> 20} MiB of it are written; with staging_mb="
                f"{(state >> 20) + 1} that would not wait for the disk"
            )
        log.info(
            "fxckpt: the monitor's shared memory is %d MiB, %.2f of the %d MiB of state: %s. What was handed over is "
            "committed even if this process is killed",
            ring >> 20,
            ring / state,
            state >> 20,
            what,
        )

    def hand_over(self, slot: RemoteSlot, record: Record, state_tensors: Mapping[str, Any]) -> None:
        """Give the record of a checkpoint whose bytes are all posted. When this returns, the trainer may die."""
        sealed = record.to_bytes()
        raw = {key: raw_tensor(tensor) for key, tensor in state_tensors.items()}
        tensors = [[key, each.dtype, list(each.shape), each.data.nbytes] for key, each in raw.items()]
        self._check().send(
            {"op": "hand_over", "checkpoint": slot.checkpoint, "record": len(sealed), "tensors": tensors, "frozen": slot.frozen},
            [sealed, *(each.data for each in raw.values())],
        )

    def abandon(self, slot: RemoteSlot, *, bad: bool) -> None:
        """As ``Store.abandon``; nothing if the monitor ended it already or is gone."""
        link = self._check()
        if link.slots.pop(slot.key, None) is None or link.lost is not None:
            return
        try:
            link.send({"op": "abandon", "key": slot.key, "bad": bad})
        except SaveFailed as error:
            log.debug("%s", error)

    def close(self) -> None:
        """Have the monitor finish and end. Idempotent; nothing in a forked child."""
        if os.getpid() != self._pid or self._link is None:
            return
        link, self._link, self._ring = self._link, None, None
        link.closing = True
        self._engine.close()
        release(self._engine)
        try:
            link.send({"op": "close"})
        except SaveFailed as error:
            log.debug("%s", error)
        try:
            link.process.wait(EXIT_PATIENCE)
        except subprocess.TimeoutExpired:
            log.error(
                "fxckpt: the monitor process %d did not end within %g s: left behind to finish", link.process.pid, EXIT_PATIENCE
            )
            return
        link.thread.join(10.0)
        link.control.close()


def _spawn(fds: list[int]) -> subprocess.Popen:
    """The process, in a session of its own: Ctrl-C and the terminal's end are for the trainer."""
    if not sys.executable:
        raise SetupError('writer="monitor" starts a second Python, and sys.executable does not say which')
    env = {key: value for key, value in os.environ.items() if key not in CONFUSING}
    env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(each) for each in sys.path)
    env["OPENBLAS_NUM_THREADS"] = env["OMP_NUM_THREADS"] = "1"
    # From the root directory: "-m" looks for modules in the working directory first, and keeps its file system busy.
    return subprocess.Popen(
        [sys.executable, *PROGRAM, *map(str, fds)],
        pass_fds=fds,
        env=env,
        cwd="/",
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
