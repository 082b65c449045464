"""A directory that is held open: what is done in it stays in it, whatever somebody puts in its place or on the way to it.

Nothing here follows a symbolic link, and only regular files are opened. What else lies in a file's place is ``put_aside``.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fxckpt.engine import io
from fxckpt.engine.plan import FileId
from fxckpt.errors import Corrupt
from fxckpt.store import names

log: logging.Logger = logging.getLogger("fxckpt")

_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
          stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}  # fmt: skip


def kind_of(found: os.stat_result) -> str:
    """What lies there instead of a file, in words."""
    return _KINDS.get(stat.S_IFMT(found.st_mode), "not a regular file")


def file_id(found: os.stat_result) -> FileId:
    """By which a file is known again, as long as nobody wrote to it, cut it, linked it or put another one in its place."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_regular(path: str) -> os.stat_result:
    """What ``lstat`` says of a file; ``Corrupt`` if it is none: a directory cannot be read, a pipe could be waited for, and a
    link leads to what no writer protects."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise Corrupt(path, f"it is {kind_of(found)}, not a file")
    return found


@contextmanager
def opened(path: str, flags: int, below: int = io.CWD) -> Iterator[int]:
    """A descriptor for the time of the block; of a link at the end of the path there is none (ELOOP)."""
    fd = io.open(path, flags | os.O_NOFOLLOW, below=below)
    try:
        yield fd
    finally:
        io.close(fd)


class Folder:
    """A directory, from ``open`` or ``enter`` to ``close``. ``path`` is for messages; ``fd`` is what counts."""

    fd: int = -1

    def __init__(self, path: str, fd: int):
        self.fd = fd  # first: Ctrl-C may come here, and ``__del__`` closes it
        self.path: str = path

    @classmethod
    def open(cls, path: str) -> Folder:
        """The directory that a path leads to. Raises ``OSError``."""
        return cls(path, io.open(path, os.O_RDONLY | os.O_DIRECTORY))

    def enter(self, name: str) -> Folder:
        """A directory in this one; not through a link (ELOOP or ENOTDIR). Raises ``OSError``."""
        path = self.at(name)
        return Folder(path, io.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, below=self.fd))

    @contextmanager
    def within(self, name: str) -> Iterator[Folder]:
        """``enter``, for the time of a block."""
        inner = self.enter(name)
        try:
            yield inner
        finally:
            inner.close()

    def close(self) -> None:
        """Let go of it. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        self.close()

    def move_to(self, path: str) -> None:
        """From now on this is the directory at ``path``, which is no link; whoever has ``fd`` need not know."""
        with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.dup2(fd, self.fd, inheritable=False)

    def at(self, name: str) -> str:
        """The path of what is called so in it, for messages."""
        return os.path.join(self.path, name)

    def find(self, name: str) -> os.stat_result | None:
        """What ``lstat`` says of an entry; None if it is not there."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def inode(self, name: str) -> tuple[int, int] | None:
        """By which an entry is known again under another name; None if it is not there."""
        found = self.find(name)
        return None if found is None else (found.st_dev, found.st_ino)

    def names(self) -> list[str]:
        """What its entries are called."""
        return sorted(os.listdir(self.fd))

    def entries(self) -> dict[str, os.stat_result]:
        """All entries, by name."""
        found = {name: self.find(name) for name in self.names()}
        return {name: each for name, each in found.items() if each is not None}

    @contextmanager
    def opened(self, name: str, flags: int) -> Iterator[int]:
        """A descriptor of a file in it. ``OSError`` (ELOOP, EISDIR, ENXIO) if that is something else."""
        if (found := self.find(name)) is not None and stat.S_ISFIFO(found.st_mode):
            raise io.os_error("open", errno.ENXIO, self.at(name))  # to open it would wait for its other end
        with opened(self.at(name), flags, self.fd) as fd:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise io.os_error("open", errno.ENXIO, self.at(name))
            yield fd

    def mkdir(self, name: str) -> None:
        io.mkdir(self.at(name), 0o777, self.fd)

    def unlink(self, name: str) -> None:
        io.unlink(self.at(name), self.fd)

    def rename(self, old: str, new: str, into: Folder | None = None) -> None:
        """Rename an entry; a link is renamed itself."""
        target = into or self
        io.rename(self.at(old), target.at(new), self.fd, target.fd)

    def exchange(self, one: str, other: str) -> None:
        """Give each of two entries the other's name, at once."""
        io.exchange(self.at(one), self.at(other), self.fd, self.fd)

    def sync(self) -> None:
        """Make its entries durable: names created, renamed or removed in it."""
        io.fsync_dir(self.path, self.fd)

    def remove_tree(self, name: str) -> None:
        """Remove an entry, with all that is in it if it is a directory; fine if it is not there."""
        found = self.find(name)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            self.unlink(name)
            return
        with self.within(name) as inner:
            for each in inner.entries():
                inner.remove_tree(each)
        io.rmdir(self.at(name), self.fd)

    def put_aside(self, name: str, root: Folder | None = None) -> None:
        """What lies here in the place of a file or directory of ours is somebody else's: it becomes ``NAME.bad`` in ``root``."""
        root, found = root or self, self.find(name)
        if found is None:
            return
        free = next(each for n in itertools.count() if root.find(each := f"{name}{f'-{n}' if n else ''}{names.BAD}") is None)
        self.rename(name, free, root)
        log.error("%s was %s, which no store has there: put aside as %s", self.at(name), kind_of(found), root.at(free))
