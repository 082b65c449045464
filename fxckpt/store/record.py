"""``commit.json``: the record that makes a directory a checkpoint.

One JSON object whose first member is the SHA-256 of every byte behind it: a flipped bit anywhere in it, the digest's own
included, is noticed before anything is believed. The parser takes exactly the members listed here, each of its type and in its
range: a record that parses describes files a reader can check without further doubt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxckpt.engine.sums import Sums, table
from fxckpt.errors import Corrupt, SetupError
from fxckpt.store import names
from fxckpt.store.checks import (
    MAX_BYTES,
    Malformed,
    is_anything,
    is_count,
    is_counts,
    is_number,
    is_shape,
    is_str,
    is_text,
    list_of,
    map_of,
    members,
    need,
    optional,
    parse_json,
    size_of,
)
from fxckpt.store.dtypes import DTYPES, item_size
from fxckpt.store.layout import BLOCK
from fxckpt.store.sum_tables import put_in, taken_out, values_in
from fxckpt.store.typed_json import MAX_DEPTH, decode_state, encode_state

FORMAT = 1
"""Format of ``store.json`` and ``commit.json``; raised when an older reader would misread them."""

JOURNAL_FORMAT = 2
"""Format of the ``commit.json`` of a record of the journal, which by itself is no checkpoint."""

SHARED_FORMAT = 3
"""Format of the records of a checkpoint that several ranks wrote together, a part each: without the others none is whole."""

SHARDED_FORMAT = 4
"""Format of those among them that have boxes of tensors which no rank has whole."""

ORDERED_FORMAT = 5
"""Format of a record of the journal that says whose steps it holds, and in which order: other than one of the one optimizer."""

DEVICE_FORMAT = 6
"""Format of a record of the journal that says that its steps were made on a device, where they are made again, too."""

CUDA = "cuda"
"""The one kind of device."""

SHARED_JOURNAL_FORMAT = 7
"""Format of the records of a record of the journal that several ranks wrote together, a part each."""

KINDS = ("update", "frozen", "buffers")
"""What a layer holds: parameters an optimizer updates (with their state), frozen ones, or buffers."""

GRADIENTS = "gradients"
"""What a layer of a record of the journal holds beside these: the gradients that the step was made with."""

MIN, MAX = "min", "max"
STEPS, MINUTES = "steps", "minutes"  # why a checkpoint is kept for good

_PREFIX = b'{"sha256":"'
_DIGEST_END = len(_PREFIX) + 64
_BODY = _DIGEST_END + len(b'",')
_DEPTH = 3 * MAX_DEPTH + 16
_CHUNK = 1 << 30  # the largest that an engine writes: a reader makes a buffer of this size


@dataclass(frozen=True)
class FileRecord:
    """One file: its size, and the CRC-32C of each ``chunk_bytes`` of it (the last may be shorter), as a table."""

    name: str
    nbytes: int
    chunk_bytes: int
    crc32c: Sums

    def __post_init__(self) -> None:
        object.__setattr__(self, "crc32c", table(self.crc32c))


Place = tuple[str, str]
"""Of a tensor in a checkpoint: the kind of its file, and its key."""


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: ``begin`` is its absolute offset in ``file``; ``dtype`` is the safetensors name.

    Of a tensor that ranks hold in parts, a record has the box of its rank: ``whole`` is the shape of the tensor, ``offset`` where
    in it the box begins. ``pieces``, which is in no file, are all boxes of a tensor that ``parts.joined`` has put together, in
    the order of their offsets; ``file`` and ``begin`` are then those of the first.
    """

    file: str
    key: str
    begin: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    whole: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None
    pieces: tuple[TensorRecord, ...] = ()

    @property
    def place(self) -> Place:
        """What names it in a checkpoint, whichever rank wrote it: the kind of its file, and its key."""
        return names.kind_of(self.file), self.key


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
class Journal:
    """What makes a record one of the journal: what it builds on, and what its step had beside gradients.

    ``base`` is the generation of the checkpoint, ``after`` that of the record before it, or of the checkpoint; ``number``
    counts the records of a checkpoint from 1 on. ``update`` is ``compile_step``'s; ``order`` the numbers of the optimizers that
    made a step, in their order, none of them twice; ``groups`` of each of these its groups' settings as the step found them,
    ``encode_state`` JSON; ``strides`` those (in items) of gradients that lay in another order of memory than their parameters, by
    name; ``digests`` CRC-32C of layers as the step left them, by name; ``machine`` what made the step, with so many ``threads``:
    where one's share of a tensor ends, a kernel may round otherwise. ``device``: the kind of the device on which all parameters
    lay, ``"cuda"``, or None for host memory.
    """

    base: int
    after: int
    number: int
    update: str | None
    groups: Any
    strides: Mapping[str, Sequence[int]]
    digests: Mapping[str, int]
    machine: str
    threads: int
    order: tuple[int, ...] = (0,)
    device: str | None = None


@dataclass(frozen=True)
class Part:
    """The record of a rank other than 0, which lies beside rank 0's: its file, and what that must hash to."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that is known of a checkpoint beside the tensors' bytes.

    A run makes it; ``store_id``, ``generation``, ``parent``, ``name``, ``lasting``, ``best_by`` and the file of the extra
    state are filled in by ``Store.commit``. ``generation`` orders all checkpoints of a store, ``parent`` is the one this was
    trained on from; ``ties`` maps a name to the stored key it shares memory with; ``optimizers`` and ``state`` are
    ``encode_state`` JSON; ``metrics`` were noted by the user; ``lasting`` says why it is kept for good; ``best_by`` is the
    metric by which the writer kept the best one, with ``"min"`` or ``"max"``. ``parts`` are those of the other ranks where
    several write one checkpoint (rank 0's record; none in the others'); ``ranks``, which is in no file, all records of such a
    checkpoint once ``parts.joined`` has put them together.
    """

    store_id: str = ""
    generation: int = 0
    parent: int | None = None
    step: int
    iteration: int
    updates: int
    time: float
    world_size: int = 1
    rank: int = 0
    files: tuple[FileRecord, ...]
    layers: tuple[LayerRecord, ...]
    ties: Mapping[str, str]
    optimizers: Any
    state: Any
    name: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lasting: str | None = None
    best_by: tuple[str, str] | None = None
    journal: Journal | None = None
    parts: tuple[Part, ...] | None = None
    ranks: tuple[Record, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the record itself."""
        return sum(file.nbytes for file in self.files)

    def tensors(self, kind: str | None = None) -> list[TensorRecord]:
        """The tensors of files of one kind, or of all but the extra state's, in the record's order."""
        return [tensor for layer in self.layers for tensor in layer.tensors if kind in (None, names.kind_of(tensor.file))]

    @property
    def state_file(self) -> str:
        """What the file of its extra state is called."""
        return names.STATE if self.parts is None else names.of_rank(names.STATE, self.rank, self.world_size)

    @property
    def is_sharded(self) -> bool:
        """Whether tensors of it are in boxes: its own, or once it was put together those of all ranks."""
        return any(tensor.whole is not None or tensor.pieces for tensor in self.tensors())

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = {"format": FORMAT, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}}
        journal, parts = body.pop("journal"), body.pop("parts")
        if journal is not None:
            body |= _written(journal, alone=parts is None and len(self.optimizers) == 1)
        if parts is not None:
            number = SHARDED_FORMAT if self.is_sharded else SHARED_FORMAT
            body |= {"format": number if journal is None else SHARED_JOURNAL_FORMAT, "parts": [vars(part) for part in parts]}
        del body["ranks"]
        listed = tuple(_TENSORS[body["format"]])
        of = operator.attrgetter(*listed)
        body["files"] = [{**vars(file), "crc32c": []} for file in self.files]
        assert not any(each.pieces or (each.whole is not None and "whole" not in listed) for each in self.tensors())
        tensors = ([dict(zip(listed, of(each))) for each in layer.tensors] for layer in self.layers)
        body["layers"] = [{**vars(layer), "tensors": found} for layer, found in zip(self.layers, tensors)]
        body["metrics"] = {name: encode_state(float(value), {}) for name, value in self.metrics.items()}
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")[1:] + b"\n"
        found, tables = size_of(b"{" + text), [file.crc32c for file in self.files]
        found.values += values_in(tables)
        text = put_in(text, tables)
        if len(text) + _BODY > MAX_BYTES or found.too_large:
            what = f"{len(text):,} bytes" if len(text) + _BODY > MAX_BYTES else f"{found.values:,} values"
            raise SetupError(
                f"the record would have {what}, which no reader takes: give long lists in extra= as tensors or arrays"
            )
        return _PREFIX + hashlib.sha256(text).hexdigest().encode() + b'",' + text

    @classmethod
    def from_bytes(cls, raw: bytes, path: str) -> Record:
        """The record in ``raw``; ``path`` is for the error. Raises ``Corrupt``."""
        expected = _PREFIX + hashlib.sha256(memoryview(raw)[_BODY:]).hexdigest().encode() + b'",'
        if raw[:_BODY] != expected:  # compared as bytes: an upper-case digest is a flipped bit too
            raise Corrupt(path, f"its SHA-256 is {expected[11:75].decode()}, but it begins with {raw[:_BODY]!r}")
        text, tables = taken_out(raw)
        body = parse_json(text, path, depth=_DEPTH, what="the record", beside=(len(raw) - len(text), values_in(tables)))
        for file, crcs in zip(body["files"] if tables else [], tables):
            file["crc32c"] = crcs
        try:
            return _record(body)
        except Malformed as error:
            raise Corrupt(path, f"the record is malformed: {error}") from error

    def misplaced(self, path: str) -> str | None:
        """Why this cannot be the record of the checkpoint directory ``path``, by the directory's name; None if it can, as it
        can in a directory of any other name (a copy somewhere else, a slot)."""
        parent, name = os.path.split(path)
        kind = names.STEPS if self.journal is None else names.RECORDS
        if names.step_of(name, names.RECORDS if self.journal is None else names.STEPS) is not None:
            wrong = True
        elif (step := names.step_of(name, kind)) is not None:
            wrong = self.step != step or self.name is not None or names.generation_of(name) not in (None, self.generation)
        else:
            saved = os.path.basename(parent) == names.NAMED and not name.endswith((names.PARTIAL, names.BAD))
            wrong = saved and self.name != name
        if not wrong:
            return None
        whose = f"step {self.step}, generation {self.generation}" + (f", named {self.name!r}" if self.name else "")
        return f"it is the record of another checkpoint ({whose}), not that of {name}"


def _is_file_name(value: Any) -> bool:
    """The name of a file inside the checkpoint's own directory, not a path out of it."""
    return is_text(value) and value not in ("", ".", "..", names.COMMIT) and not set("/\\\0") & set(value)


def _is_metric(value: Any) -> bool:
    """A float as ``encode_state`` writes it: a finite number, or the bits of NaN and infinities."""
    if type(value) is float:
        return math.isfinite(value)
    return (type(value) is dict and value.keys() == {"!", "v"} and value["!"] == "float" and type(value["v"]) is str
            and re.fullmatch("[0-9a-f]{16}", value["v"]) is not None)  # fmt: skip


def _is_best_by(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and is_str(value[0]) and value[1] in (MIN, MAX)


def _is_table(value: Any) -> bool:
    """Checksums that were taken out of the text: all of 32 bits."""
    return isinstance(value, array)


_is_list = list_of(is_anything)
_FILE = {"name": _is_file_name, "nbytes": is_count, "chunk_bytes": is_count,
         "crc32c": lambda value: _is_table(value) or is_counts(value)}  # fmt: skip
_TENSOR = {"file": is_str, "key": is_str, "begin": is_count, "nbytes": is_count, "shape": is_shape,
           "dtype": lambda value: is_str(value) and value in DTYPES}  # fmt: skip
_BOX = {"whole": optional(is_shape), "offset": optional(is_shape)}
_LAYER = {"id": is_count, "name": is_str, "kind": lambda value: value in (*KINDS, GRADIENTS), "step": is_count,
          "time": is_number, "parameters": is_count, "nbytes": is_count, "tensors": _is_list}  # fmt: skip
_JOURNAL = {"base": is_count, "after": is_count, "number": lambda value: is_count(value) and value > 0,
            "update": optional(is_str), "groups": is_anything, "strides": map_of(is_shape),
            "digests": map_of(lambda value: is_count(value) and value < 1 << 32), "machine": is_str,
            "threads": lambda value: is_count(value) and 0 < value <= 4096}  # fmt: skip
_ORDERED = {"order": lambda value: is_counts(value) and len(set(value)) == len(value)}
_DEVICE = {**_ORDERED, "device": lambda value: value == CUDA}
_RECORD = {"sha256": is_str, "format": is_count, "store_id": is_str, "generation": is_count,
           "parent": optional(is_count), "step": is_count, "iteration": is_count, "updates": is_count,
           "time": is_number, "world_size": is_count, "rank": is_count, "files": _is_list, "layers": _is_list,
           "ties": map_of(is_str), "optimizers": is_anything, "state": is_anything, "name": optional(is_str),
           "metrics": map_of(_is_metric),
           "lasting": lambda value: value in (None, STEPS, MINUTES), "best_by": optional(_is_best_by)}  # fmt: skip
_PART = {"name": _is_file_name, "sha256": lambda value: is_str(value) and re.fullmatch("[0-9a-f]{64}", value) is not None}
_JOURNALS: dict[int, dict[str, Callable[[Any], bool]]] = {
    JOURNAL_FORMAT: _JOURNAL, ORDERED_FORMAT: {**_JOURNAL, **_ORDERED}, DEVICE_FORMAT: {**_JOURNAL, **_DEVICE},
    SHARED_JOURNAL_FORMAT: {**_JOURNAL, **_ORDERED},
}  # fmt: skip
"""What the journal's part has in records of it, by their formats."""
_MORE: dict[Any, dict[str, Callable[[Any], bool]]] = {
    FORMAT: {}, JOURNAL_FORMAT: {"journal": is_anything}, SHARED_FORMAT: {"parts": list_of(is_anything)},
    SHARDED_FORMAT: {"parts": list_of(is_anything)},
    ORDERED_FORMAT: {"journal": is_anything}, DEVICE_FORMAT: {"journal": is_anything},
    SHARED_JOURNAL_FORMAT: {"journal": is_anything, "parts": list_of(is_anything)},
}  # fmt: skip
"""What records of each format have beside."""
_TENSORS: dict[int, dict[str, Callable[[Any], bool]]] = {
    FORMAT: _TENSOR, JOURNAL_FORMAT: _TENSOR, SHARED_FORMAT: _TENSOR, SHARDED_FORMAT: {**_TENSOR, **_BOX},
    ORDERED_FORMAT: _TENSOR, DEVICE_FORMAT: _TENSOR, SHARED_JOURNAL_FORMAT: {**_TENSOR, **_BOX},
}  # fmt: skip
"""What their tensors have."""


def _record(body: Any) -> Record:
    """The parsed body as a ``Record``, with files, layers and tensors agreeing with each other."""
    need(type(body) is dict and body.get("format") in tuple(_MORE),
          f"this reader knows formats {FORMAT} to {SHARED_JOURNAL_FORMAT}; a newer fxckpt may have written it")  # fmt: skip
    of_journal = _JOURNALS.get(body["format"])
    fields = dict(members(body, {**_RECORD, **_MORE[body["format"]]}, "the record"))
    del fields["sha256"], fields["format"]
    fields["files"] = tuple(map(_file, fields["files"]))
    sizes = {file.name: file.nbytes for file in fields["files"]}
    need(len(sizes) == len(fields["files"]), "a file is listed twice")
    fields["layers"] = tuple(_layer(layer, sizes, _TENSORS[body["format"]]) for layer in fields["layers"])
    fields["metrics"] = {name: decode_state(value, {}) for name, value in fields["metrics"].items()}
    fields["best_by"] = None if fields["best_by"] is None else tuple(fields["best_by"])
    parent = fields["parent"]
    need(parent is None or parent < fields["generation"], "its parent is not older than itself")
    need(fields["rank"] < fields["world_size"], "its rank is not below its world size")
    if of_journal is not None:
        fields["journal"] = _journal(fields["journal"], fields["generation"], parent, of_journal)
    if "parts" in fields:
        fields["parts"] = _parts(fields["parts"], fields["rank"], fields["world_size"])
    kinds = KINDS if of_journal is None else (GRADIENTS, *KINDS)
    need(all(layer.kind in kinds for layer in fields["layers"]), "it has gradients, and is no record of a journal")
    return Record(**fields)


def _written(journal: Journal, alone: bool) -> dict[str, Any]:
    """A record's members of it. ``alone``: the run has one optimizer."""
    fields = dict(vars(journal))
    order, device = list(fields.pop("order")), fields.pop("device")
    if device is not None:
        return {"format": DEVICE_FORMAT, "journal": {**fields, "order": order, "device": device}}
    if alone and order == [0]:
        return {"format": JOURNAL_FORMAT, "journal": fields}
    return {"format": ORDERED_FORMAT, "journal": {**fields, "order": order}}


def _journal(value: Any, generation: int, parent: int | None, checks: Mapping[str, Callable[[Any], bool]]) -> Journal:
    """What a record builds on, which is older than itself; the checkpoint is its ``parent``, once the store has filled it in."""
    found = dict(members(value, checks, "the journal's part"))
    journal = Journal(**{**found, "order": tuple(found.get("order", (0,)))})
    in_order = journal.base <= journal.after < generation and (journal.base == journal.after) == (journal.number == 1)
    need(parent is None or (in_order and journal.base == parent), "it does not build on what is older than itself")
    return journal


def _parts(value: Any, rank: int, world: int) -> tuple[Part, ...]:
    """Rank 0's record names those of all others, in their order; the others' none."""
    found = tuple(Part(**members(part, _PART, "a part")) for part in value)
    expected = [names.of_rank(names.PART, each, world) for each in range(1, world)] if rank == 0 else []
    need([part.name for part in found] == expected and world > 1, "it does not name the records of the other ranks")
    return found


def _file(value: Any) -> FileRecord:
    """One file, whose chunk table must cover it."""
    found = members(value, _FILE, "a file")
    chunk, crcs = found["chunk_bytes"], found["crc32c"]
    need(0 < chunk <= _CHUNK and chunk % BLOCK == 0, f"chunk_bytes {chunk} is not a multiple of {BLOCK} up to {_CHUNK}")
    need(len(crcs) == -(-found["nbytes"] // chunk), f"{len(crcs)} checksums for {found['nbytes']} bytes")
    need(_is_table(crcs) or all(crc < 1 << 32 for crc in crcs), "a checksum of more than 32 bits")
    return FileRecord(found["name"], found["nbytes"], chunk, crcs)


def _layer(value: Any, sizes: Mapping[str, int], listed: Mapping[str, Callable[[Any], bool]]) -> LayerRecord:
    """One layer, whose tensors must lie inside their files."""
    found = dict(members(value, _LAYER, "a layer"))
    found["tensors"] = tuple(_tensor(tensor, sizes, listed) for tensor in found["tensors"])
    return LayerRecord(**found)


def _tensor(value: Any, sizes: Mapping[str, int], listed: Mapping[str, Callable[[Any], bool]]) -> TensorRecord:
    """One tensor, whose bytes must be those of its type and shape, inside its file; a box inside its tensor."""
    found = dict(members(value, listed, "a tensor"))
    for name in ("shape", "whole", "offset"):
        if found.get(name) is not None:
            found[name] = tuple(found[name])
    tensor = TensorRecord(**found)
    need(tensor.nbytes == math.prod(tensor.shape) * item_size(tensor.dtype),
         lambda: f"tensor {tensor.key!r} has {tensor.nbytes} bytes for {tensor.dtype} {tensor.shape}")  # fmt: skip
    need(tensor.file in sizes, lambda: f"tensor {tensor.key!r} is in {tensor.file!r}, which is not listed")
    need(tensor.begin + tensor.nbytes <= sizes[tensor.file], lambda: f"tensor {tensor.key!r} ends beyond {tensor.file!r}")
    need(_fits(tensor), lambda: f"tensor {tensor.key!r} {tensor.shape} at {tensor.offset} is no box of {tensor.whole}")
    return tensor


def _fits(tensor: TensorRecord) -> bool:
    """Is it no box, or one that lies inside its tensor?"""
    shape, whole, offset = tensor.shape, tensor.whole, tensor.offset
    if whole is None or offset is None:
        return whole is offset
    return len(shape) == len(whole) == len(offset) and all(o + n <= w for o, n, w in zip(offset, shape, whole))
