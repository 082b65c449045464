"""``MonitorStore``: stands in the trainer for the ``Store`` that only the monitor has, and keeps a monitor running."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fxckpt.engine import Engine
from fxckpt.engine.ring import Ring, post_into, release, revive
from fxckpt.errors import Cancelled, FxckptError, SaveFailed, SetupError
from fxckpt.monitor.launch import limits, make_ring, spawn
from fxckpt.monitor.link import Link, RemoteSlot
from fxckpt.store.dtypes import Tensor, raw_tensor
from fxckpt.store.layout import FileLayout
from fxckpt.store.lock import wait_for_monitor
from fxckpt.store.record import Record

log: logging.Logger = logging.getLogger("fxckpt")

EXIT_PATIENCE = 60.0  # seconds that the monitor may take to end after everything in flight was waited for
FUTILE = 3  # monitors in a row that may end without having committed anything, before no more is started


class MonitorStore:
    """The store of a run whose monitor writes and commits. What each method does: see ``fxckpt.saving.stores``.

    The engine must be made with ``mock=True`` and ``staging_bytes`` of two chunks or more, which become the ring.
    """

    hands_over = True  # another process commits
    part: tuple[int, int] = (0, 1)

    def __init__(self, directory: str, engine: Engine, *, threads: int, **options: Any):
        self.root: str = os.path.abspath(os.fspath(directory))
        self._engine, self._threads, self._options = engine, threads, options
        self._slots = engine.staging_bytes // engine.chunk_bytes
        self._pid = os.getpid()
        self._link: Link | None = None
        self._ring: Ring | None = None
        self._continues: tuple[int | None] | None = None  # the generation that was loaded or committed last, if any was
        self._held: list[int] = []  # generations that other ranks rely on
        self._futile = 0  # monitors that ended without committing anything
        self._starting = threading.RLock()
        self._said = 0
        if self._slots < 2:
            least = f"two chunks of {engine.chunk_bytes >> 20} MiB at least: staging_mb is {engine.staging_bytes >> 20}"
            raise SetupError(f'writer="monitor" shares staging_mb with the monitor process, {least}')

    @property
    def pid(self) -> int | None:
        """Of the monitor process."""
        return None if self._link is None else self._link.process.pid

    def open(self) -> None:
        """Start the monitor if it does not run, and have it open the store. Raises what ``Store.open`` raises."""
        again = self._ring is not None
        link = self._link or self._start()
        how = {"options": self._options, "threads": self._threads, "chunk_bytes": self._engine.chunk_bytes}
        try:
            link.ask({"op": "open", "directory": self.root, **how})
        except SaveFailed as error:
            if link.lost is None:
                raise
            raise SetupError(f'writer="monitor" could not start: {error}. Its own message is on stderr') from error
        log.log(
            logging.DEBUG if again else logging.INFO,
            f"fxckpt: the monitor is process {self.pid}; it takes about 40 MiB more, has the staging in common with this one, "
            "and cannot survive the end of its container or a kill of its whole cgroup",
        )

    def _start(self) -> Link:
        """Make the shared memory (once), start the process with it, and give the engine both."""
        first = self._ring is None
        ring = self._ring = self._ring or make_ring(self._slots, self._engine.chunk_bytes)
        ours, theirs = socket.socketpair()
        trainer = os.pidfd_open(os.getpid())
        try:
            process = spawn([theirs.fileno(), ring.fd, ring.posted, ring.freed, trainer])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(trainer)
        link = self._link = Link(ours, process, self.root)
        monitor = os.pidfd_open(process.pid)
        try:
            post_into(self._engine, ring, monitor) if first else revive(self._engine, monitor)  # they duplicate it
        finally:
            os.close(monitor)
        for text in limits() if first else ():
            log.warning("fxckpt: what the monitor cannot survive: %s", text)
        return link

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
            if self._held:
                self._call("hold", self._held)
        except (FxckptError, OSError) as error:
            raise SaveFailed("monitor", self.root, detail=f"it could not be started again: {error}") from error
        log.warning("fxckpt: another monitor was started, process %d", self.pid)

    def _check(self) -> Link:
        if os.getpid() != self._pid:
            raise Cancelled(f"the store {self.root} belongs to the parent process (pid {self._pid})")
        if self._link is None:
            raise Cancelled(f"the store {self.root} is closed")
        return self._link

    def require_loaded(self) -> None:
        self._call("require_loaded")

    def reserve(self, files: Mapping[str, int], journal: bool = False) -> None:
        self._call("reserve", dict(files), journal)

    def mark_loaded(self, generation: int | None) -> None:
        self._call("mark_loaded", generation)
        self._continues = (generation,)

    def hold(self, generations: Collection[int]) -> Collection[int]:
        self._held = list(generations)
        found: list[int] = self._call("hold", self._held)
        return found

    def _call(self, method: str, *arguments: object) -> Any:
        return self._alive().ask({"op": "call", "method": method, "arguments": arguments})

    def _alive(self) -> Link:
        """The link to a monitor that is not known to be gone; starts another one if need be."""
        with self._starting:
            link = self._check()
            if link.lost is not None:
                self._restart(link)
            return self._check()

    def acquire(self, name: str | None = None, journal: bool = False) -> RemoteSlot:
        link = self._alive()
        number = link.number()
        link.asked_for.add(number)  # first: from here on Ctrl-C, or an answer that comes too late, may lose the slot
        found = link.ask({"op": "acquire", "name": name, "journal": journal}, number)
        slot = RemoteSlot(found["key"], found["path"], name, found["before"], found["files"])
        link.slots[slot.key] = slot
        link.asked_for.discard(number)
        return slot

    def reclaim(self, known: Collection[RemoteSlot]) -> None:
        link = self._check()
        for slot in [each for each in list(link.slots.values()) if each not in known]:
            self.abandon(slot, bad=False)
        for number in list(link.asked_for):  # the key of the slot that it got, if it did
            self._abandon(link, number, bad=False)
            link.asked_for.discard(number)

    def not_begun(self, step: int, name: str | None, why: str) -> None: ...

    def missing(self, slot: RemoteSlot, timeout: float) -> Sequence[int]:
        return ()

    def begin(self, slot: RemoteSlot, checkpoint: int, files: Sequence[FileLayout], step: int = 0) -> None:
        """The engine began the checkpoint of this ``id``; the monitor opens its files."""
        slot.checkpoint = checkpoint
        self._say(sum(file.nbytes for file in files))
        listed = [[file.name, file.nbytes] for file in files]
        self._check().send({"op": "begin", "key": slot.key, "checkpoint": checkpoint, "files": listed})

    def _say(self, state: int) -> None:
        """What the ring's size guarantees for a state of this size, the largest so far; once."""
        if state <= self._said:  # records of a journal are smaller
            return
        self._said = state
        ring = self._slots * self._engine.chunk_bytes
        if ring >= state:
            what = "a step that closed is handed over as fast as memory can be copied, whatever the disk does"
        else:
            what = f"a step is handed over when all but {ring >> 20} MiB of it are written; with staging_mb="
            what += f"{(state >> 20) + 1} that would not wait for the disk"
        log.info(
            f"fxckpt: the monitor's shared memory is {ring >> 20} MiB, {ring / state:.2f} of the {state >> 20} MiB of state: "
            f"{what}. What was handed over is committed even if this process is killed"
        )

    def commit(self, slot: RemoteSlot, record: Record, state_tensors: Mapping[str, Tensor]) -> None:
        """Give the record of a checkpoint whose bytes are all posted. When this returns, the trainer may die; when the slot has
        ``ended``, it is a checkpoint."""
        sealed = record.to_bytes()
        raw = {key: raw_tensor(tensor) for key, tensor in state_tensors.items()}
        tensors = [[key, each.dtype, list(each.shape), each.data.nbytes] for key, each in raw.items()]
        message = {"op": "hand_over", "checkpoint": slot.checkpoint, "record": len(sealed), "tensors": tensors}
        self._check().send({**message, "frozen": slot.frozen}, [sealed, *(each.data for each in raw.values())])

    def abandon(self, slot: RemoteSlot, *, bad: bool, why: str = "") -> None:
        """As ``Store.abandon``; nothing if the monitor ended it already or is gone."""
        link = self._check()
        if link.slots.pop(slot.key, None) is not None:
            self._abandon(link, slot.key, bad)

    def _abandon(self, link: Link, key: int, bad: bool) -> None:
        if link.lost is not None:
            return
        try:
            link.send({"op": "abandon", "key": key, "bad": bad})
        except SaveFailed as error:
            log.debug("%s", error)

    def read_back(self, busy: Callable[[], bool]) -> tuple[int, Exception | None] | None:
        """What the monitor told since the last time."""
        link = self._link
        return link.rotten.pop(0) if link is not None and link.rotten else None

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
            what = f"process {link.process.pid} did not end within {EXIT_PATIENCE:g} s"
            log.error("fxckpt: the monitor %s: left behind to finish", what)
            return
        link.thread.join(10.0)
        link.control.close()
