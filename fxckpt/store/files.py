"""Small files written durably, and the guard before a file is rewritten in place."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fxckpt.engine import crc32c, io
from fxckpt.errors import Corrupt
from fxckpt.store import names
from fxckpt.store.checks import MAX_BYTES
from fxckpt.store.dtypes import Tensor, raw_tensor
from fxckpt.store.layout import TensorSpec, lay_out
from fxckpt.store.record import FileRecord

CHUNK_BYTES = 4 << 20
"""The unit of checksums in the files that the store writes itself."""

DAMAGE = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""Errors that mean that stored bytes are lost; others (permissions, too many open files) do not."""

UNREADABLE = DAMAGE | {errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
"""What a reader counts as damage beside: something else lies in the file's place, or no file can have that name."""


@contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """A descriptor for the time of the block."""
    fd = io.open(path, flags)
    try:
        yield fd
    finally:
        io.close(fd)


def check_regular(path: str) -> os.stat_result:
    """What ``stat`` says of a file; ``Corrupt`` if it is none: a directory cannot be read, a pipe could be waited for."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise Corrupt(path, "it is a directory, not a file" if stat.S_ISDIR(found.st_mode) else "it is not a regular file")
    return found


def read_small(path: str, limit: int = MAX_BYTES) -> bytes:
    """A whole file. ``Corrupt`` if the medium lost it, something else is in its place, or it has more than ``limit`` bytes."""
    try:
        nbytes = check_regular(path).st_size
        if nbytes > limit:
            raise Corrupt(path, f"it has {nbytes} bytes, more than the {limit} that any such file has")
        return io.read_file(path)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise Corrupt(path, f"it cannot be read: {error.strerror}") from error


def replace_file(path: str, data: bytes, *, durable: bool) -> None:
    """Put ``data`` at ``path`` so that a reader sees the old file or all of the new. The caller syncs the directory. Not
    ``durable``: a power cut may leave an empty or torn file under this name."""
    temporary = path + names.TEMPORARY
    with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        io.pwrite(fd, data, 0)
        if durable:
            io.fsync(fd)
    io.rename(temporary, path)


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write ``tensors`` (arrays, CPU torch tensors, ``RawTensor``) as a safetensors file, in place, and sync it."""
    raw = {key: raw_tensor(tensor) for key, tensor in tensors.items()}
    specs = [TensorSpec(key, tensor.dtype, tensor.shape, 0) for key, tensor in raw.items()]
    layout = lay_out(os.path.basename(path), specs)
    pieces = [memoryview(layout.header), *(raw[placed.spec.key].data for placed in layout.tensors)]
    crcs: list[int] = []
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        io.ftruncate(fd, layout.nbytes)
        at = 0
        for piece in pieces:
            while piece.nbytes:  # cut where a chunk ends
                if at % CHUNK_BYTES == 0:
                    crcs.append(0)
                part = piece[: CHUNK_BYTES - at % CHUNK_BYTES]
                crcs[-1] = crc32c(part, crcs[-1])
                io.pwrite(fd, part, at)
                at, piece = at + part.nbytes, piece[part.nbytes :]
        # Edge D: before the directory gets its final name, else a checkpoint may not verify after a power cut.
        io.fdatasync(fd)
    return FileRecord(layout.name, layout.nbytes, CHUNK_BYTES, tuple(crcs))


def make_directories(path: str) -> None:
    """Make ``path`` and what is missing above it. ``sync_ancestors`` makes them durable."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            io.mkdir(directory, 0o755)
        except FileExistsError:
            if not os.path.isdir(directory):
                raise


def sync_ancestors(path: str) -> None:
    """Make the names of ``path`` and of all directories above it durable, up to the mount point. Syncing a directory covers what
    is in it, not its own name in its parent: without this a power cut could lose the directory with everything synced in it. All
    of them, because an earlier life may have made some and been killed."""
    device = os.stat(path).st_dev
    while (parent := os.path.dirname(path)) != path and os.stat(parent).st_dev == device:
        try:
            io.fsync_dir(parent)
        except PermissionError:
            return  # a directory we may not read is one that we did not make
        path = parent


def remove_tree(path: str) -> None:
    """Remove a directory and what is in it; fine if it is not there."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(entry.path)
        else:
            io.unlink(entry.path)
    io.rmdir(path)


def in_use(path: str) -> str | None:
    """Why the file must not be rewritten in place, or None when nobody else can see its bytes.

    A second name (a hard-linked backup) shows in the link count. Open descriptors and mappings (each tensor of
    safetensors' ``load_file`` is one, and outlives the descriptor) make the kernel refuse a write lease. What cannot be
    found out, because the file system has no leases or the file is somebody else's, counts as in use.
    """
    with opened(path, os.O_RDWR) as fd:
        if os.fstat(fd).st_nlink != 1:
            return "it has a second name (a hard link)"
        try:
            # Somebody opening the file while we hold the lease makes the kernel send a signal, SIGIO by default, which
            # would end the process; SIGURG is ignored by default.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            return "somebody has it open or mapped"
        except OSError as error:
            return f"the file system does not tell who has it open ({error.strerror})"
    return None
