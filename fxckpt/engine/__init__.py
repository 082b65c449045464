"""The C engine as Python sees it. Importing this package loads nothing: the extension is loaded at first use.

engine.py      Engine: threads and buffers; begins checkpoints, fences layers
plan.py        Plan, Sources: where tensors lie in files, and in memory
checkpoint.py  Checkpoint: one pass over a plan; copies tensors out of live memory and writes them
fetch.py       Fetch: one value of a CUDA device on its way to the host
reading.py     read_verified: reads them back, checked
ring.py        the memory that a trainer shares with its monitor
checksum.py    crc32c
io.py          the table of file operations
_calls.py      waits in slices, failures as exceptions
_lib.py        finds the extension, or says how to build it
cdef.h         what is declared to cffi; csrc/engine.h is the manual
build.py       how the extension is built
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxckpt.engine import io
    from fxckpt.engine._calls import SLICE
    from fxckpt.engine.checkpoint import Checkpoint
    from fxckpt.engine.checksum import crc32c
    from fxckpt.engine.engine import Engine, EngineStatistics
    from fxckpt.engine.fetch import Fetch
    from fxckpt.engine.plan import Plan, Sources
    from fxckpt.engine.reading import read_verified

_HOME = {
    "SLICE": "_calls",
    "Engine": "engine",
    "EngineStatistics": "engine",
    "Plan": "plan",
    "Sources": "plan",
    "Checkpoint": "checkpoint",
    "Fetch": "fetch",
    "read_verified": "reading",
    "crc32c": "checksum",
}

__all__ = ["SLICE", "Checkpoint", "Engine", "EngineStatistics", "Fetch", "Plan", "Sources", "crc32c", "io", "read_verified"]


def __getattr__(name: str) -> object:
    if name == "io":
        return importlib.import_module("fxckpt.engine.io")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fxckpt.engine.{_HOME[name]}"), name)
