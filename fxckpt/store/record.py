"""``commit.json``: the record that makes a directory a checkpoint.

The file is one JSON object whose first member is the SHA-256 of every byte behind it, so that one flipped bit
anywhere in it, the digest's own included, is noticed before anything in it is believed. The parser takes exactly the
members listed here, each of its type and in its range: a record that parses describes files a reader can check
without further doubt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fxckpt.errors import Corrupt
from fxckpt.store.layout import BLOCK, ITEM_SIZES
from fxckpt.store.retention import MAX, MIN, MINUTES, STEPS
from fxckpt.store.safe_json import is_count, parse_json
from fxckpt.store.typed_json import MAX_DEPTH, RawTensor, decode_state, encode_state, raw_tensor

__all__ = ["FORMAT", "FileRecord", "LayerRecord", "RawTensor", "Record", "TensorRecord", "decode_state", "encode_state",
           "raw_tensor"]  # fmt: skip

FORMAT = 1
"""Format of ``store.json`` and ``commit.json``; raised when an older reader would misread them."""

KINDS = ("update", "frozen", "buffers")
"""What a layer holds: parameters an optimizer updates (with their state), frozen ones, or buffers."""

_PREFIX = b'{"sha256":"'
_DIGEST_END = len(_PREFIX) + 64
_BODY = _DIGEST_END + len(b'",')
_DEPTH = 3 * MAX_DEPTH + 16
_CHUNK = 1 << 30  # the largest that an engine writes: a reader makes a buffer of this size
_DIMENSIONS = 64  # torch has no more, and the product of a million sizes would take for ever


@dataclass(frozen=True)
class FileRecord:
    """One file: its size, and the CRC-32C of each ``chunk_bytes`` of it (the last may be shorter)."""

    name: str
    nbytes: int
    chunk_bytes: int
    crc32c: tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: ``begin`` is its absolute offset in ``file``; ``dtype`` is the safetensors name."""

    file: str
    key: str
    begin: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LayerRecord:
    """One layer: what was stored of it, from which training ``step``, and when (seconds since 1970)."""

    id: int
    name: str
    kind: str
    step: int
    time: float
    parameters: int
    nbytes: int
    tensors: tuple[TensorRecord, ...]

    @property
    def offset(self) -> int:
        """The lowest offset of its tensors, each in its own file; 0 without any."""
        return min((tensor.begin for tensor in self.tensors), default=0)


@dataclass(frozen=True)
class Record:
    """Everything that is known of a checkpoint beside the tensors' bytes.

    ``generation`` orders all checkpoints of a store, ``parent`` is the generation this one was trained on from;
    ``ties`` maps a name to the stored key it shares memory with; ``optimizers`` and ``state`` are ``encode_state``
    JSON. ``metrics`` were noted by the user; ``lasting`` says why it is kept for good (``"steps"``, ``"minutes"``) or is
    None; ``best_by`` is the metric by which the writer kept the best one, with ``"min"`` or ``"max"``.
    """

    store_id: str
    generation: int
    parent: int | None
    step: int
    iteration: int
    updates: int
    time: float
    world_size: int
    rank: int
    files: tuple[FileRecord, ...]
    layers: tuple[LayerRecord, ...]
    ties: Mapping[str, str]
    optimizers: Any
    state: Any
    name: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lasting: str | None = None
    best_by: tuple[str, str] | None = None

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = {"format": FORMAT, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}}
        body["files"] = [vars(file) for file in self.files]
        body["layers"] = [{**vars(layer), "tensors": [vars(each) for each in layer.tensors]} for layer in self.layers]
        body["metrics"] = {name: encode_state(float(value), {}) for name, value in self.metrics.items()}
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")[1:] + b"\n"
        return _PREFIX + hashlib.sha256(text).hexdigest().encode() + b'",' + text

    @classmethod
    def from_bytes(cls, raw: bytes, path: str) -> Record:
        """The record in ``raw``; ``path`` is for the error. Raises ``Corrupt``."""
        expected = _PREFIX + hashlib.sha256(raw[_BODY:]).hexdigest().encode() + b'",'
        if raw[:_BODY] != expected:  # compared as bytes: an upper-case digest is a flipped bit too
            raise Corrupt(path, f"its SHA-256 is {expected[11:75].decode()}, but it begins with {raw[:_BODY]!r}")
        body = parse_json(raw, path, depth=_DEPTH, what="the record")
        try:
            return _record(body)
        except _Malformed as error:
            raise Corrupt(path, f"the record is malformed: {error}") from error


class _Malformed(Exception):
    """Something in a record has the wrong type or is out of range."""


def _need(holds: Any, what: str) -> None:
    """Refuse the record unless ``holds``."""
    if not holds:
        raise _Malformed(what)


def _is_name(value: Any) -> bool:
    """The name of a file inside the checkpoint's own directory, not a path out of it."""
    plain = type(value) is str and value not in ("", ".", "..", "commit.json") and not set("/\\\0") & set(value)
    return plain and _is_unicode(value)


def _is_unicode(text: str) -> bool:
    """JSON can hold halves of surrogate pairs, which no file system can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_counts(value: Any) -> bool:
    return type(value) is list and all(map(is_count, value))


def _is_shape(value: Any) -> bool:
    return _is_counts(value) and len(value) <= _DIMENSIONS


def _is_time(value: Any) -> bool:
    return is_count(value) or (type(value) is float and math.isfinite(value))


def _is_str(value: Any) -> bool:
    return type(value) is str


def _is_list(value: Any) -> bool:
    return type(value) is list


def _is_map(value: Any) -> bool:
    return type(value) is dict and all(map(_is_str, value.values()))


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_metric(value: Any) -> bool:
    """A float as ``encode_state`` writes it: a finite number, or the bits of NaN and infinities."""
    if type(value) is float:
        return math.isfinite(value)
    return (type(value) is dict and value.keys() == {"!", "v"} and value["!"] == "float" and type(value["v"]) is str
            and re.fullmatch("[0-9a-f]{16}", value["v"]) is not None)  # fmt: skip


def _is_best_by(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and _is_str(value[0]) and value[1] in (MIN, MAX)


def _anything(value: Any) -> bool:
    """For encoded state, which ``decode_state`` checks when it is used."""
    return True


_FILE = {"name": _is_name, "nbytes": is_count, "chunk_bytes": is_count, "crc32c": _is_counts}
_TENSOR = {"file": _is_name, "key": _is_str, "begin": is_count, "nbytes": is_count, "shape": _is_shape,
           "dtype": lambda value: _is_str(value) and value in ITEM_SIZES}  # fmt: skip
_LAYER = {"id": is_count, "name": _is_str, "kind": lambda value: _is_str(value) and value in KINDS, "step": is_count,
          "time": _is_time, "parameters": is_count, "nbytes": is_count, "tensors": _is_list}  # fmt: skip
_RECORD = {"sha256": _is_str, "format": is_count, "store_id": _is_str, "generation": is_count,
           "parent": _optional(is_count), "step": is_count, "iteration": is_count, "updates": is_count,
           "time": _is_time, "world_size": is_count, "rank": is_count, "files": _is_list, "layers": _is_list,
           "ties": _is_map, "optimizers": _anything, "state": _anything, "name": _optional(_is_str),
           "metrics": lambda value: type(value) is dict and all(map(_is_metric, value.values())),
           "lasting": lambda value: value in (None, STEPS, MINUTES), "best_by": _optional(_is_best_by)}  # fmt: skip


def _members(value: Any, checks: Mapping[str, Callable[[Any], bool]], what: str) -> dict[str, Any]:
    """``value`` if it is an object of exactly these members, each as its check wants it."""
    _need(type(value) is dict, f"{what} is not an object")
    _need(value.keys() == checks.keys(), f"{what} has members {sorted(value)}, not {sorted(checks)}")
    for name, check in checks.items():
        _need(check(value[name]), f"{what}: {name} is {str(value[name])[:80]}")
    return value


def _record(body: Any) -> Record:
    """The parsed body as a ``Record``, with files, layers and tensors agreeing with each other."""
    _need(type(body) is dict and body.get("format") == FORMAT,
          f"this reader knows format {FORMAT}; a newer fxckpt may have written it")  # fmt: skip
    fields = dict(_members(body, _RECORD, "the record"))
    del fields["sha256"], fields["format"]
    fields["files"] = tuple(map(_file, fields["files"]))
    sizes = {file.name: file.nbytes for file in fields["files"]}
    _need(len(sizes) == len(fields["files"]), "a file is listed twice")
    fields["layers"] = tuple(_layer(layer, sizes) for layer in fields["layers"])
    fields["metrics"] = {name: decode_state(value, {}) for name, value in fields["metrics"].items()}
    fields["best_by"] = None if fields["best_by"] is None else tuple(fields["best_by"])
    parent = fields["parent"]
    _need(parent is None or parent < fields["generation"], "its parent is not older than itself")
    _need(fields["rank"] < fields["world_size"], "its rank is not below its world size")
    return Record(**fields)


def _file(value: Any) -> FileRecord:
    """One file, whose chunk table must cover it."""
    found = _members(value, _FILE, "a file")
    chunk, crcs = found["chunk_bytes"], found["crc32c"]
    _need(0 < chunk <= _CHUNK and chunk % BLOCK == 0, f"chunk_bytes {chunk} is not a multiple of {BLOCK} up to {_CHUNK}")
    _need(len(crcs) == -(-found["nbytes"] // chunk), f"{len(crcs)} checksums for {found['nbytes']} bytes")
    _need(all(crc < 1 << 32 for crc in crcs), "a checksum of more than 32 bits")
    return FileRecord(found["name"], found["nbytes"], chunk, tuple(crcs))


def _layer(value: Any, sizes: Mapping[str, int]) -> LayerRecord:
    """One layer, whose tensors must lie inside their files."""
    found = dict(_members(value, _LAYER, "a layer"))
    found["tensors"] = tuple(_tensor(tensor, sizes) for tensor in found["tensors"])
    return LayerRecord(**found)


def _tensor(value: Any, sizes: Mapping[str, int]) -> TensorRecord:
    """One tensor, whose bytes must be those of its type and shape, inside its file."""
    found = dict(_members(value, _TENSOR, "a tensor"))
    found["shape"] = tuple(found["shape"])
    tensor = TensorRecord(**found)
    _need(tensor.nbytes == math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype],
          f"tensor {tensor.key!r} has {tensor.nbytes} bytes for {tensor.dtype} {tensor.shape}")  # fmt: skip
    _need(tensor.file in sizes, f"tensor {tensor.key!r} is in {tensor.file!r}, which is not listed")
    _need(tensor.begin + tensor.nbytes <= sizes[tensor.file], f"tensor {tensor.key!r} ends beyond {tensor.file!r}")
    return tensor
