"""The extension, loaded once; everything that needs it asks here."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol

from fxckpt.errors import EngineMissing

ABI = 7  # FX_ABI of the csrc/engine.h that this code was written for
BUILD = (
    "Build it with `pip install -e .` (or `python setup.py build_ext --inplace`) in the source tree; "
    "it needs a C11 compiler and the Python headers (Debian: apt install gcc python3-dev)."
)


class FFI(Protocol):
    """What is used of cffi's object; what it makes are C values, which have no type here."""

    NULL: Any

    def new(self, cdecl: str, init: Any = ..., /) -> Any: ...
    def cast(self, cdecl: str, source: Any, /) -> Any: ...
    def string(self, cdata: Any, /) -> bytes: ...
    def from_buffer(self, buffer: Any, /) -> Any: ...
    def unpack(self, cdata: Any, length: int, /) -> Any: ...
    def gc(self, cdata: Any, destructor: Any, /) -> Any: ...


class Lib(Protocol):
    """The functions and constants that ``cdef.h`` declares."""

    def __getattr__(self, name: str, /) -> Any: ...


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
