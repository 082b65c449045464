"""Where each tensor lies in a safetensors file.

A file is ``u64 header length | JSON header | data``. The header is padded with spaces so that the *whole file* is a whole number
of 4096-byte blocks, which is what O_DIRECT writes; there are no holes and no trailing bytes. Its end is then aligned, its data's
beginning is not. So tensors are ordered by item size, ascending, and by emit order within one size: everything behind a tensor
has items at least as large, hence its distance from the aligned end is a multiple of its item size, and each tensor is aligned.

The format: https://huggingface.co/docs/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxckpt.errors import Corrupt, SetupError
from fxckpt.store.checks import is_counts, is_shape, is_text, parse_json
from fxckpt.store.dtypes import DTYPES, item_size

BLOCK = 4096
"""The size of every file is a multiple of this many bytes."""

SUMS, SUM_BYTES = 1 << 19, (4 << 10, 64 << 10)
"""Of what a process holds so many checksums, and each of so many bytes, at least and at most: see ``sum_bytes``."""

MAX_HEADER = 100_000_000
"""The safetensors reader refuses longer headers, so this one neither writes nor reads them."""

_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be stored: ``key`` in the file, safetensors ``dtype``, ``shape``, and the ``layer`` that owns it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    layer: int

    @property
    def nbytes(self) -> int:
        """Bytes it takes, dense and row-major."""
        return math.prod(self.shape) * item_size(self.dtype)


@dataclass(frozen=True)
class Placed:
    """A tensor with its place: ``begin`` is the absolute offset in the file, in bytes."""

    spec: TensorSpec
    begin: int
    nbytes: int


@dataclass(frozen=True)
class FileLayout:
    """One file: ``header`` are its first bytes, ``tensors`` follow them without a gap in ascending ``begin``."""

    name: str
    header: bytes
    nbytes: int
    tensors: tuple[Placed, ...]


def lay_out(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Place ``specs``, given in emit order. Raises ``SetupError`` for what no safetensors file can hold."""
    keys: set[str] = set()
    for spec in specs:
        if spec.key == _METADATA or spec.key in keys:
            why = "is reserved by safetensors" if spec.key == _METADATA else "is given to two tensors"
            raise SetupError(f"{name}: the key {spec.key!r} {why}; rename one of the modules or states it comes from")
        if spec.dtype not in DTYPES:
            raise SetupError(f"{name}: {spec.key!r} has type {spec.dtype!r}; safetensors has {', '.join(DTYPES)}")
        if not is_counts(list(spec.shape)):
            raise SetupError(f"{name}: {spec.key!r} has shape {spec.shape}; sizes are whole numbers from 0")
        keys.add(spec.key)
    ordered = sorted(specs, key=lambda spec: item_size(spec.dtype))  # stable: emit order within one item size
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    ends = [0]
    for spec in ordered:
        ends.append(ends[-1] + spec.nbytes)
        header[spec.key] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": ends[-2:]}
    raw = _padded(name, header, ends[-1])
    placed = tuple(Placed(spec, len(raw) + begin, spec.nbytes) for spec, begin in zip(ordered, ends))
    return FileLayout(name, raw, len(raw) + ends[-1], placed)


def sum_bytes(held: int) -> int:
    """How many bytes of a file have a checksum of their own, where a process holds so many bytes: few, so that ranks that hold
    other parts read little that they do not need; more where there are many, or the record would grow large. Ranks that hold the
    same have the same, and can compare theirs. Chunks, which are written at once, are larger."""
    least, most = SUM_BYTES
    return min(most, max(least, 1 << (-(-held // SUMS) - 1).bit_length()))


def sharding_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """For the header of a file with boxes: what tells torch's ``HuggingFaceStorageReader`` where in its tensor each begins.
    ``offsets``: of every tensor in the file, zeros for one that is whole."""
    saved = {key: {"saved_offsets": list(offset)} for key, offset in offsets.items()}
    return {"DCP_SHARDING_INFO": json.dumps(saved, separators=(",", ":")), "DCP_VERSION": "1.0"}


def _padded(name: str, header: Mapping[str, Any], data_bytes: int) -> bytes:
    """Length and JSON of ``header``, with spaces behind it until header and data together fill whole blocks."""
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise SetupError(f"{name}: a key or metadata is not valid Unicode, which safetensors needs: {error}") from error
    text += b" " * (-(8 + len(text) + data_bytes) % BLOCK)
    if len(text) > MAX_HEADER:
        raise SetupError(f"{name}: the header would have {len(text)} bytes; safetensors readers take {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def header_bytes(first8: bytes, nbytes: int, path: str) -> int:
    """Bytes that the header takes, its length field included, in a file of ``nbytes`` that begins with ``first8``."""
    length = int.from_bytes(first8[:8], "little")
    if len(first8) < 8 or length > min(MAX_HEADER, nbytes - 8):
        raise Corrupt(path, f"the header length {length} does not fit a file of {nbytes} bytes", offset=0)
    return 8 + length


def parse_header(raw: bytes, nbytes: int, path: str = "") -> dict[str, Placed]:
    """The tensors of a file of ``nbytes`` that begins with ``raw``, in ascending ``begin``; each one's ``layer`` is -1. Strict:
    anything but a gapless cover of the data by well-formed entries raises ``Corrupt``."""
    end = header_bytes(raw, nbytes, path)
    if len(raw) < end or raw[8:9] != b"{":
        raise Corrupt(path, "the header is cut off or does not begin with '{'", offset=8)
    header = parse_json(raw[8:end], path, depth=3, what="the safetensors header")
    metadata = header.pop(_METADATA, {})
    if type(metadata) is not dict or not all(map(is_text, metadata.values())):
        raise Corrupt(path, f"{_METADATA} in the header is not a map of strings")
    if not all(map(is_text, [*metadata, *header])):
        raise Corrupt(path, "a name in the header is not valid Unicode")
    placed = sorted((_entry(key, entry, end, path) for key, entry in header.items()), key=lambda p: (p.begin, p.nbytes))
    at = end
    for tensor in placed:
        if tensor.begin != at:
            raise Corrupt(path, f"tensor {tensor.spec.key!r} begins at {tensor.begin}; the one before it ends at {at}")
        at += tensor.nbytes
    if at != nbytes:
        raise Corrupt(path, f"the tensors end at {at} but the file has {nbytes} bytes", offset=min(at, nbytes))
    return {tensor.spec.key: tensor for tensor in placed}


def _entry(key: str, entry: Any, data_begin: int, path: str) -> Placed:
    """One entry of the header, checked by itself."""
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Corrupt(path, f"the header's entry {key!r} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES or not is_shape(shape) or not is_counts(offsets) or len(offsets) != 2:
        raise Corrupt(path, f"the header's entry {key!r} is malformed: {str(entry)[:200]}")
    spec = TensorSpec(key, dtype, tuple(shape), -1)
    if offsets[1] - offsets[0] != spec.nbytes:
        raise Corrupt(path, f"{key!r} spans {offsets[1] - offsets[0]} bytes; {dtype} {shape} takes {spec.nbytes}")
    return Placed(spec, data_begin + offsets[0], spec.nbytes)
