"""The engine's life: threads, buffers, devices and counters; what begins checkpoints and fences them (Engine).

A forked child has none of the engine's threads. Every method looks at the process id first; in a child, what would use the
engine raises :class:`~fxckpt.errors.Cancelled`, and what only waits or cleans up does nothing.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from fxckpt.engine import io
from fxckpt.engine._lib import Lib, Streams, failure, in_slices, load, stream_array
from fxckpt.engine.checkpoint import Checkpoint
from fxckpt.engine.fetch import Fetch
from fxckpt.engine.plan import FileId, Placed, Plan
from fxckpt.errors import Cancelled, SetupError

log: logging.Logger = logging.getLogger("fxckpt")

EXIT_PATIENCE = 10.0  # seconds that an engine which nobody closed may take to end its threads


class EngineStatistics(TypedDict):
    """What an engine did so far. Stall is the time that callers of fences waited or helped; copying includes that help."""

    bytes_written: int
    staging_bytes: int
    staging_peak_bytes: int
    copy_seconds: float
    write_seconds: float
    stall_seconds: float


class Engine:
    """Writer threads and their buffers. ``memory_bytes`` bounds what they allocate: threads times chunk, plus staging.

    Raises :class:`SetupError` for sizes that cannot work, :class:`SaveFailed` if threads cannot start.
    """

    def __init__(
        self,
        *,
        threads: int = 2,
        chunk_bytes: int = 4 << 20,
        staging_bytes: int = 32 << 20,
        mock: bool = False,
        direct: bool = True,
    ):
        ffi, lib = load()
        if not 1 <= threads <= 256 or not 0 < chunk_bytes <= 1 << 30 or chunk_bytes % lib.FX_BLOCK:
            chunk = f"chunk_bytes={chunk_bytes} a multiple of {lib.FX_BLOCK} up to 1 GiB"
            raise SetupError(f"threads={threads} must be 1 to 256, {chunk}")
        if staging_bytes < 0:
            raise SetupError(f"staging_bytes={staging_bytes} must not be negative")
        self._ffi, self._lib, self._pid = ffi, lib, os.getpid()
        self.chunk_bytes: int = chunk_bytes
        self.staging_bytes: int = staging_bytes
        self.memory_bytes: int = threads * chunk_bytes + staging_bytes // chunk_bytes * chunk_bytes
        self._said_buffered = self._said_unbatched = False
        self._devices: set[int] = set()
        options = ffi.new("struct fx_options *", (threads, chunk_bytes, staging_bytes, mock, direct))
        out, error = ffi.new("struct fx_engine **"), ffi.new("struct fx_error *")
        self._finalizer = weakref.finalize(self, _free_engine, lib, out, self._pid)  # before there is anything to free
        if lib.fx_engine_new(options, out, error):
            raise failure(ffi, error)
        self._pointer = out[0]
        self._ring: object = None  # memory shared with a monitor: it must live until the engine is closed
        self._pending = lib.fx_engine_pending(self._pointer)

    def _is_elsewhere(self) -> bool:
        return os.getpid() != self._pid

    def plan(
        self, files: Sequence[tuple[int, bytes]], tensors: Sequence[Placed], layers: int, sum_bytes: int | None = None
    ) -> Plan:
        """Geometry of a checkpoint's files.

        ``files``: (bytes, a multiple of 4096; header that lies at offset 0). ``tensors``: (layer, file, absolute offset,
        nbytes, itemsize), those of a layer in the order in which its :class:`Sources` has them. Bytes that nothing covers
        are written as zeros. ``sum_bytes``: so many bytes of a file have a checksum, a whole number of them is a chunk; None: a
        chunk has one. Raises :class:`SetupError` for what overlaps or does not fit.
        """
        return Plan(self.chunk_bytes, sum_bytes or self.chunk_bytes, files, tensors, layers)

    def begin(
        self,
        plan: Plan,
        directory: str | os.PathLike[str],
        names: Sequence[str],
        known: Sequence[Mapping[int, int]] | None = None,
        waited: Sequence[FileId | None] | None = None,
        below: int = io.CWD,
    ) -> Checkpoint:
        """Opens or creates the plan's files under ``directory`` (``below``: its descriptor) and starts a checkpoint into them.
        A file with an empty name is not written: only its checksums are wanted.

        ``known[file]`` says of chunks, by their indices, what the disk holds there already, by ``digest_of`` their checksums: a
        chunk that has the same is not written again. A CRC has 32 bits, so give only chunks that are expected not to have
        changed. ``waited[file]`` says which file that was: of one that is another one by now, or was touched, nothing is known.
        Raises :class:`SaveFailed` (``EBUSY``: another checkpoint that is not settled has one of the files).
        """
        if self._is_elsewhere():
            raise Cancelled("the engine belongs to the parent process")
        ffi, lib = self._ffi, self._lib
        if len(names) != len(plan.file_sums):
            raise SetupError(f"{len(names)} names for {len(plan.file_sums)} files")
        paths = [ffi.new("char[]", os.fsencode(os.path.join(directory, name) if name else "")) for name in names]
        keep: list[Any] = []
        held = plan._held(known, waited, keep)
        out, error = ffi.new("struct fx_checkpoint **"), ffi.new("struct fx_error *")
        begun = Checkpoint(self, plan, out)
        try:
            if lib.fx_begin(self._pointer, plan._pointer, below, ffi.new("char *[]", paths), held, out, error):
                raise failure(ffi, error)
            self._say_what_is_slow()
        except BaseException:  # Ctrl-C may come when it has begun
            begun.release()
            raise
        return begun

    def _say_what_is_slow(self) -> None:
        found = self._statistics()
        if found.unbatched_devices and not self._said_unbatched:
            self._said_unbatched = True
            log.warning(
                "The CUDA driver refused to make copies in batches: from here on they are made one by one, which is slower for "
                "models of many small tensors. Nothing else changes. FXCKPT_CUDA_BATCH=0 never asks for batches."
            )
        if found.buffered_files and not self._said_buffered:
            self._said_buffered = True
            log.warning(
                "This file system refuses O_DIRECT: checkpoints go through the page cache, which is slower and costs memory "
                "bandwidth. Nothing else changes."
            )

    @property
    def buffered(self) -> bool:
        """Whether some file system refused O_DIRECT, so that files go through the page cache."""
        return bool(self._statistics().buffered_files)

    def pending(self) -> bool:
        """Whether any emitted piece of any checkpoint is not copied yet. One atomic read."""
        return bool(self._pending[0]) and not self._is_elsewhere()

    def fence(self, layer: int, timeout: float, streams: Streams | None = None) -> bool:
        """Waits until the layer's memory (-1: all layers') may change; False after ``timeout`` seconds.

        The caller copies pieces no writer has taken into staging while there is room, else it waits. For memory on
        devices that ``streams`` names it waits only until the copies were issued; what is put into those streams
        afterwards runs after the copies.
        """
        if self._pending[0] == 0 or self._is_elsewhere():
            return True
        array, count = stream_array(self._ffi, streams)
        return in_slices(lambda ns: self._lib.fx_fence_for(self._pointer, layer, ns, array, count), timeout) == 1

    def open_device(self, ordinal: int, driver: str | None = None) -> None:
        """Makes ready to copy from CUDA device ``ordinal``; once it is, does nothing. ``driver``: another library than
        ``libcuda.so.1``. With the first device all staging is pinned memory, allocated now.

        Raises :class:`SetupError` with the driver's own name and text for what went wrong.
        """
        if ordinal in self._devices:
            return
        ffi, lib, error = self._ffi, self._lib, self._ffi.new("struct fx_error *")
        path = ffi.NULL if driver is None else ffi.new("char[]", os.fsencode(driver))
        if lib.fx_cuda_open(self._pointer, path, error) or lib.fx_cuda_device(self._pointer, ordinal, error):
            operation, what = ffi.string(error.operation).decode(), os.fsdecode(ffi.string(error.path))
            why = f"{operation}: {what or os.strerror(error.err)}. Set FXCKPT_DISABLE=1 to run without checkpoints."
            raise SetupError(f"CUDA device {ordinal} cannot be checkpointed: {why}")
        self._devices.add(ordinal)

    def fetch(self, address: int, nbytes: int, device: int, stream: int) -> Fetch:
        """Starts to copy memory of an open CUDA device to the host, in order on its ``stream``: what is there after the work
        that is in it now. Raises nothing; what the driver refused is raised where the value is read."""
        return Fetch(self._pointer, address, nbytes, (device, stream))

    def _statistics(self) -> Any:
        found = self._ffi.new("struct fx_statistics *")
        if not self._is_elsewhere():
            self._lib.fx_engine_statistics(self._pointer, found)
        return found

    def trace(self, capacity: int) -> None:
        """Starts to record spans of time, at most ``capacity`` until they are taken; 0 stops."""
        if not self._is_elsewhere() and self._lib.fx_trace(self._pointer, capacity):
            raise MemoryError(f"{capacity} spans")

    def take_spans(self) -> tuple[list[tuple[int, ...]], int]:
        """What was recorded since the last call: (kind, track, checkpoint, layer, chunk, bytes, begin, end) each, in the
        order of their ends, times in nanoseconds of the monotonic clock; and how many found no room."""
        spans, dropped = self._ffi.new("struct fx_span[]", 4096), self._ffi.new("uint64_t *")
        out: list[tuple[int, ...]] = []
        while count := self._lib.fx_trace_take(self._pointer, spans, len(spans), dropped):
            out += [(s.kind, s.track, s.checkpoint, s.layer, s.chunk, s.nbytes, s.begin_ns, s.end_ns) for s in spans[0:count]]
        return out, dropped[0]

    def statistics(self) -> EngineStatistics:
        """All counters, since the engine was made; zeros in a forked child."""
        found = self._statistics()
        return EngineStatistics(
            bytes_written=found.bytes_written,
            staging_bytes=found.staging_bytes,
            staging_peak_bytes=found.staging_peak_bytes,
            copy_seconds=found.copy_ns * 1e-9,
            write_seconds=found.write_ns * 1e-9,
            stall_seconds=found.stall_ns * 1e-9,
        )

    def close(self, timeout: float = 60.0) -> None:
        """Cancels what is in flight and ends the threads. Idempotent; does nothing in a forked child. A thread that is stuck in
        the disk for longer than ``timeout`` is left behind, and logged."""
        if self._is_elsewhere():
            return
        if not in_slices(lambda ns: self._lib.fx_engine_close(self._pointer, ns), timeout):
            log.error("A writer thread did not come back from the disk within %.1f s: left behind", timeout)


def _free_engine(lib: Lib, out: Any, pid: int) -> None:
    """Ends an engine that is garbage, or alive at exit: its threads must not read tensors being freed."""
    if not out[0] or os.getpid() != pid:
        return
    lib.fx_engine_close(out[0], int(EXIT_PATIENCE * 1e9))
    lib.fx_engine_free(out[0])
