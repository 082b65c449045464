"""Every file operation of engine and store, through the one table in C; and the test instruments in it.

Functions loop over EINTR and short transfers and raise ``OSError`` with the file's name, and the offset where
there is one. The instruments (:func:`record`, :func:`fail`, :func:`delay`, :func:`calls`) are off until used.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

from fxckpt.engine._lib import load

BLOCK = 1 << 20  # bytes that read_file reads at a time


def os_error(errno: int, path: str, offset: int | None = None) -> OSError:
    """``OSError`` of its errno's own class, with the file name and an ``offset`` attribute (or None)."""
    at = "" if offset is None else f" at offset {offset}"
    error = OSError(errno, os.strerror(errno) + at, path)
    error.offset = offset  # type: ignore[attr-defined]
    return error


def _name(fd: int) -> str:
    """For messages: the path that a descriptor has now."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"


def _check(result: int, path: str | os.PathLike | int, offset: int | None = None) -> int:
    if result >= 0:
        return result
    raise os_error(-result, _name(path) if isinstance(path, int) else os.fsdecode(path), offset)


def open(path: str | os.PathLike, flags: int, mode: int = 0o644) -> int:
    """A descriptor, close-on-exec."""
    return _check(load()[1].fx_open(os.fsencode(path), flags, mode), path)


def close(fd: int) -> None:
    """Closes a descriptor; it is closed also when this raises."""
    name = _name(fd)
    result = load()[1].fx_close(fd)
    if result < 0:
        raise os_error(-result, name)


def pwrite(fd: int, buffer: Any, offset: int) -> None:
    """Writes all of a contiguous buffer."""
    ffi, lib = load()
    data, done = ffi.from_buffer(buffer), ffi.new("size_t *")
    result = lib.fx_pwrite(fd, data, len(data), offset, done)
    _check(result, fd, offset + done[0])


def pread(fd: int, n: int, offset: int) -> bytes:
    """``n`` bytes, or fewer at the end of the file."""
    ffi, lib = load()
    data, done = bytearray(n), ffi.new("size_t *")
    result = lib.fx_pread(fd, ffi.from_buffer(data), n, offset, done)
    _check(result, fd, offset + done[0])
    return bytes(memoryview(data)[: done[0]])


def ftruncate(fd: int, nbytes: int) -> None:
    """Sets the file's size."""
    _check(load()[1].fx_ftruncate(fd, nbytes), fd, nbytes)


def fallocate(fd: int, nbytes: int) -> None:
    """Reserves disk space for the first ``nbytes``, and makes the file at least that long."""
    _check(load()[1].fx_fallocate(fd, nbytes), fd, nbytes)


def fdatasync(fd: int) -> None:
    """Makes the file's data durable, with the metadata needed to read it back."""
    _check(load()[1].fx_fdatasync(fd), fd)


def fsync(fd: int) -> None:
    """Makes the file's (or directory's) data and metadata durable."""
    _check(load()[1].fx_fsync(fd), fd)


def rename(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Renames, replacing what is there."""
    _check(load()[1].fx_rename(os.fsencode(source), os.fsencode(target)), source)


def unlink(path: str | os.PathLike) -> None:
    """Removes a file."""
    _check(load()[1].fx_unlink(os.fsencode(path)), path)


def mkdir(path: str | os.PathLike, mode: int = 0o777) -> None:
    """Makes a directory."""
    _check(load()[1].fx_mkdir(os.fsencode(path), mode), path)


def rmdir(path: str | os.PathLike) -> None:
    """Removes an empty directory."""
    _check(load()[1].fx_rmdir(os.fsencode(path)), path)


def fsync_dir(path: str | os.PathLike) -> None:
    """Makes the entries of a directory durable: names created, renamed or removed in it."""
    fd = open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(fd)
    finally:
        close(fd)


def read_file(path: str | os.PathLike) -> bytes:
    """All of a file."""
    fd = open(path, os.O_RDONLY)
    try:
        parts = [pread(fd, max(os.fstat(fd).st_size, 1), 0)]
        while parts[-1]:  # it may have grown meanwhile
            parts.append(pread(fd, BLOCK, sum(map(len, parts))))
        return b"".join(parts)
    finally:
        close(fd)


# ---- test instruments ----

_ENTRY = struct.Struct("=qqQQiiiiII")  # struct log_entry in csrc/io_test.c


@dataclass(frozen=True)
class Call:
    """One mutating call of a log, in the order in which the kernel saw it.

    Paths are absolute and as they were at the time of the call: for a descriptor, the name its file had then.
    ``open`` is logged with its ``flags``, and ``created`` if the file was not there before.
    """

    order: int  # in the log
    op: str
    path: str
    target: str  # of a rename
    offset: int  # of a pwrite
    length: int  # asked of a pwrite; size of an ftruncate
    flags: int  # of an open
    mode: int  # of an open or mkdir
    created: bool
    data: bytes  # what a pwrite put on disk: `result` bytes
    result: int  # negative: errno, and nothing was done


def _ops() -> list[str]:
    ffi, lib = load()
    return [ffi.string(lib.fx_op_name(op)).decode() for op in range(lib.FX_OPS)]


def _op(name: str | None) -> int:
    if name is None:
        return -1
    if name not in _ops():
        raise ValueError(f"{name!r} is none of {', '.join(_ops())}")
    return _ops().index(name)


def record(path: str | os.PathLike, append: bool = False) -> None:
    """Writes every mutating call, with its data, to a log until :func:`stop_recording`. Serialises calls.

    With ``append`` they go behind what the log has already; several processes may do so at a time, and are serialised.
    """
    _check(load()[1].fx_io_record(os.fsencode(path), append), path)


def stop_recording() -> None:
    """Ends the log; raises if it could not be written."""
    _check(load()[1].fx_io_stop_recording(), "the log of calls")


def read_log(path: str | os.PathLike) -> list[Call]:
    """The calls of a log."""
    with memoryview(read_file(path)) as raw:
        ops, calls, at = _ops(), [], 0
        while at < len(raw):
            result, offset, length, n_data, op, *rest, n_path, n_target = _ENTRY.unpack_from(raw, at)
            flags, mode, created = rest
            at += _ENTRY.size
            ends = [at + n_path, at + n_path + n_target, at + n_path + n_target + n_data]
            name, target, data = (bytes(raw[begin:end]) for begin, end in zip([at, *ends], ends))
            calls.append(
                Call(
                    len(calls),
                    ops[op],
                    os.fsdecode(name),
                    os.fsdecode(target),
                    offset,
                    length,
                    flags,
                    mode,
                    bool(created),
                    data,
                    result,
                )
            )
            at = ends[-1]
    return calls


def fail(nth: int, errno: int, op: str | None = None) -> None:
    """The ``nth`` call from now (1: the next), of this kind or of any, fails with ``errno`` and does nothing.

    ``errno=0``: a pwrite or pread transfers only half of what was asked.
    """
    load()[1].fx_io_fail(_op(op), nth, errno)


def fail_none() -> None:
    """No more faults."""
    load()[1].fx_io_fail(-1, 0, 0)


def delay(op: str, microseconds: int) -> None:
    """Each call of this kind takes this much longer; ``"copy"``: each piece that a writer thread copies."""
    load()[1].fx_io_delay(_op(op), microseconds * 1000)


def calls(op: str | None = None) -> int:
    """Calls made so far, of this kind or of all; counted from the first use of any instrument."""
    return load()[1].fx_io_calls(_op(op))
