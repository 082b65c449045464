"""A thin object layer over csrc/engine.h: lifetimes, errors as exceptions, waits in slices, and forks.

A forked child has none of the engine's threads. Every method looks at the process id first; in a child, what
would use the engine raises :class:`~fxckpt.errors.Cancelled`, and what only waits or cleans up does nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxckpt.engine._lib import load
from fxckpt.errors import Cancelled, SaveFailed, SetupError

log = logging.getLogger("fxckpt")

SLICE = 0.1  # seconds in C at a time, so that Ctrl-C is served
LONGEST = 1e9  # seconds; what an infinite timeout becomes
EXIT_PATIENCE = 10.0  # seconds that an engine which nobody closed may take to end its threads
COUNTS = ("bytes_written", "staging_bytes", "staging_peak_bytes")
SECONDS = {"copy_seconds": "copy_ns", "write_seconds": "write_ns", "stall_seconds": "stall_ns"}

Item = tuple[int, "tuple[int, ...] | None", "tuple[int, ...] | None"]
Streams = Mapping[int, int]
"""The stream that each CUDA device trains on: device number -> the driver's handle (0: the legacy default stream)."""


def in_slices(call: Callable[[int], int], timeout: float) -> int:
    """Repeats a wait of the engine, ``call(nanoseconds)``, until it answers other than 0 or time is over."""
    deadline = time.monotonic() + min(timeout, LONGEST)
    while True:
        left = max(deadline - time.monotonic(), 0.0)
        answer = call(int(min(left, SLICE) * 1e9))
        if answer or left <= SLICE:
            return answer


def failure(ffi: Any, error: Any) -> SaveFailed:
    """The exception for a filled-in ``struct fx_error``."""
    operation, path = ffi.string(error.operation).decode(), os.fsdecode(ffi.string(error.path))
    return SaveFailed(operation, path, error.offset if error.offset >= 0 else None, error.err)


def make_view(ffi: Any, view: Any, item: Item, keep: list[Any]) -> None:
    """Fills in a ``struct fx_view``; the arrays it points to are appended to ``keep``."""
    address, sizes, strides = item
    view.address = ffi.cast("char *", address)
    view.ndim = -1
    if sizes is None:
        return
    if strides is None or len(sizes) != len(strides) or len(sizes) > 64:
        raise SetupError(f"sizes {sizes} and strides {strides} must have the same length, at most 64")
    view.ndim = len(sizes)
    view.sizes, view.strides = arrays = ffi.new("int64_t[]", list(sizes)), ffi.new("int64_t[]", list(strides))
    keep.extend(arrays)


class Sources:
    """Where one layer's tensors lie: ``(address, sizes, strides in bytes)`` each; None, None: contiguous.

    Addresses are fixed when it is built; the caller keeps the tensors alive. ``devices``: for each tensor the number
    of the CUDA device it lies on, or None for host memory; tensors on devices must be contiguous.
    """

    def __init__(self, items: Sequence[Item], devices: Sequence[int | None] | None = None):
        ffi, lib = load()
        keep: list[Any] = []
        views = ffi.new("struct fx_view[]", max(len(items), 1))
        for view, item in zip(views, items):
            make_view(ffi, view, item, keep)
        for view, device in zip(views, devices or ()):
            view.device = 0 if device is None else device + 1
        self.devices = frozenset(device for device in devices or () if device is not None)
        pointer = lib.fx_sources_new(views, len(items))
        if pointer == ffi.NULL:
            raise MemoryError("sources")
        self._pointer = ffi.gc(pointer, lib.fx_sources_free)


class Plan:
    """Immutable geometry of a checkpoint's files; made by :meth:`Engine.plan`, shared by many checkpoints."""

    def __init__(self, pointer: Any, lib: Any, ffi: Any, files: int, layers: int):
        self._pointer, self.layers = pointer, layers
        self.chunks = lib.fx_plan_chunks(pointer)
        first, count = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        ranges = []
        for index in range(files):
            lib.fx_plan_file_chunks(pointer, index, first, count)
            ranges.append(range(first[0], first[0] + count[0]))
        self.file_chunks: tuple[range, ...] = tuple(ranges)  # of each file, in the plan's numbering


class Engine:
    """Writer threads and their buffers. ``memory_bytes`` bounds what they allocate: threads times chunk, plus
    staging.

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
            raise SetupError(
                f"threads={threads} must be 1 to 256, chunk_bytes={chunk_bytes} a multiple of {lib.FX_BLOCK} up to 1 GiB"
            )
        if staging_bytes < 0:
            raise SetupError(f"staging_bytes={staging_bytes} must not be negative")
        self._ffi, self._lib, self._pid = ffi, lib, os.getpid()
        self.chunk_bytes, self.staging_bytes = chunk_bytes, staging_bytes
        self.memory_bytes = threads * chunk_bytes + staging_bytes // chunk_bytes * chunk_bytes
        self._said_buffered = False
        self._devices: set[int] = set()
        options = ffi.new("struct fx_options *", (threads, chunk_bytes, staging_bytes, mock, direct))
        out, error = ffi.new("struct fx_engine **"), ffi.new("struct fx_error *")
        if lib.fx_engine_new(options, out, error):
            raise failure(ffi, error)
        self._pointer = out[0]
        self._pending = lib.fx_engine_pending(self._pointer)
        self._finalizer = weakref.finalize(self, _free_engine, lib, self._pointer, self._pid)

    def _is_elsewhere(self) -> bool:
        return os.getpid() != self._pid

    def plan(self, files: Sequence[tuple[int, bytes]], tensors: Sequence[tuple[int, int, int, int, int]], layers: int) -> Plan:
        """Geometry of a checkpoint's files.

        ``files``: (bytes, a multiple of 4096; header that lies at offset 0). ``tensors``: (layer, file,
        absolute offset, nbytes, itemsize), those of a layer in the order in which its :class:`Sources` has
        them. Bytes that nothing covers are written as zeros. Raises :class:`SetupError` for what overlaps or
        does not fit.
        """
        ffi, lib = self._ffi, self._lib
        headers = [ffi.from_buffer(header) for _, header in files]
        sizes = [(nbytes, header, len(header)) for (nbytes, _), header in zip(files, headers)]
        c_files = ffi.new("struct fx_file[]", sizes or 1)
        c_tensors = ffi.new("struct fx_tensor[]", [tuple(tensor) for tensor in tensors] or 1)
        out, error = ffi.new("struct fx_plan **"), ffi.new("struct fx_error *")
        counts = len(files), c_tensors, len(tensors), layers
        if lib.fx_plan_new(c_files, *counts, self.chunk_bytes, out, error):
            at = f" (number {error.offset})" if error.offset >= 0 else ""
            raise SetupError(ffi.string(error.operation).decode() + at)
        return Plan(ffi.gc(out[0], lib.fx_plan_free), lib, ffi, len(files), layers)

    def begin(
        self, plan: Plan, directory: str | os.PathLike, names: Sequence[str], known: Sequence[Mapping[int, int]] | None = None
    ) -> Checkpoint:
        """Opens or creates the plan's files under ``directory`` and starts a checkpoint into them.

        ``known[file]`` maps chunk indices to the CRC of what the disk holds there already: an equal chunk is
        not written again. A CRC has 32 bits, so give only chunks that are expected not to have changed.
        Raises :class:`SaveFailed` (``EBUSY``: another checkpoint that is not settled has one of the files).
        """
        if self._is_elsewhere():
            raise Cancelled("the engine belongs to the parent process")
        ffi, lib = self._ffi, self._lib
        if len(names) != len(plan.file_chunks):
            raise SetupError(f"{len(names)} names for {len(plan.file_chunks)} files")
        paths = [ffi.new("char[]", os.fsencode(os.path.join(directory, name))) for name in names]
        has, crcs = self._known(plan, known)
        out, error = ffi.new("struct fx_checkpoint **"), ffi.new("struct fx_error *")
        if lib.fx_begin(self._pointer, plan._pointer, ffi.new("char *[]", paths), has, crcs, out, error):
            raise failure(ffi, error)
        self._say_buffered()
        return Checkpoint(self, plan, out[0])

    def _known(self, plan: Plan, known: Sequence[Mapping[int, int]] | None) -> tuple[Any, Any]:
        if not known or not any(known):
            return self._ffi.NULL, self._ffi.NULL
        has, crcs = self._ffi.new("uint8_t[]", plan.chunks), self._ffi.new("uint32_t[]", plan.chunks)
        for chunks, table in zip(plan.file_chunks, known):
            for index, crc in table.items():
                has[chunks[index]], crcs[chunks[index]] = 1, crc
        return has, crcs

    def _say_buffered(self) -> None:
        if not self._said_buffered and self._statistics().buffered_files:
            self._said_buffered = True
            log.warning(
                "This file system refuses O_DIRECT: checkpoints go through the page cache, which is "
                "slower and costs memory bandwidth. Nothing else changes."
            )

    @property
    def buffered(self) -> bool:
        """Whether some file system refused O_DIRECT, so that files go through the page cache."""
        return not self._is_elsewhere() and self._statistics().buffered_files > 0

    def pending(self) -> bool:
        """Whether any emitted piece of any checkpoint is not copied yet. One atomic read."""
        return self._pending[0] != 0 and not self._is_elsewhere()

    def fence(self, layer: int, timeout: float, streams: Streams | None = None) -> bool:
        """Waits until the layer's memory (-1: all layers') may change; False after ``timeout`` seconds.

        The caller copies pieces no writer has taken into staging while there is room, else it waits. For memory on
        devices that ``streams`` names it waits only until the copies were issued; what is put into those streams
        afterwards runs after the copies.
        """
        if self._pending[0] == 0 or self._is_elsewhere():
            return True
        array, count = self._streams(streams)
        return in_slices(lambda ns: self._lib.fx_fence_for(self._pointer, layer, ns, array, count), timeout) == 1

    def _streams(self, streams: Streams | None) -> tuple[Any, int]:
        """The C array of streams, and their number."""
        if not streams:
            return self._ffi.NULL, 0
        return self._ffi.new("struct fx_stream[]", list(streams.items())), len(streams)

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
            raise SetupError(
                f"CUDA device {ordinal} cannot be checkpointed: {operation}: {what or os.strerror(error.err)}. "
                "Set FXCKPT_DISABLE=1 to run without checkpoints."
            )
        self._devices.add(ordinal)

    def _statistics(self) -> Any:
        found = self._ffi.new("struct fx_statistics *")
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

    def statistics(self) -> dict[str, float]:
        """bytes_written, staging_bytes, staging_peak_bytes, copy_seconds, write_seconds, stall_seconds.

        Stall is the time that callers of :meth:`fence` waited or helped; copying includes that help.
        """
        found = self._ffi.new("struct fx_statistics *") if self._is_elsewhere() else self._statistics()
        counts = {name: getattr(found, name) for name in COUNTS}
        return counts | {name: getattr(found, field) * 1e-9 for name, field in SECONDS.items()}

    def close(self, timeout: float = 60.0) -> None:
        """Cancels what is in flight and ends the threads. Idempotent; does nothing in a forked child.

        A thread that is stuck in the disk for longer than ``timeout`` is left behind, and logged.
        """
        if self._is_elsewhere():
            return
        if not in_slices(lambda ns: self._lib.fx_engine_close(self._pointer, ns), timeout):
            log.error("A writer thread did not come back from the disk within %.1f s: left behind", timeout)


def _free_engine(lib: Any, pointer: Any, pid: int) -> None:
    """Ends an engine that is garbage, or alive at exit: its threads must not read tensors being freed."""
    if os.getpid() != pid:
        return
    lib.fx_engine_close(pointer, int(EXIT_PATIENCE * 1e9))
    lib.fx_engine_free(pointer)


class Checkpoint:
    """One pass over a plan: emit each layer once, then wait. Made by :meth:`Engine.begin`."""

    def __init__(self, engine: Engine, plan: Plan, pointer: Any):
        self._engine, self._plan, self._pointer = engine, plan, pointer
        self._lib, self._ffi = engine._lib, engine._ffi
        self._finalizer = weakref.finalize(self, _release_checkpoint, self._lib, pointer, engine._pid)

    def _check(self) -> None:
        if self._engine._is_elsewhere():
            raise Cancelled("the checkpoint belongs to the parent process")
        if not self._finalizer.alive:
            raise Cancelled("the checkpoint was released")

    def emit(self, layer: int, sources: Sources, streams: Streams | None = None) -> None:
        """Hands a layer over. Its memory must stay valid and unchanged until a fence on it returned True.

        For memory on devices ``streams`` has each device's stream: copied is what is there after the work that is in
        it now. Raises :class:`SetupError` if the sources do not fit the plan or the layer was emitted before.
        """
        self._check()
        if sources.devices:
            result = self._lib.fx_emit_from(self._pointer, layer, sources._pointer, *self._engine._streams(streams))
        else:
            result = self._lib.fx_emit(self._pointer, layer, sources._pointer)
        if result:
            raise SetupError(
                f"emit of layer {layer}: {os.strerror(-result)}; each layer is emitted once, "
                "with the tensors (number and sizes) that the plan has for it, contiguous and with a stream "
                "where they lie on a device"
            )

    @property
    def id(self) -> int:
        """A number of its own in the engine; spans of a trace have it."""
        return self._lib.fx_id(self._pointer)

    def emitted(self) -> int:
        """Layers emitted so far; a complete checkpoint has all of its plan's."""
        self._check()
        return self._lib.fx_emitted(self._pointer)

    def _wait(self, function: Any, timeout: float) -> bool:
        self._check()
        error = self._ffi.new("struct fx_error *")
        answer = in_slices(lambda ns: function(self._pointer, ns, error), timeout)
        if answer >= 0:
            return answer == 1
        raised = failure(self._ffi, error)
        if answer == -errno.ECANCELED:
            raise Cancelled(f"the checkpoint was given up ({raised.operation})")
        raise raised

    def copied(self, timeout: float) -> bool:
        """Waits until every layer is emitted and copied; False after ``timeout`` seconds.

        Raises :class:`SaveFailed` if the checkpoint failed, :class:`Cancelled` if it was given up.
        """
        return self._wait(self._lib.fx_copied, timeout)

    def durable(self, timeout: float) -> bool:
        """Waits until every chunk is written and every file synced; False and errors as :meth:`copied`."""
        return self._wait(self._lib.fx_durable, timeout)

    def settled(self, timeout: float) -> bool:
        """Waits until it is over and no thread will touch its files again; False after ``timeout`` seconds.

        Only then may others write to them: after a failure or a cancel, a write that hangs in the disk may
        still land.
        """
        if self._engine._is_elsewhere() or not self._finalizer.alive:
            return True
        return in_slices(lambda ns: self._lib.fx_settled(self._pointer, ns), timeout) == 1

    def crcs(self, file: int) -> list[int]:
        """CRC-32C of each chunk of a file; valid once durable."""
        self._check()
        chunks = self._plan.file_chunks[file]
        if not chunks:
            return []
        return self._ffi.unpack(self._lib.fx_crcs(self._pointer) + chunks.start, len(chunks))

    def cancel(self) -> None:
        """Gives it up. Returns when no thread reads the emitted memory any more; never waits for the disk."""
        if self._finalizer.alive and not self._engine._is_elsewhere():
            self._lib.fx_cancel(self._pointer)

    def release(self) -> None:
        """Frees it, after a cancel if it is not over."""
        self._finalizer()


def _release_checkpoint(lib: Any, pointer: Any, pid: int) -> None:
    if os.getpid() == pid:
        lib.fx_checkpoint_release(pointer)
