"""Look at what fxckpt needs and can use on this machine: the engine, its checksums, O_DIRECT, space, CUDA.

With DIR, also at the disk it lies on and at who writes to the store in it; nothing is left there. Exit status 1 if something
is missing without which nothing works. With --hosts N, started on N hosts at once, at whether each sees there what the others do.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import importlib.metadata
import mmap
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict

from fxckpt.cli import common
from fxckpt.cli.findings import GOOD, NOTE, WRONG, Finding
from fxckpt.cli.hosts import Hosts
from fxckpt.errors import FxckptError, SetupError
from fxckpt.store import lock, names
from fxckpt.store.files import space
from fxckpt.store.identity import check_store

HELP = "what works on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", nargs="?", metavar="DIR", help="a store, or where one is to be")
    parser.add_argument("--hosts", type=int, metavar="N", help="DIR is shared by so many hosts, and this is started on each")


def run(args: argparse.Namespace) -> int:
    if args.hosts is not None and (args.dir is None or args.hosts < 2):
        raise SetupError("--hosts takes two or more, and the directory that they share")
    found = list(findings(args.dir, args.hosts))
    if args.json:
        common.print_json({"findings": [asdict(each) for each in found]})
    else:
        width = max(len(each.what) for each in found)
        for each in found:
            common.say(f"{each.verdict:5}  {each.what:{width}}  {each.detail}")
    return common.FAILED if any(each.verdict == WRONG for each in found) else common.OK


def findings(directory: str | None, hosts: int | None = None) -> Iterator[Finding]:
    """Everything, in the order of a report. ``hosts``: so many share the directory."""
    for check in (_python, _torch, _engine, _compiler, _shared_memory, _cuda):
        yield check()
    if directory is None:
        return
    there = os.path.abspath(directory)
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    yield _space(there)
    if not os.access(there, os.W_OK):
        yield Finding("writing", WRONG, f"no permission to write in {there}")
        return
    with tempfile.TemporaryDirectory(prefix=".fxckpt-doctor-", dir=there, ignore_cleanup_errors=True) as folder:
        for probe in (_direct, _lease, _lock, _sync):
            yield probe(folder)
    yield _store(directory)
    if hosts is not None:
        yield from Hosts(there, hosts).findings()


def _python() -> Finding:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()} on {platform.machine()}"
    return Finding("system", GOOD if sys.platform == "linux" else WRONG, system + f", {os.cpu_count()} processors")


def _torch() -> Finding:
    """Its version, without importing it."""
    try:
        return Finding("torch", GOOD, importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", WRONG, "not installed: pip install torch")


def _engine() -> Finding:
    from fxckpt.engine.reading import crc32c_implementation

    try:
        kind = crc32c_implementation()
    except FxckptError as error:
        return Finding("engine", WRONG, str(error))
    hint = "" if kind != "portable" else ": this processor has no instruction for it, which makes it several times slower"
    return Finding("engine", GOOD if kind != "portable" else NOTE, f"loads; CRC-32C by {kind}{hint}")


def _compiler() -> Finding:
    """torch.compile on CPU needs one."""
    found = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    if found is None:
        return Finding("C++ compiler", NOTE, "none found: torch.compile on CPU needs g++ or clang++ (Debian: build-essential)")
    return Finding("C++ compiler", GOOD, found)


def _shared_memory() -> Finding:
    try:
        free, total = space("/dev/shm")
    except OSError as error:
        return Finding("/dev/shm", NOTE, f"not there: {error.strerror}")
    return Finding("/dev/shm", GOOD, f"{common.human(free)} of {common.human(total)} free")


def _cuda() -> Finding:
    """Ask the driver, as the engine would."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding("CUDA", NOTE, "no driver (libcuda.so.1): CPU training only")
    count = ctypes.c_int(0)
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return Finding("CUDA", NOTE, f"a driver, but no device (CUresult {status})")
    found = []
    for index in range(count.value):
        device, name = ctypes.c_int(0), ctypes.create_string_buffer(100)
        failed = cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetName(name, 100, device)
        found.append(f"device {index}" if failed else name.value.decode(errors="replace"))
    return Finding("CUDA", GOOD, ", ".join(found))


def _space(there: str) -> Finding:
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return Finding("space", WRONG, f"{there} is mounted read-only")
    free, total = space(there)
    verdict = NOTE if free < total / 20 else GOOD
    return Finding("space", verdict, f"{common.human(free)} of {common.human(total)} free on {there}")


def _direct(folder: str) -> Finding:
    """Open with O_DIRECT and write one block, which is where some file systems refuse."""
    try:
        fd = os.open(os.path.join(folder, "direct"), os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.pwrite(fd, mmap.mmap(-1, 4096), 0)
        finally:
            os.close(fd)
    except OSError as error:
        return Finding("O_DIRECT", NOTE, f"refused ({error.strerror}): checkpoints go through the page cache, which is slower")
    return Finding("O_DIRECT", GOOD, "accepted")


def _lease(folder: str) -> Finding:
    """Without leases a trainer cannot tell that somebody maps a file, and makes new ones instead of overwriting."""
    fd = os.open(os.path.join(folder, "lease"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return Finding("write leases", NOTE, f"none ({error.strerror}): slots are written anew instead of in place: slower")
    finally:
        os.close(fd)
    return Finding("write leases", GOOD, "yes: slots are overwritten in place")


def _lock(folder: str) -> Finding:
    """Which kinds of locks work; of those that are the descriptor's, a second one must be refused."""
    found = [kind for kind in lock.KINDS if _keeps_out(kind, os.path.join(folder, f"lock-{kind}"))]
    if not found:
        return Finding("file locks", WRONG, "none works here (OFD, POSIX, flock): no store can be opened")
    if found[0] != "POSIX":
        return Finding("file locks", GOOD, ", ".join(found))
    hint = "without OFD, a process that reads the lock file of its own store loses the lock until its next checkpoint"
    return Finding("file locks", NOTE, f"{', '.join(found)}: {hint}")


def _keeps_out(kind: str, path: str) -> bool:
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for _ in range(2))
    try:
        lock.KINDS[kind](first)
        if kind == "POSIX":
            return True  # it is the process's own, so that only another one is refused
        lock.KINDS[kind](second)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(first)
        os.close(second)
    return False


def _sync(folder: str) -> Finding:
    """The median of a few syncs of a small file."""
    times = []
    fd = os.open(os.path.join(folder, "sync"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(5):
            begun = time.perf_counter()
            os.pwrite(fd, b"x" * 4096, 0)
            os.fsync(fd)
            times.append(time.perf_counter() - begun)
    finally:
        os.close(fd)
    return Finding("fsync", GOOD, f"{common.duration(sorted(times)[2])} for one block")


def _store(directory: str) -> Finding:
    """Whether a store is there, and who writes to it."""
    try:
        check_store(os.path.abspath(directory))
    except FxckptError as error:
        return Finding("store", WRONG, str(error))
    if not os.path.isdir(directory):
        return Finding("store", GOOD, f"none yet: {directory} will be made")
    count = len(names.committed(os.path.abspath(directory)))
    holder = lock.holder(os.path.abspath(directory))
    who = "nobody writes to it" if holder is None else f"process {holder} writes to it"
    return Finding("store", GOOD, f"{count} checkpoints; {who}")
