"""One writer per directory.

A process-owned ``fcntl`` lock: a data-loader worker that was forked and outlives the trainer does not keep it, as it
would keep an ``flock``. Its price is a rule of POSIX: when a process closes *any* descriptor of the file, its lock is
gone. So nobody opens the lock file but ``DirectoryLock``, which first looks whether this process holds it already.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import time
from collections.abc import Callable

from fxckpt.engine import io
from fxckpt.errors import StoreLocked

log: logging.Logger = logging.getLogger("fxckpt")

_FLOCK = "hhqqi4x"  # struct flock of Linux on 64 bits: type, whence, start, len, pid

_held: dict[tuple[int, int], int] = {}
"""(device, inode) of each lock file this process holds, and the process id that noted it: the kernel cannot tell a process
about its own locks."""

_guard = threading.Lock()

_NOTICE = 2.0  # seconds within which a monitor notes that its trainer is gone
_PROGRESS = 5.0  # seconds between lines of progress


class DirectoryLock:
    """The lock of one directory, from construction to ``release``. Raises ``StoreLocked`` with the holder's pid."""

    def __init__(self, path: str):
        self._path, self._note = path, ""
        with _guard:
            if _is_own(path):
                advice = "shut that run down first (opt.ckpt.shutdown()), or use another directory"
                whose = f"{os.path.dirname(path)} is already being written to by this process (pid {os.getpid()})"
                raise StoreLocked(f"{whose}: {advice}")
            self._fd = io.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _take(self._fd, path)
            except BaseException:
                io.close(self._fd)  # ours was not granted, so there is none to lose by this
                raise
            found = os.fstat(self._fd)
            if found.st_size:
                io.ftruncate(self._fd, 0)  # what an earlier holder noted is not true of us
            self._key, self._pid = (found.st_dev, found.st_ino), os.getpid()
            _held[self._key] = self._pid

    def note(self, text: str) -> None:
        """Say what kind of process holds it, to whoever is refused."""
        with _guard:
            self._note = text
            if self._fd >= 0:
                self._write_note(self._fd)

    def _write_note(self, fd: int) -> None:
        io.ftruncate(fd, 0)
        if self._note:
            io.pwrite(fd, self._note.encode(), 0)

    def renew(self) -> None:
        """See that the lock is still what others find in this directory; take it again if somebody removed the file. Raises
        ``StoreLocked`` if the file was replaced: then another store was begun here, in which we have no business. ``OSError`` if
        the directory is not there."""
        with _guard:
            try:
                found = os.stat(self._path)
            except FileNotFoundError:
                self._take_again()
                return
            if (found.st_dev, found.st_ino) != self._key:
                raise StoreLocked(
                    f"{os.path.dirname(self._path)} was removed or replaced while this run (pid {os.getpid()}) used it, and "
                    "another run has begun a store there since: nothing more is written to it. Give this run a directory of "
                    "its own and start it again"
                )

    def _take_again(self) -> None:
        """The file is gone, and with it the lock as others know it. ``_guard`` is held."""
        fd = io.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _take(fd, self._path)
            self._write_note(fd)
            found = os.fstat(fd)
        except BaseException:
            io.close(fd)
            raise
        log.warning("%s was removed by somebody: locked again", self._path)
        _held.pop(self._key, None)
        self._key, old, self._fd = (found.st_dev, found.st_ino), self._fd, fd
        _held[self._key] = self._pid
        io.close(old)

    def release(self) -> None:
        """Give it back. Idempotent; in a forked child nothing is released, as nothing is held."""
        with _guard:
            if self._fd < 0 or self._pid != os.getpid():
                return
            _held.pop(self._key, None)
            fd, self._fd = self._fd, -1
            try:
                io.close(fd)
            except OSError as error:  # the descriptor is gone all the same, and nothing was written to it
                log.debug("closing %s: %s", self._path, error)


def holder(path: str) -> int | str | None:
    """Who holds the lock ``path``: a pid, ``"unknown"`` (another machine or container), or None: nobody."""
    with _guard:
        if _is_own(path):
            return os.getpid()
        try:
            fd = io.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return _ask(fd)
        finally:
            io.close(fd)


def _is_own(path: str) -> bool:
    """Whether this process holds the lock, found out without opening the file, which would end it."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return _held.get((found.st_dev, found.st_ino)) == os.getpid()


def _take(fd: int, path: str) -> None:
    """Take the lock, or say who has it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        who = f"{os.path.dirname(path)} is being written to by another process (pid {_ask(fd) or 'unknown'})"
        refused = StoreLocked(f"{who}: stop it, wait for it, or use another directory")
        refused.monitor = io.pread(fd, 64, 0).decode(errors="replace")
        raise refused from error


def _ask(fd: int) -> int | str | None:
    """Whose lock would be in the way of ours: a pid, ``"unknown"`` (the kernel says 0), or None: nobody's."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else pid or "unknown"


def wait_for_monitor(take: Callable[[], None]) -> None:
    """Call ``take``, again as long as it is refused by a monitor that finishes the work of a trainer that is gone."""
    began = said = time.monotonic()
    while True:
        try:
            return take()
        except StoreLocked as error:
            # A trainer that was killed just now: its monitor may not have noted it yet.
            soon = error.monitor == "monitor" and time.monotonic() - began < _NOTICE
            if error.monitor != "finishing" and not soon:
                raise
        if time.monotonic() >= said:
            log.warning("waiting for the monitor of an earlier run to finish its last checkpoints (%.0f s)", said - began)
            said += _PROGRESS
        time.sleep(0.05)
