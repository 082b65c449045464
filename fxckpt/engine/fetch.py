"""A value of a CUDA device on its way to the host: Fetch."""

from __future__ import annotations

import os
import weakref
from typing import Any

from fxckpt.engine._lib import Lib, failure, load
from fxckpt.errors import Cancelled, SaveFailed


class Fetch:
    """A copy out of a device that was started, and waits for nothing. Made by :meth:`Engine.fetch`."""

    def __init__(self, engine: Any, address: int, nbytes: int, stream: tuple[int, int]):
        ffi, lib = load()
        out, error = ffi.new("struct fx_fetch **"), ffi.new("struct fx_error *")
        self._pid, self._pointer = os.getpid(), None
        self._refused: SaveFailed | None = None
        if lib.fx_fetch_new(engine, ffi.new("struct fx_stream *", stream), ffi.cast("void *", address), nbytes, out, error):
            self._refused = failure(ffi, error)
            return
        self._pointer = out[0]
        weakref.finalize(self, _free_fetch, lib, self._pointer, self._pid)

    def read_into(self, address: int) -> None:
        """Waits until it has come and copies it to the host's memory there. In any thread, also after the engine was closed.

        Raises :class:`SaveFailed` with what the driver refused.
        """
        if os.getpid() != self._pid:
            raise Cancelled("the engine belongs to the parent process")
        if self._refused is not None:
            raise self._refused
        ffi, lib = load()
        error = ffi.new("struct fx_error *")
        if lib.fx_fetch_wait(self._pointer, ffi.cast("void *", address), error):
            raise failure(ffi, error)


def _free_fetch(lib: Lib, pointer: Any, pid: int) -> None:
    if os.getpid() == pid:
        lib.fx_fetch_free(pointer)
