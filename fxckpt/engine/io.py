"""Every file operation of engine and store, through the one table in C.

Functions loop over EINTR and short transfers. What fails raises ``OSError`` of the errno's own class that says which call
it was: ``operation`` (the name of the function here), ``filename``, and ``offset`` in the file (or None).

``below`` (of a rename's target: ``into``) is the descriptor of a directory: only the last name of the path counts then, and
is looked up there, so that no link which somebody puts on the way leads elsewhere. Modes are subject to the umask.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from fxckpt.engine._lib import load

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK = 1 << 20  # bytes that read_file reads at a time

CWD = -100  # AT_FDCWD: the path counts

StrPath = str | os.PathLike[str]

_running: dict[int, str] = {}
"""The operation that each thread is in. No lock: a thread changes its own entry only."""


def running(thread: int | None) -> str | None:
    """The operation that the thread with this identifier is in now, if it is in one."""
    return _running.get(thread) if thread is not None else None


def operation_of(error: OSError) -> str | None:
    """The operation that raised it; None if it does not come from here."""
    return getattr(error, "operation", None)


def os_error(operation: str, errno: int, path: str, offset: int | None = None) -> OSError:
    """``OSError`` of its errno's own class, with the attributes that the head of this file names."""
    at = "" if offset is None else f" at offset {offset}"
    error = OSError(errno, os.strerror(errno) + at, path)
    error.operation, error.offset = operation, offset  # type: ignore[attr-defined]
    return error


def _name(fd: int) -> str:
    """For messages: the path that a descriptor has now."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"


def _call(
    operation: str, function: Callable[..., int], *arguments: Any, at: StrPath | int, offset: Callable[[], int] | None = None
) -> int:
    """Makes one call, which the thread is in meanwhile, and raises its failure: ``at`` that path or descriptor."""
    thread = get_ident()
    _running[thread] = operation
    try:
        result = function(*arguments)
    finally:
        _running.pop(thread, None)
    if result >= 0:
        return result
    path = _name(at) if isinstance(at, int) else os.fsdecode(at)
    raise os_error(operation, -result, path, None if offset is None else offset())


def open(path: StrPath, flags: int, mode: int = 0o666, below: int = CWD) -> int:
    """A descriptor, close-on-exec."""
    return _call("open", load()[1].fx_open, below, os.fsencode(path), flags, mode, at=path)


def close(fd: int) -> None:
    """Closes a descriptor; it is closed also when this raises."""
    _call("close", load()[1].fx_close, fd, at=_name(fd))


def close_in_child(fd: int, yes: bool = True) -> None:
    """Has every child that is forked from now on close the descriptor first thing; ``yes=False`` takes that back."""
    if yes:
        _call("open", load()[1].fx_fork_close, fd, at=fd)
    else:
        load()[1].fx_fork_keep(fd)


def pwrite(fd: int, buffer: Buffer, offset: int) -> None:
    """Writes all of a contiguous buffer."""
    ffi, lib = load()
    data, done = ffi.from_buffer(buffer), ffi.new("size_t *")
    _call("pwrite", lib.fx_pwrite, fd, data, len(data), offset, done, at=fd, offset=lambda: offset + done[0])


def pread(fd: int, n: int, offset: int) -> bytes:
    """``n`` bytes, or fewer at the end of the file."""
    ffi, lib = load()
    data, done = bytearray(n), ffi.new("size_t *")
    _call("pread", lib.fx_pread, fd, ffi.from_buffer(data), n, offset, done, at=fd, offset=lambda: offset + done[0])
    return bytes(memoryview(data)[: done[0]])


def ftruncate(fd: int, nbytes: int) -> None:
    """Sets the file's size."""
    _call("ftruncate", load()[1].fx_ftruncate, fd, nbytes, at=fd)


def fallocate(fd: int, nbytes: int) -> None:
    """Reserves disk space for the first ``nbytes``, and makes the file at least that long."""
    _call("fallocate", load()[1].fx_fallocate, fd, nbytes, at=fd)


def fdatasync(fd: int) -> None:
    """Makes the file's data durable, with the metadata needed to read it back."""
    _call("fdatasync", load()[1].fx_fdatasync, fd, at=fd)


def fsync(fd: int) -> None:
    """Makes the file's (or directory's) data and metadata durable."""
    _call("fsync", load()[1].fx_fsync, fd, at=fd)


def rename(source: StrPath, target: StrPath, below: int = CWD, into: int = CWD) -> None:
    """Renames, replacing what is there."""
    _call("rename", load()[1].fx_rename, below, os.fsencode(source), into, os.fsencode(target), at=source)


def exchange(one: StrPath, other: StrPath, below: int = CWD, into: int = CWD) -> None:
    """Gives each of two the other's name, at once. EINVAL or ENOSYS where the file system or the kernel cannot."""
    _call("exchange", load()[1].fx_exchange, below, os.fsencode(one), into, os.fsencode(other), at=one)


def unlink(path: StrPath, below: int = CWD) -> None:
    """Removes a file, or a link."""
    _call("unlink", load()[1].fx_unlink, below, os.fsencode(path), at=path)


def mkdir(path: StrPath, mode: int = 0o777, below: int = CWD) -> None:
    """Makes a directory."""
    _call("mkdir", load()[1].fx_mkdir, below, os.fsencode(path), mode, at=path)


def rmdir(path: StrPath, below: int = CWD) -> None:
    """Removes an empty directory."""
    _call("rmdir", load()[1].fx_rmdir, below, os.fsencode(path), at=path)


def fsync_dir(path: StrPath, fd: int | None = None) -> None:
    """Makes the entries of a directory (the one that ``fd`` has open, if given) durable: names created, renamed or removed."""
    at, below = (path, CWD) if fd is None else (os.path.join(path, "."), fd)
    fd = open(at, os.O_RDONLY | os.O_DIRECTORY, below=below)
    try:
        fsync(fd)
    finally:
        close(fd)


def read_file(path: StrPath) -> bytes:
    """All of a file; not through a link."""
    fd = open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        parts = [pread(fd, max(os.fstat(fd).st_size, 1), 0)]
        while parts[-1]:  # it may have grown meanwhile
            parts.append(pread(fd, BLOCK, sum(map(len, parts))))
        return b"".join(parts)
    finally:
        close(fd)
