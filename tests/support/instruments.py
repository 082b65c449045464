"""The instruments of tests: faults, delays and a log of file operations, in an engine of their own.

The engine that is shipped has none. Importing this module builds it once more, with ``csrc/testing``, and puts that
extension in the place of ``fxckpt.engine._engine`` for the whole process; nothing may have loaded the other one before.
A script that uses them in a process of its own imports this module first. All are off until used.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from repository import ROOT

from fxckpt.engine import io

BUILT = ROOT / "build" / "testing"
ENGINE = "fxckpt.engine._engine"


def _sources() -> list[Path]:
    return [*sorted((ROOT / "csrc").rglob("*.[ch]")), ROOT / "fxckpt/engine/cdef.h", ROOT / "fxckpt/engine/build.py"]


def _extension() -> Path:
    """Builds the extension, unless these very sources were built before; processes that want it at a time wait."""
    key = hashlib.sha256(f"{sys.implementation.cache_tag} {platform.machine()}".encode())
    for path in _sources():
        key.update(path.read_bytes())
    extension = BUILT / f"{key.hexdigest()[:16]}.so"
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not extension.exists():
            for old in BUILT.glob("*.so"):
                old.unlink()
            _compile(extension)
    return extension


def _compile(extension: Path) -> None:
    from fxckpt.engine import build

    with tempfile.TemporaryDirectory(dir=BUILT) as directory:
        os.replace(build.make_builder("_testing_engine", testing=True).compile(tmpdir=directory), extension)


def _install() -> ModuleType:
    if ENGINE in sys.modules:
        raise RuntimeError("import instruments before anything that uses the engine of fxckpt")
    spec = importlib.util.spec_from_file_location("_testing_engine", _extension())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[ENGINE] = module
    return module


_engine = _install()
ffi, lib = _engine.ffi, _engine.lib

OPERATIONS = tuple(ffi.string(lib.fx_op_name(op)).decode() for op in range(lib.FX_OPS))


def _number(operation: str | None) -> int:
    if operation is None:
        return -1
    if operation not in OPERATIONS:
        raise ValueError(f"{operation!r} is none of {', '.join(OPERATIONS)}")
    return OPERATIONS.index(operation)


# ---- faults and delays ----


def fail(nth: int, errno: int, op: str | None = None) -> None:
    """The ``nth`` call from now (1: the next), of this kind or of any, fails with ``errno`` and does nothing.

    ``errno=0``: a pwrite or pread transfers only half of what was asked.
    """
    lib.fx_io_fail(_number(op), nth, errno)


def fail_none() -> None:
    """No more faults."""
    lib.fx_io_fail(-1, 0, 0)


def delay(op: str, microseconds: int) -> None:
    """Each call of this kind takes this much longer; ``"copy"``: each piece that a writer thread copies."""
    lib.fx_io_delay(_number(op), microseconds * 1000)


def calm() -> None:
    """No more faults, no more delays."""
    fail_none()
    for op in OPERATIONS:
        delay(op, 0)


def calls(op: str | None = None) -> int:
    """Calls made so far, of this kind or of all; counted from the first use of any instrument."""
    return lib.fx_io_calls(_number(op))


# ---- the log ----

_ENTRY = struct.Struct("=qqQQiiiiII")  # struct log_entry in csrc/testing/instruments.c


@dataclass(frozen=True)
class Call:
    """One mutating call of a log, in the order in which the kernel saw it.

    Paths are absolute and as they were at the time of the call: for a descriptor, the name its file had then.
    ``open`` is logged with its ``flags``, and ``created`` if the file was not there before.
    """

    order: int  # in the log
    op: str
    path: str
    target: str  # of a rename, and the other name of an exchange
    offset: int  # of a pwrite
    length: int  # asked of a pwrite; size of an ftruncate
    flags: int  # of an open
    mode: int  # of an open or mkdir
    created: bool
    data: bytes  # what a pwrite put on disk: `result` bytes
    result: int  # negative: errno, and nothing was done


def record(path: str | os.PathLike[str], append: bool = False) -> None:
    """Writes every mutating call, with its data, to a log until :func:`stop_recording`. Serialises calls.

    With ``append`` they go behind what the log has already; several processes may do so at a time, and are serialised.
    """
    if result := lib.fx_io_record(os.fsencode(path), append):
        raise io.os_error("record", -result, os.fspath(path))


def stop_recording() -> None:
    """Ends the log; raises if it could not be written."""
    if result := lib.fx_io_stop_recording():
        raise io.os_error("record", -result, "the log of calls")


def read_log(path: str | os.PathLike[str]) -> list[Call]:
    """The calls of a log."""
    found: list[Call] = []
    with memoryview(io.read_file(path)) as raw:
        at = 0
        while at < len(raw):
            result, offset, length, n_data, op, flags, mode, created, n_path, n_target = _ENTRY.unpack_from(raw, at)
            at += _ENTRY.size
            parts = []
            for n in (n_path, n_target, n_data):
                parts.append(bytes(raw[at : at + n]))
                at += n
            name, target, data = os.fsdecode(parts[0]), os.fsdecode(parts[1]), parts[2]
            found.append(Call(len(found), OPERATIONS[op], name, target, offset, length, flags, mode, bool(created), data, result))
    return found


# ---- what only tests call ----


def crc32c_portable(buffer: bytes, crc: int = 0) -> int:
    """CRC-32C from tables: what runs on a processor without the instruction."""
    data = ffi.from_buffer(buffer)
    return lib.fx_crc32c_portable(crc, data, len(data))
