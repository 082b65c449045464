"""CRC-32C of anything with a buffer."""

from __future__ import annotations

from typing import Any

from fxckpt.engine._lib import load


def crc32c(buffer: Any, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of a contiguous buffer, continuing from ``crc``; in hardware where possible."""
    ffi, lib = load()
    data = ffi.from_buffer(buffer)
    return lib.fx_crc32c(crc, data, len(data))


def crc32c_portable(buffer: Any, crc: int = 0) -> int:
    """The same from tables: what runs on a processor without the instruction."""
    ffi, lib = load()
    data = ffi.from_buffer(buffer)
    return lib.fx_crc32c_portable(crc, data, len(data))


def implementation() -> str:
    """Which one :func:`crc32c` uses here: ``"sse4.2"``, ``"armv8-crc"`` or ``"portable"``."""
    ffi, lib = load()
    return ffi.string(lib.fx_crc32c_name()).decode()
