"""What the numbers were measured on: processor, memory, file system, versions, the disk's own bandwidth."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import threading
import time
from pathlib import Path

MIB = 1 << 20


def describe(folder: Path) -> dict[str, str | int]:
    """Processor, cores, memory (GiB), kernel, the file system under ``folder``, versions. No host name."""
    import torch

    cpuinfo = _text("/proc/cpuinfo")
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if "model name" in line), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model + (" (virtual machine)" if " hypervisor" in cpuinfo else ""),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "kernel": platform.release(),
        "file_system": _file_system(folder),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def line(machine: dict[str, str | int]) -> str:
    """The description as one line of text."""
    return "{cores} × {processor}, {memory_gib} GiB, {file_system}, ".format_map(machine) + (
        "Linux {kernel}, Python {python}, torch {torch}".format_map(machine)
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""  # not every system has this file, and a process may have ended


def _file_system(folder: Path) -> str:
    """Type of the file system that ``folder`` lies on, by the longest mount point above it."""
    mounts = [entry.split()[1:3] for entry in _text("/proc/mounts").splitlines()]
    here = str(folder.resolve())
    above = [(point, kind) for point, kind in mounts if f"{here}/".startswith(point.rstrip("/") + "/")]
    return max(above, key=lambda mount: len(mount[0]), default=("", "unknown file system"))[1]


class Disk:
    """Measures how fast threads overwrite, or read, a fully written file in pieces, with O_DIRECT where it is accepted.

    This is the ceiling for anything that writes checkpoints: fresh files and buffered writes are slower.
    """

    def __init__(self, folder: Path, size: int = 256 * MIB, piece: int = 4 * MIB, threads: int = 2):
        self.path, self.size, self.piece, self.threads = folder / "bandwidth", size, piece, threads
        self.buffers = [mmap.mmap(-1, piece) for _ in range(threads)]  # page-aligned, as O_DIRECT asks
        for buffer in self.buffers:
            buffer.write(os.urandom(MIB) * (piece // MIB))
        self.direct = True
        if not self.path.exists() or self.path.stat().st_size < size:
            self.measure()

    def measure(self, write: bool = True) -> float:
        """Bytes per second; what is written is durable at the end of the measurement."""
        fd = self._open()
        try:
            began = time.perf_counter()
            workers = [threading.Thread(target=self._part, args=(fd, n, write)) for n in range(self.threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if write:
                os.fdatasync(fd)
            return self.size / (time.perf_counter() - began)
        finally:
            os.close(fd)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
        except OSError:  # tmpfs and some network file systems refuse the flag
            self.direct = False
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def _part(self, fd: int, first: int, write: bool) -> None:
        for offset in range(first * self.piece, self.size, self.threads * self.piece):
            if write:
                os.pwrite(fd, self.buffers[first], offset)
            else:
                os.preadv(fd, [self.buffers[first]], offset)


def below(pid: int | str = "self") -> list[int]:
    """The processes that a process has started and that run still, and theirs."""
    found = [int(child) for each in Path(f"/proc/{pid}/task").glob("*/children") for child in _text(str(each)).split()]
    return found + [further for child in found for further in below(child)]


def reset_peak_memory() -> None:
    """Forget the peaks of resident memory (``VmHWM``) of this process and those below it, so that only what follows counts."""
    for pid in ("self", *below()):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident memory in bytes since :func:`reset_peak_memory`; of each process below also its own largest, without
    what it shares with others."""
    mine = _status("self", "VmHWM:")
    return mine + sum(max(0, _status(pid, "VmHWM:") - _status(pid, "RssShmem:") - _status(pid, "RssFile:")) for pid in below())


def bytes_written() -> int:
    """What this process and those below it have sent to disks so far."""
    entries = [_text(f"/proc/{pid}/io").splitlines() for pid in ("self", *below())]
    return sum(int(entry.split()[1]) for lines in entries for entry in lines if entry.startswith("write_bytes"))


def _status(pid: int | str, entry: str) -> int:
    """Bytes of an entry in a process's status; 0 if it has ended."""
    lines = _text(f"/proc/{pid}/status").splitlines()
    return next((int(each.split()[1]) * 1024 for each in lines if each.startswith(entry)), 0)


def cold(path: Path) -> Path:
    """Drop a file, or every file below a folder, from the page cache."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)  # what is not on the disk yet stays in the cache
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return path


def size(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk."""
    return sum(each.stat().st_blocks * 512 for each in folder.rglob("*") if each.is_file())
