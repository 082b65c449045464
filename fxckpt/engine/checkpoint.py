"""One pass over a plan, from its beginning to durable files: Checkpoint."""

from __future__ import annotations

import errno
import os
import weakref
from array import array
from collections.abc import Callable
from typing import Any

from fxckpt.engine._lib import Lib, Streams, failure, in_slices, load, stream_array
from fxckpt.engine.plan import Plan, Sources
from fxckpt.engine.sums import Sums
from fxckpt.errors import Cancelled, SetupError


class Checkpoint:
    """One pass over a plan: emit each layer once, then wait. Made by :meth:`Engine.begin`."""

    def __init__(self, engine: object, plan: Plan, out: Any):
        self._engine, self._plan, self._out = engine, plan, out  # the engine: so that it lives as long
        self._ffi, self._lib = load()
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _release_checkpoint, self._lib, out, self._pid)

    @property
    def _pointer(self) -> Any:
        """What ``fx_begin`` gave; null before it did."""
        return self._out[0]

    def _is_elsewhere(self) -> bool:
        return os.getpid() != self._pid

    def _check(self) -> None:
        if self._is_elsewhere():
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
            result = self._lib.fx_emit_from(self._pointer, layer, sources._pointer, *stream_array(self._ffi, streams))
        else:
            result = self._lib.fx_emit(self._pointer, layer, sources._pointer)
        if result:
            raise SetupError(
                f"emit of layer {layer}: {os.strerror(-result)}; each layer is emitted once, with the tensors (number and "
                "sizes) that the plan has for it, contiguous and with a stream where they lie on a device"
            )

    @property
    def id(self) -> int:
        """A number of its own in the engine; spans of a trace have it."""
        return int(self._lib.fx_id(self._pointer))

    def emitted(self) -> int:
        """Layers emitted so far; a complete checkpoint has all of its plan's."""
        self._check()
        return int(self._lib.fx_emitted(self._pointer))

    def _wait(self, function: Callable[[Any, int, Any], int], timeout: float) -> bool:
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
        """Waits until every layer is emitted and copied; False after ``timeout`` seconds. Raises :class:`SaveFailed` if the
        checkpoint failed, :class:`Cancelled` if it was given up."""
        return self._wait(self._lib.fx_copied, timeout)

    def durable(self, timeout: float) -> bool:
        """Waits until every chunk is written and every file synced; False and errors as :meth:`copied`."""
        return self._wait(self._lib.fx_durable, timeout)

    def settled(self, timeout: float) -> bool:
        """Waits until it is over and no thread will touch its files again; False after ``timeout`` seconds. Only then may others
        write to them: after a failure or a cancel, a write that hangs in the disk may still land."""
        if self._is_elsewhere() or not self._finalizer.alive:
            return True
        return in_slices(lambda ns: self._lib.fx_settled(self._pointer, ns), timeout) == 1

    def crcs(self, file: int) -> Sums:
        """CRC-32C of each ``sum_bytes`` of a file; valid once durable."""
        self._check()
        sums = self._plan.file_sums[file]
        return array("I", bytes(self._ffi.buffer(self._lib.fx_crcs(self._pointer) + sums.start, 4 * len(sums))))

    def inodes(self) -> list[int]:
        """Of the files that it opened, in the plan's order; 0 where another process does."""
        self._check()
        return [int(self._lib.fx_file_inode(self._pointer, file)) for file in range(len(self._plan.file_sums))]

    def cancel(self) -> None:
        """Gives it up. Returns when no thread reads the emitted memory any more; never waits for the disk."""
        if self._finalizer.alive and not self._is_elsewhere():
            self._lib.fx_cancel(self._pointer)

    def release(self) -> None:
        """Frees it, after a cancel if it is not over."""
        self._finalizer()


def _release_checkpoint(lib: Lib, out: Any, pid: int) -> None:
    if out[0] and os.getpid() == pid:
        lib.fx_checkpoint_release(out[0])
