"""Tables of checksums: four bytes each, made, written and read without an object of Python's for each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from fxckpt.engine._lib import load

if TYPE_CHECKING:
    from typing_extensions import Buffer

Sums: TypeAlias = "array[int]"
"""CRC-32C of one block of a file after the other."""

_DIGITS = 11  # of the largest number, and the comma behind it


def table(sums: Sequence[int]) -> Sums:
    """The same as a table; itself if it is one. Raises ``OverflowError`` for what is no number of 32 bits."""
    return sums if isinstance(sums, array) and sums.typecode == "I" else array("I", sums)


def sums_of_blocks(nbytes: int, block: int) -> Sums:
    """A table for a file of so many bytes, before any of them is known."""
    return array("I", bytes(4 * -(-nbytes // block)))


def continue_sums(sums: Sums, block: int, offset: int, data: Buffer) -> None:
    """Continue the checksums of blocks over contiguous bytes, which lie at ``offset`` of the file. Bytes come in their order."""
    ffi, lib = load()
    piece, into = ffi.from_buffer(data), ffi.from_buffer("uint32_t[]", sums, require_writable=True)
    lib.fx_crc32c_blocks(into, block, offset, piece, len(piece))


def digest_of(sums: Sums, which: range) -> int:
    """One checksum of some of them, as the engine compares those of a chunk."""
    ffi, lib = load()
    some = ffi.from_buffer(memoryview(sums)[which.start : which.stop])
    return int(lib.fx_crc32c(0, some, len(some)))


def to_text(sums: Sums) -> memoryview:
    """Decimal numbers with commas between them."""
    ffi, lib = load()
    out = bytearray(_DIGITS * len(sums) + 1)
    written = lib.fx_sums_text(
        ffi.from_buffer("uint32_t[]", sums), len(sums), ffi.from_buffer("char[]", out, require_writable=True)
    )
    return memoryview(out)[:written]


def from_text(text: Buffer) -> Sums | None:
    """What ``to_text`` made this of; None if it did not make it."""
    ffi, lib = load()
    given = ffi.from_buffer("char[]", text)
    count = int(lib.fx_sums_parse(given, len(given), ffi.NULL))
    if count < 0:
        return None
    out = sums_of_blocks(count, 1)
    lib.fx_sums_parse(given, len(given), ffi.from_buffer("uint32_t[]", out, require_writable=True))
    return out
