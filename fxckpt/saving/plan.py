"""Lay a run's tensors out in files: which tensor lies where, and which engine layer it belongs to.

Engine layers, in this order: of every optimizer its counts (if any) and its updated layers; frozen parameters; a snapshot of
the buffers. The files are ``model.safetensors`` and ``optimizer.safetensors``; the extra state's file is written at the commit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch

from fxckpt.compat.spread import Box, local
from fxckpt.engine import Engine, Plan, Sources
from fxckpt.engine.plan import Item
from fxckpt.engine.sums import Sums, digest_of
from fxckpt.saving.inventory import DTYPES, Inventory, storable, stored_box
from fxckpt.saving.share import Share
from fxckpt.store.layout import FileLayout, Placed, TensorSpec, lay_out, sharding_metadata, sum_bytes
from fxckpt.store.names import MODEL, OPTIMIZER, state_key
from fxckpt.store.record import LayerRecord, TensorRecord

if TYPE_CHECKING:
    from fxckpt.optim.stepper import Stepper

T = TypeVar("T")

FILES = (MODEL, OPTIMIZER)
"""By their numbers in a layout."""

MOVING = ("buffers", "gradients")
"""Kinds of layers whose tensors lie elsewhere each time."""


@dataclass(frozen=True)
class Entry:
    """One tensor to store: the number of its file, its key there, and the tensor, of which a DTensor is stored in part."""

    file: int
    key: str
    tensor: torch.Tensor
    owner: str = ""  # the parameter that a state belongs to

    def in_file(self, number: int) -> Entry:
        """The same tensor in another file."""
        return Entry(number, self.key, self.tensor, self.owner)


@dataclass
class EngineLayer:
    """What one emit hands over. ``kind``: counts, update, frozen or buffers; in a record of the journal also gradients."""

    name: str
    kind: str
    entries: list[Entry]
    parameters: int = 0
    sources: Sources | None = None  # fixed addresses; None for what is copied in memory first, and so moves
    memory: list[torch.Tensor] = field(default_factory=list)  # keeps the sources' storages alive, whatever is replaced
    own: list[int] | None = None  # which of the entries this rank writes, where several write together; None: all

    def mine(self, of_entries: Sequence[T]) -> Sequence[T]:
        """What belongs to those entries that this rank writes, of what there is for each."""
        return of_entries if self.own is None else [of_entries[i] for i in self.own]


@dataclass
class Layout:
    """The plan of a checkpoint, good as long as the bindings it was made from."""

    layers: list[EngineLayer]
    files: list[FileLayout]
    plan: Plan
    sum_bytes: int
    frozen_token: Hashable  # names, addresses and places of the frozen parameters; None: there are none
    changed_outside: set[str]
    full: Layout | None = None  # of a record of the journal: the checkpoint's whose layers have the same numbers
    share: Share | None = None  # what of it this rank writes, where several write together
    own: frozenset[str] = frozenset()  # there, the keys of what each rank has for itself
    alike: str = ""  # there, a digest of what all ranks have alike
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what of it is whole beside DTensors
    checked: list[FileLayout] = field(default_factory=list)  # files of another rank, of which only the checksums are wanted
    numbering: object = field(default_factory=object)  # the same in all layouts whose updated layers have the same numbers

    def numbers_as(self, other: Layout | None) -> bool:
        """Do the updated layers have the numbers that they have in this other one?"""
        return other is not None and (self.full or self).numbering is other.numbering

    def number(self, kind: str) -> list[int]:
        """The engine's numbers of the layers of one kind."""
        return [i for i, layer in enumerate(self.layers) if layer.kind == kind]

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max((local(e.tensor).nbytes for layer in self.layers for e in layer.entries), default=0)

    def frozen_chunks(self, crcs: Sequence[Sums]) -> dict[str, dict[int, int]]:
        """``{file: {chunk: digest}}`` of the chunks that hold nothing but frozen parameters; see ``engine.sums.digest_of``."""
        frozen = set(self.number("frozen"))
        layout, size = self.files[0], self.plan.chunk_bytes
        each = size // self.sum_bytes
        mixed = set(range(-(-len(layout.header) // size)))
        for placed in layout.tensors:
            if placed.spec.layer not in frozen and placed.nbytes:
                mixed |= set(range(placed.begin // size, (placed.begin + placed.nbytes - 1) // size + 1))
        pure = (i for i in range(-(-layout.nbytes // size)) if i not in mixed)
        return {layout.name: {i: digest_of(crcs[0], range(i * each, (i + 1) * each)) for i in pure}}

    def records(self, step: int) -> tuple[LayerRecord, ...]:
        """The layers as the record of this step lists them."""
        now = time.time()
        return tuple(LayerRecord(**{**vars(each), "step": step, "time": now}) for each in self._listed)

    @cached_property
    def _listed(self) -> tuple[LayerRecord, ...]:
        """The same of no step; a layer's counts are listed with the rest of it."""
        placed = {(f, p.spec.key): p for f, layout in enumerate(self.files) for p in layout.tensors}
        counts: dict[str, list[Entry]] = {}
        for entry in (e for layer in self.layers if layer.kind == "counts" for e in layer.mine(layer.entries)):
            counts.setdefault(entry.owner, []).append(entry)
        out: list[LayerRecord] = []
        for layer in (layer for layer in self.layers if layer.kind != "counts"):
            owners = [e.owner for e in layer.entries if e.key == e.owner]
            entries = [*layer.mine(layer.entries), *(c for name in owners for c in counts.get(name, ()))]
            entries = [e for e in entries if e.file < len(self.files)]
            places = [(self.files[e.file].name, e.key, placed[e.file, e.key]) for e in entries]
            tensors = tuple(_recorded(f, key, p, stored_box(e.tensor)) for (f, key, p), e in zip(places, entries))
            nbytes = sum(t.nbytes for t in tensors)
            out.append(LayerRecord(len(out), layer.name, layer.kind, 0, 0.0, layer.parameters, nbytes, tensors))
        return tuple(out)


def _metadata(specs: Sequence[TensorSpec], boxes: Mapping[str, Box | None]) -> dict[str, str]:
    """What a file's header says beside its tensors: where in their wholes they begin, if some are boxes."""
    offsets: dict[str, Sequence[int]] = {spec.key: (0,) * len(spec.shape) for spec in specs}
    parts = {key: box.offset for key, box in boxes.items() if box is not None and not box.is_whole}
    return {"format": "pt", **(sharding_metadata({**offsets, **parts}) if parts else {})}


def _recorded(file: str, key: str, placed: Placed, box: Box | None) -> TensorRecord:
    """How the record lists a tensor, or this rank's part of one."""
    found = TensorRecord(file, key, placed.begin, placed.nbytes, placed.spec.shape, placed.spec.dtype)
    return found if box is None or box.is_whole else replace(found, whole=box.whole, offset=box.offset)


def counts_layer(index: int, stepper: Stepper) -> EngineLayer:
    """All step counts of the optimizer of this number: they advance before the first layer is updated."""
    entries = [Entry(1, state_key(index, k, m.name), t, m.name) for m in stepper.bindings.members for k, t in m.counts()]
    return EngineLayer("counts", "counts", entries)


def updated_layers(index: int, stepper: Stepper) -> list[EngineLayer]:
    """The layers that a step of this optimizer updates, in its order."""
    out = []
    for layer, members in zip(stepper.executor.arranged.graph.layers, stepper.executor.arranged.owned):
        tensors = [(m.name, key, m.whole(key)) for m in members for key, _ in m.tensors()]
        entries = [Entry(1, state_key(index, key, name), t, name) if key else Entry(0, name, t, name) for name, key, t in tensors]
        out.append(EngineLayer(layer.name, "update", entries, sum(m.param.numel() for m in members)))
    return out


def other_layers(inventory: Inventory, changed_outside: set[str]) -> list[EngineLayer]:
    """What no step updates: frozen parameters by module, then the buffers with those parameters that change all the same."""
    frozen: dict[str, EngineLayer] = {}
    buffers = [Entry(0, name, tensor) for name, tensor in inventory.buffers.items()]
    for name, tensor in inventory.frozen.items():
        if name in changed_outside:
            buffers.append(Entry(0, name, tensor))
        else:
            owner = name.rpartition(".")[0]
            layer = frozen.setdefault(owner, EngineLayer(owner, "frozen", []))
            layer.entries.append(Entry(0, name, tensor))
            layer.parameters += tensor.numel()
    return [*frozen.values(), EngineLayer("buffers", "buffers", buffers)] if buffers else list(frozen.values())


def make_layout(
    engine: Engine,
    layers: list[EngineLayer],
    changed_outside: set[str],
    make_sources: Callable[[Sequence[torch.Tensor]], Sources | None],
    names: Sequence[str] = FILES,
    checked: Sequence[str] = (),
) -> Layout:
    """Place every tensor that this process writes and give the plan to the engine. ``names``: the files, by their numbers; behind
    them those that are ``checked`` and not written."""
    stored = [(i, e, storable(e.tensor, e.key)) for i, layer in enumerate(layers) for e in layer.mine(layer.entries)]
    specs: list[list[TensorSpec]] = [[] for _ in (*names, *checked)]
    boxes: list[dict[str, Box | None]] = [{} for _ in specs]
    for number, entry, tensor in stored:
        boxes[entry.file][entry.key] = box = stored_box(entry.tensor)
        shape = tuple(tensor.shape) if box is None else box.shape
        specs[entry.file].append(TensorSpec(entry.key, DTYPES[tensor.dtype], shape, number))
    files = [lay_out(name, spec, _metadata(spec, of)) for name, spec, of in zip((*names, *checked), specs, boxes)]
    placed = {(f, p.spec.key): p for f, layout in enumerate(files) for p in layout.tensors}
    geometry = []
    for number, entry, tensor in stored:
        p = placed[entry.file, entry.key]
        assert p.nbytes == tensor.nbytes, f"{entry.key}: {tensor.nbytes} bytes, of which the record would say {p.spec.shape}"
        geometry.append((number, entry.file, p.begin, p.nbytes, tensor.element_size()))
        if layers[number].kind not in MOVING:
            layers[number].memory.append(tensor)
    for layer in layers:
        if layer.kind not in MOVING:
            layer.sources = make_sources(layer.memory)
    held = sum(local(e.tensor).nbytes for layer in layers for e in layer.entries)
    size = math.gcd(sum_bytes(held), engine.chunk_bytes)  # a chunk is a whole number of them, whatever its size
    plan = engine.plan([(f.nbytes, f.header) for f in files], geometry, len(layers), size)
    frozen = tuple((e.key, t.data_ptr(), tuple(t.shape)) for i, e, t in stored if layers[i].kind == "frozen")
    token = (frozen, tuple(f.header for f in files)) if frozen else None
    written, others = files[: len(names)], files[len(names) :]
    return Layout(layers, written, plan, plan.sum_bytes, token, changed_outside, checked=others)


def source_items(tensors: Sequence[torch.Tensor]) -> list[Item]:
    """Addresses for the engine; what is not row-major is described by its sizes and its strides in bytes."""
    out: list[Item] = []
    for t in tensors:
        if t.is_contiguous():
            out.append((t.data_ptr(), None, None))
        else:
            out.append((t.data_ptr(), tuple(t.shape), tuple(s * t.element_size() for s in t.stride())))
    return out
