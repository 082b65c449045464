"""The extension, loaded once; and its calls: waits in slices, failures as exceptions, streams as C arrays."""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fxckpt.errors import EngineMissing, SaveFailed

ABI = 9  # FX_ABI of the csrc/engine.h that this code was written for
BUILD = (
    "Build it with `pip install -e .` (or `python setup.py build_ext --inplace`) in the source tree; "
    "it needs a C11 compiler and the Python headers (Debian: apt install gcc python3-dev)."
)


SLICE = 0.1  # seconds that any wait of the package lasts at a time, so that Ctrl-C is served
PAUSE = 10 * SLICE  # seconds between two looks that are more than a busy machine makes of a slice
LONGEST = 1e9  # seconds; what an infinite timeout becomes

Streams = Mapping[int, int]
"""The stream that each CUDA device trains on: device number -> the driver's handle (0: the legacy default stream)."""

FFI: TypeAlias = Any
Lib: TypeAlias = Any
"""What cffi makes: the functions that ``cdef.h`` declares, and C values, have no type here."""


@functools.cache
def load() -> tuple[FFI, Lib]:
    """``(ffi, lib)`` of the extension. Raises :class:`EngineMissing` if absent or of another version."""
    try:
        engine = importlib.import_module("fxckpt.engine._engine")
    except ImportError as error:
        raise EngineMissing(f"The C engine of fxckpt cannot be loaded: {error}. {BUILD}") from error
    found = getattr(engine.lib, "FX_ABI", None)
    if found != ABI:
        raise EngineMissing(f"The C engine of fxckpt is stale: interface {found}, needed is {ABI}. {BUILD}")
    return engine.ffi, engine.lib


class Patience:
    """Seconds to wait, of the time in which this process runs. One that was stopped (SIGSTOP, a machine that pauses) has not
    waited: between two looks it counts a slice for it, as a wait goes from look to look in slices."""

    def __init__(self, seconds: float):
        self._seconds = self._left = min(seconds, LONGEST)
        self._last = time.monotonic()

    def left(self) -> float:
        """What is left of them; not below 0."""
        now = time.monotonic()
        gap, self._last = now - self._last, now
        self._left -= gap if gap <= PAUSE else SLICE
        return max(self._left, 0.0)

    def restart(self) -> None:
        """All of them from now."""
        self._left, self._last = self._seconds, time.monotonic()

    def until(self, attempt: Callable[[float], bool]) -> bool:
        """Call ``attempt(seconds)``, which waits so long at most, until it says yes; False once time is over."""
        while True:
            left = self.left()
            if attempt(min(left, SLICE)):
                return True
            if not left:
                return False


def in_slices(call: Callable[[int], int], timeout: float) -> int:
    """Repeats a wait of the engine, ``call(nanoseconds)``, until it answers other than 0 or time is over."""
    if timeout <= SLICE:
        return call(int(timeout * 1e9))
    patience = Patience(timeout)
    while True:
        left = patience.left()
        answer = call(int(min(left, SLICE) * 1e9))
        if answer or left <= SLICE:
            return answer


def failure(ffi: FFI, error: Any) -> SaveFailed:
    """The exception for a filled-in ``struct fx_error``."""
    operation, path = ffi.string(error.operation).decode(), os.fsdecode(ffi.string(error.path))
    return SaveFailed(operation, path, error.offset if error.offset >= 0 else None, error.err)


def stream_array(ffi: FFI, streams: Streams | None) -> tuple[Any, int]:
    """The C array of streams, and their number."""
    if not streams:
        return ffi.NULL, 0
    return ffi.new("struct fx_stream[]", list(streams.items())), len(streams)
