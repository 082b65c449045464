"""One directory that checkpoints are written in."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager

from fxckpt.engine import io
from fxckpt.errors import SaveFailed
from fxckpt.store.files import DAMAGE, in_use, opened

log: logging.Logger = logging.getLogger("fxckpt")

_SYNCS = frozenset({"fsync", "fdatasync"})

Notes = tuple[Hashable, dict[str, dict[int, int]]]
"""What files hold, by a token for their plan: the CRC of each chunk."""


def retires_slot(error: BaseException) -> bool:
    """Is the slot's content in doubt after this error? Not after a full disk, one that was read-only for a while, too many
    open files or missing permissions: what comes next rewrites all of it."""
    return getattr(error, "operation", None) in _SYNCS or getattr(error, "errno", None) in DAMAGE


class Slot:
    """A directory over its whole life in this process. ``path`` is where it is now (absolute), ``number`` its number in the
    store, None for a named save (``name``); ``generation`` is that of the checkpoint that is or was written in it."""

    def __init__(self, path: str, number: int | None, name: str | None = None):
        self.path: str = path
        self.number: int | None = number
        self.name: str | None = name
        self.generation = -1
        self.target: str | None = None  # the name that a commit is giving it
        self.suspect: bool = False  # a sync failed, or the disk reported damage: what it holds cannot be known
        self._written: Notes | None = None
        self._before: Notes | None = None

    error: Exception | None = None  # it ends in this process, where its commit raises

    def ended(self, timeout: float) -> bool:
        """A commit that returned is over; a slot of a monitor's store is waited for."""
        return True

    def remember(self, token: Hashable, chunks: Mapping[str, Mapping[int, int]]) -> None:
        """Note the CRCs {file: {chunk: crc}} of what was just written; worth something once it is committed. ``token`` stands
        for the plan: the notes are given back only to one who asks with an equal one."""
        self._written = (token, {file: dict(crcs) for file, crcs in chunks.items()})

    def recall(self, token: Hashable) -> dict[str, dict[int, int]]:
        """What the files held when the slot was acquired, as remembered with an equal ``token``, else {}."""
        return self._before[1] if self._before is not None and self._before[0] == token else {}

    def forget(self) -> None:
        """What is on the disk is not known any more."""
        self._written = self._before = None

    def begin(self) -> None:
        """The content may change from here: what was committed is what can be recalled."""
        self._before, self._written = self._written, None

    def prepare(self) -> None:
        """Make the files safe to rewrite in place: one that somebody has open or mapped, or that has a second name, is
        unlinked. Whoever has it keeps its bytes, and the next writer makes a new file."""
        for entry in list(os.scandir(self.path)):
            if entry.is_file(follow_symlinks=False) and (why := in_use(entry.path)) is not None:
                log.info("%s is not rewritten in place: %s; a new file takes its place", entry.path, why)
                io.unlink(entry.path)
                if self._before is not None:
                    self._before[1].pop(entry.name, None)

    def reserve(self, files: Mapping[str, int]) -> None:
        """Have the file system set blocks aside for these files (name: bytes), if it can. Raises ``OSError``."""
        self.prepare()
        for name, nbytes in files.items():
            with opened(os.path.join(self.path, name), os.O_RDWR | os.O_CREAT) as fd:
                if os.fstat(fd).st_blocks * 512 < nbytes:
                    try:
                        io.fallocate(fd, nbytes)
                    except OSError as error:  # some file systems cannot; there the look at the free space has to do
                        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                            raise

    def lacks(self, files: Mapping[str, int]) -> int:
        """Bytes of these files that have no blocks on the disk yet."""
        total = 0
        for name, nbytes in files.items():
            try:
                total += max(nbytes - os.stat(os.path.join(self.path, name)).st_blocks * 512, 0)
            except FileNotFoundError:
                total += nbytes
        return total

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Turn an ``OSError`` into ``SaveFailed``, and note whether the slot can be trusted after it."""
        try:
            yield
        except OSError as error:
            operation = io.operation_of(error) or "open"
            self.suspect |= operation in _SYNCS or error.errno in DAMAGE
            path = os.fsdecode(error.filename) if error.filename else self.path
            raise SaveFailed(operation, path, getattr(error, "offset", None), error.errno) from error
