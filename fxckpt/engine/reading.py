"""Checksums, and verified reading: no byte reaches a target before its chunk's checksum was right."""

from __future__ import annotations

import errno
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fxckpt.engine import io
from fxckpt.engine._lib import FFI, load
from fxckpt.engine.plan import fill_view
from fxckpt.engine.sums import table
from fxckpt.errors import Corrupt, SetupError

if TYPE_CHECKING:
    from typing_extensions import Buffer

SLICE_BYTES = 256 << 20  # read in C at a time, so that Ctrl-C is served

Target = tuple[int, int, int, "tuple[int, ...] | None", "tuple[int, ...] | None"]


READING_THREADS = 2
"""Each with a buffer of a chunk, of 64 MiB at most: a record may say that chunks are larger."""


def crc32c(buffer: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of a contiguous buffer, continuing from ``crc``; in hardware where possible."""
    ffi, lib = load()
    data = ffi.from_buffer(buffer)
    return int(lib.fx_crc32c(crc, data, len(data)))


def crc32c_joined(first: int, second: int, nbytes: int) -> int:
    """The CRC-32C of some bytes followed by others, of the CRC of either; ``nbytes``: how many the others are."""
    return _multiplied(_moved(nbytes), first) ^ second


@functools.lru_cache(64)
def _moved(nbytes: int) -> int:
    """What a CRC is multiplied with when so many zeros follow: x to the power of their bits."""
    power, square, bits = 1 << 31, 1 << 30, 8 * nbytes
    while bits:
        if bits & 1:
            power = _multiplied(power, square)
        square = _multiplied(square, square)
        bits >>= 1
    return power


def _multiplied(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32C, all of them with their lowest powers in the highest bits."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0x82F63B78 if b & 1 else 0)
    return product


def crc32c_implementation() -> str:
    """Which one :func:`crc32c` uses here: ``"sse4.2"``, ``"armv8-crc"`` or ``"portable"``."""
    ffi, lib = load()
    return str(ffi.string(lib.fx_crc32c_name()), "ascii")


def read_verified(
    path: str | os.PathLike[str],
    *,
    nbytes: int,
    chunk_bytes: int,
    crcs: Sequence[int],
    targets: Sequence[Target],
    threads: int = READING_THREADS,
    held: int | None = None,
    only: Sequence[range] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Reads a file chunk by chunk, checks each chunk's CRC-32C, and only then copies it into the targets.

    ``targets``: (absolute offset, nbytes, address, sizes, strides in bytes); None for the last two: dense.
    ``held``: a descriptor of the file; it is read wherever its name leads by now. ``progress`` is told of bytes read.
    ``only``: ranges of chunks. No targets: verify only. When it raises, targets in other chunks may have been filled already.
    Raises :class:`Corrupt` for a bad chunk, a wrong size or a missing file; ``OSError`` if reading fails.
    """
    ffi, lib = load()
    path = os.fspath(path)
    chunks = -(-nbytes // chunk_bytes)
    if len(crcs) != chunks:
        raise Corrupt(path, f"{nbytes} bytes make {chunks} chunks, the record has {len(crcs)} checksums")
    fd = _open(path if held is None else f"/proc/self/fd/{held}", follow=held is not None)
    try:
        size = os.fstat(fd).st_size
        if size != nbytes:
            raise Corrupt(path, f"the file has {size} bytes, the record says {nbytes}", offset=min(size, nbytes))
        keep: list[Any] = []
        wanted = [target for target in targets if target[1]]
        array = ffi.new("struct fx_target[]", max(len(wanted), 1))
        _fill_targets(ffi, array, wanted, nbytes, keep)
        sums, error = ffi.from_buffer("uint32_t[]", table(crcs)), ffi.new("struct fx_error *")
        chunk_bytes = min(chunk_bytes, max(1, -(-nbytes // lib.FX_BLOCK)) * lib.FX_BLOCK)  # more than the file has is not needed
        file, into = (fd, os.fsencode(path), nbytes, chunk_bytes, sums), (array, len(wanted), threads, error)
        at_once = max(SLICE_BYTES // chunk_bytes, 1)
        for ranges in _slices([range(chunks)] if only is None else only, at_once):
            c_ranges = ffi.new("struct fx_range[]", [(each.start, len(each)) for each in ranges])
            result = lib.fx_read_verified(*file, c_ranges, len(ranges), *into)
            if result:
                raise _failure(path, result, error, chunk_bytes)
            if progress is not None:
                progress(sum(min(each.stop * chunk_bytes, nbytes) - each.start * chunk_bytes for each in ranges))
    finally:
        io.close(fd)


def _slices(ranges: Sequence[range], most: int) -> Iterator[list[range]]:
    """The same chunks, so many at a time."""
    taken, room = list[range](), most
    for each in ranges:
        while each:
            taken.append(each[:room])
            room, each = room - len(taken[-1]), each[room:]
            if not room:
                yield taken
                taken, room = [], most
    if taken:
        yield taken


def _open(path: str, follow: bool) -> int:
    """O_DIRECT where it is accepted, so that verifying does not push others out of the page cache."""
    flags = os.O_RDONLY if follow else os.O_RDONLY | os.O_NOFOLLOW
    try:
        return io.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise Corrupt(path, "the file is missing") from error
        if error.errno != errno.EINVAL:
            raise
    return io.open(path, flags)


def _fill_targets(ffi: FFI, array: Any, targets: Sequence[Target], nbytes: int, keep: list[Any]) -> None:
    """Fills in a ``struct fx_target`` each; arrays they point to are appended to ``keep``."""
    for target, (offset, length, address, sizes, strides) in zip(array, targets):
        items = 1 if sizes is None else math.prod(sizes)
        if offset < 0 or offset + length > nbytes or items < 1 or length % items:
            raise SetupError(f"target of {length} bytes at {offset}, sizes {sizes}: no fit in {nbytes} bytes")
        target.offset, target.nbytes, target.itemsize = offset, length, length // items
        fill_view(ffi, target.view, (address, sizes, strides), keep)


def _failure(path: str, result: int, error: Any, chunk_bytes: int) -> Exception:
    _, lib = load()
    if result == lib.FX_MISMATCH:
        sums = f"CRC-32C {error.found:08x}, the record says {error.expected:08x}"
        return Corrupt(path, f"chunk {error.offset // chunk_bytes} has {sums}", offset=error.offset)
    if result == lib.FX_TRUNCATED:
        return Corrupt(path, "the file ends early", offset=error.offset)
    return io.os_error("pread", -result, path, error.offset)
