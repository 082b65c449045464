"""One directory that checkpoints are written in."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager

from fxckpt.engine import io, read_verified
from fxckpt.engine.plan import FileId
from fxckpt.errors import Corrupt, SaveFailed
from fxckpt.store import names
from fxckpt.store.files import DAMAGE, in_use
from fxckpt.store.folder import Folder, file_id
from fxckpt.store.record import FileRecord

log: logging.Logger = logging.getLogger("fxckpt")

_SYNCS = frozenset({"fsync", "fdatasync"})

READ_BACK_BYTES = 16 << 20
"""Of what a slot holds and is not rewritten, so much is read back each time that it is used, in turn: a block at least."""

Notes = tuple[Hashable, dict[str, dict[int, int]], int]
"""What files hold, by a token for their plan: of some chunks a digest of their checksums; and the bytes of a chunk."""


def retires_slot(error: BaseException) -> bool:
    """Is the slot's content in doubt after this error? Not after a full disk, one that was read-only for a while, too many
    open files or missing permissions: what comes next rewrites all of it."""
    return getattr(error, "operation", None) in _SYNCS or getattr(error, "errno", None) in DAMAGE


class Slot:
    """A directory over its whole life in this process: ``entry`` in ``parent`` now. ``number`` is its number in the store, None
    for a named save (``name``); ``generation`` is that of the checkpoint that is or was written in it. While it is written it is
    held open (``enter``, ``leave``), and nothing else that has its name is touched."""

    def __init__(self, parent: Folder, entry: str, number: int | None, name: str | None = None):
        self.parent: Folder = parent
        self.entry: str = entry
        self.number: int | None = number
        self.name: str | None = name
        self.generation = -1
        self.target: str | None = None  # the entry that a commit is making it
        self.replaces: tuple[int, int] | None = None  # the inode of what has the name of this named save, and gives it up
        self.suspect: bool = False  # a sync failed, or the disk reported damage: what it holds cannot be known
        self.folder: Folder | None = None
        self._written: Notes | None = None
        self._before: Notes | None = None
        self._files: dict[str, tuple[FileId, FileRecord]] = {}  # as they were when they were last committed
        self._opened: dict[str, int] = {}  # inodes that the engine wrote to
        self._turn = 0  # how many blocks were read back
        self.beside: Mapping[str, int] = {}  # files that other ranks wrote, and were moved into it: their bytes by name

    error: Exception | None = None  # it ends in this process, where its commit raises

    @property
    def path(self) -> str:
        """Where it is now (absolute)."""
        return self.parent.at(self.entry)

    @property
    def below(self) -> int:
        """The descriptor of the directory, which is held."""
        return self.held().fd

    def ended(self, timeout: float) -> bool:
        """A commit that returned is over; a slot of a monitor's store is waited for."""
        return True

    # ---- what it is known to hold ----

    def remember(self, token: Hashable, chunks: Mapping[str, Mapping[int, int]], chunk_bytes: int) -> None:
        """Note what was just written, ``{file: {chunk: digest}}``, each chunk of ``chunk_bytes``; worth something once it is
        committed. ``token`` stands for the plan: the notes are given back only to one who asks with an equal one."""
        self._written = (token, {file: dict(crcs) for file, crcs in chunks.items()}, chunk_bytes)

    def recall(self, token: Hashable) -> dict[str, dict[int, int]]:
        """What the files held when the slot was acquired, as remembered with an equal ``token``, else {}."""
        return self._before[1] if self._before is not None and self._before[0] == token else {}

    def what_waits(self) -> tuple[Notes | None, dict[str, FileId]]:
        """All that can be recalled, and what each of its files was when that was true: for another process."""
        recalled = self._before[1] if self._before is not None else {}
        return self._before, {name: self._files[name][0] for name in recalled if name in self._files}

    def waited(self, file: str) -> FileId | None:
        """What a file was when what is recalled of it was true. Of another one nothing is known."""
        return self._files[file][0] if file in self._files else None

    def forget(self) -> None:
        """What is on the disk is not known any more."""
        self._written = self._before = None
        self._files, self._opened, self.beside = {}, {}, {}

    def begin(self) -> None:
        """The content may change from here: what was committed is what can be recalled."""
        self._before, self._written = self._written, None
        self._opened, self.beside = {}, {}

    def opened(self, inodes: Mapping[str, int]) -> None:
        """The engine wrote to these; no other file may be committed under their names."""
        self._opened = {name: inode for name, inode in inodes.items() if inode}

    def check_written(self, file: FileRecord) -> None:
        """That what a record is to vouch for is what was written; notes it, to know the file again. Raises ``SaveFailed``."""
        found = self._checked(self.held().find(file.name), file.name, file.nbytes)
        self._files[file.name] = file_id(found), file

    def check_beside(self, entries: Mapping[str, os.stat_result]) -> None:
        """The same of the files that other ranks wrote, among these ``entries``, but that they are not known again: nothing is
        written into them here."""
        for name, nbytes in self.beside.items():
            self._checked(entries.get(name), name, nbytes)

    def _checked(self, found: os.stat_result | None, name: str, nbytes: int) -> os.stat_result:
        """What was found under a name, if it is the file of so many bytes that was written. Raises ``SaveFailed``."""
        path = os.path.join(self.path, name)
        if found is None or not stat.S_ISREG(found.st_mode) or self._opened.get(name, found.st_ino) != found.st_ino:
            raise SaveFailed("stat", path, detail="somebody removed it or put something else in its place while it was written")
        if found.st_size != nbytes:
            raise SaveFailed("stat", path, detail=f"the file has {found.st_size} bytes, its record {nbytes}")
        return found

    # ---- before it is written ----

    def enter(self) -> None:
        """Hold it open. Raises ``OSError``: it is gone, or something else has its name."""
        if self.folder is None:
            self.folder = self.parent.enter(self.entry)

    def leave(self) -> None:
        """Let go of it. Idempotent."""
        folder, self.folder = self.folder, None
        if folder is not None:
            folder.close()

    def held(self) -> Folder:
        """The directory, which is held."""
        assert self.folder is not None  # from acquire until it is committed or abandoned
        return self.folder

    def has_its_files(self) -> bool:
        """Whether all that was committed in it is there, as files."""
        try:
            with self.parent.within(self.entry) as folder:
                found = [folder.find(name) for name in (*self._files, *self.beside, names.COMMIT)]
        except OSError:
            return False
        return all(each is not None and stat.S_ISREG(each.st_mode) for each in found)

    def is_itself(self) -> bool:
        """Whether its name leads to the directory that is held."""
        found = self.parent.find(self.entry)
        return found is not None and os.path.samestat(found, os.fstat(self.held().fd))

    def give_back_name(self) -> None:
        """What had the name of this named save before gets it back, if an exchange was made."""
        if self.name is None or self.replaces is None:
            return
        aside = self.name + names.PARTIAL
        if self.parent.inode(aside) == self.replaces:
            self.parent.exchange(aside, self.name)
            self.entry = aside
            self.parent.sync()  # edge X

    def was_replaced(self) -> bool:
        """Whether its name leads to another directory than the one that is held."""
        return self.parent.find(self.entry) is not None and not self.is_itself()

    def prepare(self) -> None:
        """Make the files safe to rewrite in place: one that somebody has open or mapped, or that has a second name, is unlinked.
        Whoever has it keeps its bytes, and the next writer makes a new file. What is no file is put aside, what somebody touched
        is not known any more, and of the rest some blocks are read back."""
        folder = self.held()
        for name, found in folder.entries().items():
            if not stat.S_ISREG(found.st_mode):
                folder.put_aside(name, self.parent)
            elif (why := in_use(folder.at(name), folder.fd)) is not None:
                log.info("%s is not rewritten in place: %s; a new file takes its place", folder.at(name), why)
                folder.unlink(name)
        for name in [] if self._before is None else list(self._before[1]):
            found_now = folder.find(name)
            if found_now is None or name not in self._files or file_id(found_now) != self._files[name][0]:
                log.info("%s was changed while it waited: it is written anew, as a whole", folder.at(name))
                self._distrust(name)
        self._read_some()

    def _distrust(self, name: str) -> None:
        if self._before is not None:
            self._before[1].pop(name, None)
        self._files.pop(name, None)

    def _read_some(self) -> None:
        """Read back the next few of the blocks that are not to be rewritten: a disk may lose what waits on it."""
        if self._before is None:
            return
        _, chunks, chunk_bytes = self._before
        known = [(name, chunk) for name, each in chunks.items() for chunk in each]
        budget = READ_BACK_BYTES
        for _ in range(len(known)):
            name, chunk = known[self._turn % len(known)]
            self._turn += 1
            if name in self._files:
                self._read_block(self._files[name][1], chunk * chunk_bytes, chunk_bytes)
                budget -= chunk_bytes
            if budget <= 0:
                return

    def _read_block(self, file: FileRecord, begin: int, nbytes: int) -> None:
        """One of them. A block that was lost costs the file, and the slot if the disk says so: raises ``OSError`` then."""
        folder = self.held()
        sums = range(begin // file.chunk_bytes, min((begin + nbytes) // file.chunk_bytes, len(file.crc32c)))
        try:
            with folder.opened(file.name, os.O_RDONLY) as fd:
                read_verified(folder.at(file.name), nbytes=file.nbytes, chunk_bytes=file.chunk_bytes, crcs=file.crc32c,
                              targets=[], threads=1, held=fd, only=[sums])  # fmt: skip
        except Corrupt as error:
            log.error("%s rotted while it waited, and is written anew: %s", folder.at(file.name), error)
            folder.unlink(file.name)
            self._distrust(file.name)

    def reserve(self, files: Mapping[str, int]) -> None:
        """Have the file system set blocks aside for these files (name: bytes), if it can. Raises ``OSError``."""
        self.prepare()
        for name, nbytes in files.items():
            with self.held().opened(name, os.O_RDWR | os.O_CREAT) as fd:
                if os.fstat(fd).st_blocks * 512 < nbytes:
                    _allocate(fd, nbytes)

    def lacks(self, files: Mapping[str, int]) -> int:
        """Bytes of these files that have no blocks on the disk yet."""
        found = {name: self.held().find(name) for name in files}
        return sum(max(nbytes - (each.st_blocks * 512 if (each := found[name]) else 0), 0) for name, nbytes in files.items())

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Turn an ``OSError`` into ``SaveFailed``, and note whether the slot can be trusted after it."""
        try:
            yield
        except OSError as error:
            raise self._failed(error) from error  # no name for it here: its traceback would lead to this frame, and back

    def _failed(self, error: OSError) -> SaveFailed:
        path = os.fsdecode(error.filename) if error.filename else self.path
        failed = SaveFailed(io.operation_of(error) or "open", path, getattr(error, "offset", None), error.errno)
        self.suspect |= retires_slot(failed)
        return failed


def _allocate(fd: int, nbytes: int) -> None:
    """Some file systems cannot; there the look at the free space has to do."""
    try:
        io.fallocate(fd, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
