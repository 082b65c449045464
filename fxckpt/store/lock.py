"""One writer per directory: a lock on the file ``lock`` in it.

Two kinds at once, each on bytes of its own, so that what ends one leaves the other:

    POSIX   the process's own: tells the others its pid. Gone when the process closes any descriptor of the file, as a backup does
            that reads the whole directory
    OFD     the descriptor's: survives that. A forked child inherits it, so the child closes its copy first thing: a data-loader
            worker that outlives the trainer does not keep the directory locked

Where neither works, ``flock`` has to do, which is as OFD. Anybody who may read the file can take a *read* lock, which would keep
every trainer out: such a file is replaced by a new one, which nobody else can have locked.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from fxckpt.engine import io
from fxckpt.errors import StoreLocked
from fxckpt.store import names
from fxckpt.store.folder import Folder

log: logging.Logger = logging.getLogger("fxckpt")

_FLOCK = "hhqqi4x"  # struct flock of Linux on 64 bits: type, whence, start, len, pid

_OWN, _SHARED = (0, 1 << 62), (1 << 62, 1)  # (start, length): bytes of the POSIX lock, of the OFD lock

_TAKEN = frozenset({errno.EAGAIN, errno.EACCES})
_UNABLE = frozenset({errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})

_held: dict[tuple[int, int], int] = {}
"""(device, inode) of each lock file this process holds, and the process id that noted it: the kernel cannot tell a process
about its own locks."""

_locks: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()
"""Of this process; none of them is a forked child's."""

_guard = threading.RLock()  # a collection inside it may let go of another one

_NOTICE = 2.0  # seconds within which a monitor notes that its trainer is gone
_PROGRESS = 5.0  # seconds between lines of progress
_TRIES = 10


# ---- kinds of locks ----


def _ofd(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *_SHARED, 0))


def _posix(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *_OWN, 0))


def _flock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


KINDS: dict[str, Callable[[int], None]] = {"OFD": _ofd, "POSIX": _posix, "flock": _flock}


class Taken(BlockingIOError):
    """Somebody has a lock of this ``kind``."""

    def __init__(self, kind: str, number: int):
        super().__init__(number, os.strerror(number))
        self.kind: str = kind


def take(fd: int) -> list[str]:
    """Take, or keep, every kind that works here, ``flock`` only if no other does; returns which. Raises ``Taken`` if somebody has
    one, ``OSError`` if none works."""
    granted: list[str] = []
    for kind, lock in KINDS.items():
        if kind == "flock" and granted:
            break
        try:
            lock(fd)
            granted.append(kind)
        except OSError as error:
            if error.errno in _TAKEN:
                raise Taken(kind, error.errno) from error
            if error.errno not in _UNABLE:
                raise
    if not granted:
        raise OSError(errno.ENOLCK, "no kind of file lock works on this file system (OFD, POSIX, flock)")
    return granted


def give_back(fd: int) -> None:
    """What ``take`` took, of every kind."""
    for command, where in ((fcntl.F_OFD_SETLK, _SHARED), (fcntl.F_SETLK, _OWN)):
        with suppress(OSError):
            fcntl.fcntl(fd, command, struct.pack(_FLOCK, fcntl.F_UNLCK, os.SEEK_SET, *where, 0))
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)


def writer(fd: int, refused: str | None = None) -> int | str | None:
    """Who has taken it: a pid, ``"unknown"`` (another machine or container), or None: nobody, though somebody may keep others
    from taking it by a lock for reading. ``refused``: the kind that ``take`` was refused. Where that is another than ``flock``,
    no trainer takes that, and whoever has it may only read: it asks for no right to write."""
    for command, where in ((fcntl.F_GETLK, _OWN), (fcntl.F_OFD_GETLK, _SHARED)):
        with suppress(OSError):
            asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, *where, 0)
            kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, command, asked))
            if kind != fcntl.F_UNLCK:
                return pid if pid > 0 else "unknown"
    if refused not in (None, "flock"):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BlockingIOError:
        return "unknown"
    except OSError as error:
        log.debug("flock: %s", error)
    return None


# ---- the lock of one directory ----


class DirectoryLock:
    """The lock of one directory, from ``hold`` to ``release``."""

    def __init__(self, folder: Folder):
        self._folder, self._note = folder, ""
        self._pid, self._key, self._fd = os.getpid(), (0, 0), -1
        _locks.add(self)

    def hold(self) -> None:
        """Take it. Raises ``StoreLocked`` with the holder's pid; whatever is raised, ``release`` it."""
        with _guard:
            if _is_own(self._folder.path):
                advice = "shut that run down first (opt.ckpt.shutdown()), or use another directory"
                whose = f"{self._folder.path} is already being written to by this process (pid {os.getpid()})"
                raise StoreLocked(f"{whose}: {advice}")
            self._keep(self._acquire())
            if os.fstat(self._fd).st_size:
                self._write_note()  # what an earlier holder noted is not true of us

    def _keep(self, fd: int) -> None:
        """This descriptor has the lock from now on."""
        try:
            _held.pop(self._key, None)
            found, old = os.fstat(fd), self._fd
            self._key, self._fd = (found.st_dev, found.st_ino), fd
        except BaseException:
            io.close(fd)
            raise
        _held[self._key] = self._pid
        io.close_in_child(fd)
        if old >= 0:
            io.close_in_child(old, False)
            io.close(old)

    def _acquire(self) -> int:
        """A descriptor with the lock. Raises ``StoreLocked``, ``OSError``."""
        found = self._folder.find(names.LOCK)
        if found is not None and not stat.S_ISREG(found.st_mode):
            self._folder.put_aside(names.LOCK)
        fd, other = self._open(names.LOCK), -1
        try:
            try:
                take(fd)
                return fd
            except Taken as error:
                refused = error.kind
                self._refuse_if_taken(fd, refused)
            other = self._replacement()
            # Who came the same way meanwhile has put his file there by now: look again at what is there, before ours is.
            with self._folder.opened(names.LOCK, os.O_RDWR) as now:
                self._refuse_if_taken(now, refused)
            os.fchmod(other, stat.S_IMODE(os.fstat(fd).st_mode))
            self._folder.rename(names.LOCK + names.TEMPORARY, names.LOCK)
            log.warning("%s was locked for reading by somebody: replaced", self._folder.at(names.LOCK))
            io.close(fd)  # ours was not granted, so there is none to lose by this
            return other
        except BaseException:
            for each in (fd, other):
                if each >= 0:
                    io.close(each)
            raise

    def _open(self, name: str, mode: int = 0o666) -> int:
        """The file, made if need be."""
        return io.open(self._folder.at(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode, self._folder.fd)

    def _replacement(self) -> int:
        """A new lock file under a temporary name, locked before anybody else may open it. Raises ``StoreLocked`` if another run
        is about to put its own in place."""
        name = names.LOCK + names.TEMPORARY
        for _ in range(_TRIES):
            found = self._folder.find(name)
            if found is not None and not stat.S_ISREG(found.st_mode):
                self._folder.put_aside(name)
            fd = self._open(name, 0o600)
            try:
                take(fd)
                now = self._folder.find(name)
                if now is not None and os.path.samestat(now, os.fstat(fd)):
                    return fd
            except Taken as error:
                self._refuse_if_taken(fd, error.kind)
                self._folder.unlink(name)  # of a run that was killed here; somebody may read it
            except BaseException:
                io.close(fd)
                raise
            io.close(fd)
        raise StoreLocked(f"{self._folder.path} cannot be locked: somebody locks {name} for reading, again and again")

    def _refuse_if_taken(self, fd: int, kind: str) -> None:
        """Say who has it, if somebody has; a lock for reading does not count."""
        if (who := writer(fd, kind)) is None:
            return
        what = f"{self._folder.path} is being written to by another process (pid {who})"
        refused = StoreLocked(f"{what}: stop it, wait for it, or use another directory")
        refused.monitor = io.pread(fd, 64, 0).decode(errors="replace")
        raise refused

    def note(self, text: str) -> None:
        """Say what kind of process holds it, to whoever is refused."""
        with _guard:
            self._note = text
            if self._fd >= 0:
                self._write_note()

    def _write_note(self) -> None:
        """Not into a file that has a second name: what a hard link leads to may be somebody else's."""
        if os.fstat(self._fd).st_nlink == 1:
            io.ftruncate(self._fd, 0)
            if self._note:
                io.pwrite(self._fd, self._note.encode(), 0)

    def renew(self) -> None:
        """See that the lock is still what others find in this directory, and take again what was lost of it: by another
        descriptor of the file that this process closed, or because somebody removed the file. Raises ``StoreLocked`` if another
        has it, or the file was replaced: then another store was begun here, in which we have no business."""
        with _guard:
            found = self._folder.find(names.LOCK)
            if found is not None and (found.st_dev, found.st_ino) != self._key:
                raise StoreLocked(
                    f"{self._folder.path} was removed or replaced while this run (pid {os.getpid()}) used it, and "
                    "another run has begun a store there since: nothing more is written to it. Give this run a directory of "
                    "its own and start it again"
                )
            if found is not None:
                try:
                    take(self._fd)
                    return
                except Taken as error:
                    self._refuse_if_lost(error.kind)
            self._keep(self._acquire())
            if found is None:
                log.warning("%s was removed by somebody: locked again", self._folder.at(names.LOCK))
            self._write_note()

    def _refuse_if_lost(self, refused: str) -> None:
        if (who := writer(self._fd, refused)) is not None:
            raise StoreLocked(
                f"this run (pid {os.getpid()}) lost the lock of {self._folder.path}, and another process has it (pid {who}): "
                "nothing more is written to it. Only one of the two may go on"
            )

    def release(self) -> None:
        """Give it back. Idempotent; in a forked child nothing is released, as nothing is held."""
        with _guard:
            if self._fd < 0 or self._pid != os.getpid():
                return
            give_back(self._fd)  # Ctrl-C before this leaves all to do again, and behind it no more than a descriptor
            _held.pop(self._key, None)
            fd, self._fd = self._fd, -1
            try:
                io.close_in_child(fd, False)
                io.close(fd)
            except OSError as error:  # the descriptor is gone all the same, and nothing was written to it
                log.debug("closing %s: %s", self._folder.at(names.LOCK), error)


def _in_child() -> None:
    """The descriptors are closed already."""
    _guard._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library does: who held it may not be in the child
    for lock in list(_locks):
        lock._fd = -1


os.register_at_fork(after_in_child=_in_child)


def holder(root: str) -> int | str | None:
    """Who has the lock of a directory: a pid, ``"unknown"`` (another machine or container), or None: nobody."""
    with _guard:
        if _is_own(root):
            return os.getpid()
        path = os.path.join(root, names.LOCK)
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return None
            fd = io.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return writer(fd)
        finally:
            io.close(fd)


def _is_own(root: str) -> bool:
    """Whether this process holds the lock of a directory, found out without opening the file, which would end a POSIX lock."""
    try:
        found = os.lstat(os.path.join(root, names.LOCK))
    except FileNotFoundError:
        return False
    return _held.get((found.st_dev, found.st_ino)) == os.getpid()


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
