"""What a checkpoint is made of: where tensors lie in its files (Plan), and where in memory (Sources)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fxckpt.engine._lib import FFI, load
from fxckpt.errors import SetupError

Item = tuple[int, "tuple[int, ...] | None", "tuple[int, ...] | None"]
"""A tensor in memory: address, sizes, strides in bytes; None, None: contiguous."""

FileId = tuple[int, int, int, int, int]
"""What a file was: device, inode, bytes, and the nanoseconds of its last write and change."""

Placed = tuple[int, int, int, int, int]
"""A tensor in the files: layer, file, absolute offset, nbytes, itemsize."""


def fill_view(ffi: FFI, view: Any, item: Item, keep: list[Any]) -> None:
    """Fills in a ``struct fx_view``; the arrays it points to are appended to ``keep``."""
    address, sizes, strides = item
    view.address = ffi.cast("char *", address)
    view.ndim = -1
    if sizes is None:
        return
    if strides is None or len(sizes) != len(strides) or len(sizes) > 64:
        raise SetupError(f"sizes {sizes} and strides {strides} must have the same length, at most 64")
    view.ndim = len(sizes)
    view.sizes, view.strides = arrays = ffi.new("int64_t[]", list(sizes)), ffi.new("int64_t[]", list(strides))
    keep.extend(arrays)


class Sources:
    """Where one layer's tensors lie: ``(address, sizes, strides in bytes)`` each; None, None: contiguous.

    Addresses are fixed when it is built; the caller keeps the tensors alive. ``devices``: for each tensor the number
    of the CUDA device it lies on, or None for host memory; tensors on devices must be contiguous.
    """

    def __init__(self, items: Sequence[Item], devices: Sequence[int | None] | None = None):
        ffi, lib = load()
        keep: list[Any] = []
        views = ffi.new("struct fx_view[]", max(len(items), 1))
        for view, item in zip(views, items):
            fill_view(ffi, view, item, keep)
        for view, device in zip(views, devices or ()):
            view.device = 0 if device is None else device + 1
        self.devices: frozenset[int] = frozenset(device for device in devices or () if device is not None)
        pointer = lib.fx_sources_new(views, len(items))
        if pointer == ffi.NULL:
            raise MemoryError("sources")
        self._pointer = ffi.gc(pointer, lib.fx_sources_free)


class Plan:
    """Immutable geometry of a checkpoint's files; made by :meth:`Engine.plan`, shared by many checkpoints.

    ``file_sums``: the checksums of each file, in the plan's numbering, each of ``sum_bytes``; ``file_chunks``: its chunks.
    """

    def __init__(
        self, chunk_bytes: int, sum_bytes: int, files: Sequence[tuple[int, bytes]], tensors: Sequence[Placed], layers: int
    ):
        ffi, lib = load()
        headers = [ffi.from_buffer(header) for _, header in files]
        sizes = [(nbytes, header, len(header)) for (nbytes, _), header in zip(files, headers)]
        c_files = ffi.new("struct fx_file[]", sizes or 1)
        c_tensors = ffi.new("struct fx_tensor[]", [tuple(tensor) for tensor in tensors] or 1)
        out, error = ffi.new("struct fx_plan **"), ffi.new("struct fx_error *")
        if lib.fx_plan_new(c_files, len(files), c_tensors, len(tensors), layers, chunk_bytes, sum_bytes, out, error):
            at = f" (number {error.offset})" if error.offset >= 0 else ""
            raise SetupError(ffi.string(error.operation).decode() + at)
        self._pointer = ffi.gc(out[0], lib.fx_plan_free)
        self.chunk_bytes: int = chunk_bytes
        self.sum_bytes: int = sum_bytes
        self.file_sums: list[range] = []
        first, count = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        for file in range(len(files)):
            lib.fx_plan_file_sums(self._pointer, file, first, count)
            self.file_sums.append(range(first[0], first[0] + count[0]))
        ends = list(itertools.accumulate((-(-nbytes // chunk_bytes) for nbytes, _ in files), initial=0))
        self.file_chunks: list[range] = list(itertools.starmap(range, itertools.pairwise(ends)))

    def _held(self, known: Sequence[Mapping[int, int]] | None, waited: Sequence[FileId | None] | None, keep: list[Any]) -> Any:
        """The C struct of :meth:`Engine.begin`'s ``known`` and ``waited``; the arrays that it points to go to ``keep``."""
        ffi, _ = load()
        count = self.file_chunks[-1].stop + 1 if self.file_chunks else 1
        has, crcs = ffi.new("uint8_t[]", count), ffi.new("uint32_t[]", count)
        for chunks, table in zip(self.file_chunks, known or ()):
            for index, digest in table.items():
                has[chunks[index]], crcs[chunks[index]] = 1, digest
        files = ffi.NULL if waited is None else ffi.new("struct fx_file_id[]", [each or (0, 0, 0, 0, 0) for each in waited] or 1)
        keep += (has, crcs, files)
        return ffi.new("struct fx_held *", (has, crcs, files))
