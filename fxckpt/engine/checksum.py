"""CRC-32C of anything with a buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxckpt.engine._lib import load

if TYPE_CHECKING:
    from typing_extensions import Buffer


def crc32c(buffer: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of a contiguous buffer, continuing from ``crc``; in hardware where possible."""
    ffi, lib = load()
    data = ffi.from_buffer(buffer)
    return int(lib.fx_crc32c(crc, data, len(data)))


def implementation() -> str:
    """Which one :func:`crc32c` uses here: ``"sse4.2"``, ``"armv8-crc"`` or ``"portable"``."""
    ffi, lib = load()
    return str(ffi.string(lib.fx_crc32c_name()), "ascii")
