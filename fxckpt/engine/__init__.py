"""The C engine as Python sees it. Importing this package loads nothing: the extension is loaded at first use.

engine.py     Engine, Plan, Sources, Checkpoint: copy tensors out of live memory and write them
reading.py    read_verified: read them back, checked
checksum.py   crc32c
io.py         the table of file operations, and the test instruments in it
_lib.py       finds the extension, or says how to build it
cdef.h        what is declared to cffi; csrc/engine.h is the manual
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxckpt.engine import io
    from fxckpt.engine.checksum import crc32c, crc32c_portable
    from fxckpt.engine.engine import Checkpoint, Engine, Plan, Sources
    from fxckpt.engine.reading import read_verified

_HOME = {
    "Engine": "engine",
    "Plan": "engine",
    "Sources": "engine",
    "Checkpoint": "engine",
    "read_verified": "reading",
    "crc32c": "checksum",
    "crc32c_portable": "checksum",
}

__all__ = ["Checkpoint", "Engine", "Plan", "Sources", "crc32c", "crc32c_portable", "io", "read_verified"]


def __getattr__(name: str) -> Any:
    if name == "io":
        return importlib.import_module("fxckpt.engine.io")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fxckpt.engine.{_HOME[name]}"), name)
