"""Small files written durably, and the guard before a file is rewritten in place."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
from collections.abc import Iterable, Mapping

from fxckpt.engine import io
from fxckpt.engine.sums import continue_sums, sums_of_blocks
from fxckpt.errors import Corrupt
from fxckpt.store import names
from fxckpt.store.checks import MAX_BYTES
from fxckpt.store.dtypes import Tensor, raw_tensor
from fxckpt.store.folder import Folder, check_regular, opened
from fxckpt.store.layout import FileLayout, TensorSpec, lay_out, sum_bytes
from fxckpt.store.record import FileRecord

PIECE_BYTES = 4 << 20
"""What the store writes itself it writes in pieces of this size at most."""

DAMAGE = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""Errors that mean that stored bytes are lost; others (permissions, too many open files) do not."""

FOREIGN = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENOTDIR})
"""Errors that mean that something else lies in the place of a file or directory."""

UNREADABLE = DAMAGE | {errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
"""What a reader counts as damage beside: something else lies in the file's place, or no file can have that name."""


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


def replace_file(folder: Folder, name: str, data: bytes, *, durable: bool) -> None:
    """Put ``data`` in a file so that a reader sees the old one or all of the new. The caller syncs the directory. Not
    ``durable``: a power cut may leave an empty or torn file under this name."""
    temporary = name + names.TEMPORARY
    folder.remove_tree(temporary)  # what a crash left, or somebody put there: its bytes may be another file's, too
    with folder.opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        io.pwrite(fd, data, 0)
        if durable:
            io.fsync(fd)
    folder.rename(temporary, name)


def write_tensors(folder: Folder, name: str, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write ``tensors`` (arrays, CPU torch tensors, ``RawTensor``) as a safetensors file, in place, and sync it."""
    raw = {key: raw_tensor(tensor) for key, tensor in tensors.items()}
    layout = lay_out(name, [TensorSpec(key, tensor.dtype, tensor.shape, 0) for key, tensor in raw.items()])
    return write_laid_out(folder, layout, (raw[placed.spec.key].data for placed in layout.tensors))


def write_laid_out(folder: Folder, layout: FileLayout, data: Iterable[memoryview]) -> FileRecord:
    """Write a file whose tensors' bytes come in the layout's order, in pieces of any size; in place, and sync it."""
    block, at = sum_bytes(layout.nbytes), 0
    crcs = sums_of_blocks(layout.nbytes, block)
    with folder.opened(layout.name, os.O_RDWR | os.O_CREAT) as fd:
        io.ftruncate(fd, layout.nbytes)
        for piece in itertools.chain([memoryview(layout.header)], data):
            while piece.nbytes:
                part = piece[:PIECE_BYTES]
                continue_sums(crcs, block, at, part)
                io.pwrite(fd, part, at)
                at, piece = at + part.nbytes, piece[part.nbytes :]
        # Edge D: before the directory gets its final name, else a checkpoint may not verify after a power cut.
        io.fdatasync(fd)
    return FileRecord(layout.name, layout.nbytes, block, crcs)


def write_bytes(folder: Folder, name: str, data: bytes) -> FileRecord:
    """A small file, durable, that a record is to vouch for."""
    replace_file(folder, name, data, durable=True)
    block = sum_bytes(len(data))
    crcs = sums_of_blocks(len(data), block)
    continue_sums(crcs, block, 0, data)
    return FileRecord(name, len(data), block, crcs)


def space(directory: str) -> tuple[int, int]:
    """Bytes of its file system: those that are free, and all."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def make_directories(path: str) -> None:
    """Make ``path`` and what is missing above it. ``sync_ancestors`` makes them durable."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            io.mkdir(directory)
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


def in_use(path: str, below: int = io.CWD) -> str | None:
    """Why the file must not be rewritten in place, or None when nobody else can see its bytes.

    A second name (a hard-linked backup) shows in the link count. Open descriptors and mappings (each tensor of
    safetensors' ``load_file`` is one, and outlives the descriptor) make the kernel refuse a write lease. What cannot be
    found out, because the file system has no leases or the file is somebody else's, counts as in use.
    """
    with opened(path, os.O_RDWR, below) as fd:
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
