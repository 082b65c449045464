"""What there is to save: every tensor by name, and which names are one tensor.

Names are the model's own (``h.0.attn.weight``). Without a model they come from the optimizer's ``param_names``, then from
what the compiler saw, then from positions (``optimizer0.0.3``: optimizer, group, index).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fxckpt.compat import cuda
from fxckpt.compat.modules import Walk, every_module, named_buffers, named_parameters, places
from fxckpt.compat.spread import Box, box_of, is_replicated, is_spread, local
from fxckpt.compat.tensors import is_transformed, is_wrapper
from fxckpt.errors import SetupError, StateError
from fxckpt.graph.model.book import TraceBook
from fxckpt.store.dtypes import OF_TORCH
from fxckpt.store.typed_json import Unkept, encode_state

DTYPES: dict[torch.dtype, str] = {getattr(torch, name): known for name, known in OF_TORCH.items()}
"""Torch's types that can be stored, and safetensors' names of them."""

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

COMPLEX_OF: dict[str, torch.dtype] = {"F16": torch.complex32, "F32": torch.complex64, "F64": torch.complex128}
"""What pairs of real numbers of a type are; earlier versions wrote complex64 as pairs, too."""


@dataclass
class Inventory:
    """Names of all tensors of a run; each tensor appears once, its other names are in ``ties`` (alias -> name)."""

    trained: dict[str, torch.Tensor] = field(default_factory=dict)  # in the optimizers, in registration order
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)  # other parameters
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)  # in the model's state dict
    transient: dict[str, torch.Tensor] = field(default_factory=dict)  # in the record: what is non-persistent, or sparse
    ties: dict[str, str] = field(default_factory=dict)
    positional: bool = False  # some name is only a position: the compiler may still tell the real one
    name_by_id: dict[int, str] = field(default_factory=dict)  # of the trained
    places: dict[str, tuple[Mapping[str, torch.Tensor | None], str, torch.Tensor]] = field(default_factory=dict)
    """Of frozen parameters and buffers, in what and as what a model keeps them, and what it kept there."""

    def add_buffer(self, name: str, buffer: torch.Tensor, persistent: bool) -> None:
        """A sparse one goes into the record, which knows how to hold it: a file of tensors has no such thing. There each rank has
        its own, so nothing is a DTensor: of one that all ranks have all of, this rank's tensor is kept."""
        if persistent and buffer.layout is not torch.sparse_coo:
            self.buffers[name] = buffer
        else:
            self.transient[name] = local(buffer) if is_replicated(buffer) else buffer

    def renew(self) -> None:
        """Look which frozen parameters and buffers a model keeps in the places of those that were found; nothing that is new."""
        for name, (within, key, before) in list(self.places.items()):
            now = within[key] if key in within else None  # noqa: SIM401  what a ScriptModule has knows no get()
            if now is before:
                continue
            [of] = [each for each in (self.frozen, self.buffers, self.transient) if name in each]
            if now is None:
                del of[name], self.places[name]
            else:
                of[name], self.places[name] = local(now) if is_replicated(now) else now, (within, key, now)

    def name_of(self, param: torch.Tensor) -> str:
        """The name of a trained parameter."""
        return self.name_by_id[id(param)]


def storable(tensor: torch.Tensor, name: str = "") -> torch.Tensor:
    """The tensor as a file can hold it: complex numbers of a type that safetensors lacks as pairs of reals, all detached; of a
    DTensor this rank's part.
    ``name`` is for messages. Raises SetupError for what cannot be written from memory as it is (sparse, quantized, meta
    tensors)."""
    what = f"cannot checkpoint {name!r}, " if name else "cannot checkpoint "
    if is_transformed(tensor):
        gone = "it is gone when the transform returns. Call compile_step outside, with the parameters themselves."
        raise SetupError(f"{what}a tensor inside a transform of torch.func (grad, vmap, ...): {gone}")
    if torch.nn.parameter.is_lazy(tensor):
        raise SetupError(
            f"{what}a parameter without a shape yet: run one forward, with any batch of the right shape, so that "
            "the lazy modules make their parameters, and call compile_step then"
        )
    if is_spread(tensor):
        try:
            box_of(tensor)
        except SetupError as error:
            raise SetupError(f"{what}{error}") from error
        tensor = local(tensor)
    if is_wrapper(tensor):
        holds = "it holds other tensors in place of memory of its own, which this version does not take apart"
        raise SetupError(f"{what}a {type(tensor).__name__}: {holds}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        kind = f"{tensor.layout} {tensor.dtype} tensor on {tensor.device}"
        raise SetupError(f"{what}a {kind}: only dense tensors with memory of their own are supported")
    if tensor.is_conj() or tensor.is_neg():
        raise SetupError(
            f"{what}a view that is conjugated or negated when it is read: its memory holds other values. Store what "
            ".resolve_conj() or .resolve_neg() makes of it in its place"
        )
    cuda.check(tensor)
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() and tensor.dtype not in DTYPES else tensor
    if tensor.dtype not in DTYPES:
        raise SetupError(f"{what}a {tensor.dtype} tensor: safetensors has no such type")
    return tensor


def stored_box(tensor: torch.Tensor) -> Box | None:
    """``box_of`` a tensor as a file has it: of pairs of reals both."""
    box = box_of(tensor)
    if box is None or not tensor.is_complex() or tensor.dtype in DTYPES:
        return box
    return Box((*box.whole, 2), (*box.offset, 0), (*box.shape, 2), box.holders)


def storable_as(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """The same, as a record of that type has it: an earlier version wrote all complex numbers as pairs of reals."""
    real = storable(tensor)
    return torch.view_as_real(real) if real.is_complex() and dtype == "F32" else real


def check_storable(found: Inventory) -> None:
    """Raise SetupError, by name, for a frozen parameter or buffer that no checkpoint can hold. The trained are checked one by
    one, by whoever names them."""
    for name, tensor in {**found.frozen, **found.buffers}.items():
        storable(tensor, name)
    for name, tensor in found.transient.items():
        try:
            encode_state(tensor, Unkept(), name)
        except StateError as error:
            raise SetupError(f"cannot checkpoint the buffer {error}") from error


def shared_memory(tensors: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """By ``id``, of tensors whose memory may be another one's as well, which other: ``decoder.weight.data = encoder.weight.data``
    makes two parameters of one memory. Views that interleave count, though they have no element in common."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel() and not is_wrapper(tensor):
            length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            begin = tensor.data_ptr()
            spans.append((str(tensor.device), begin, begin + length * tensor.element_size(), name, tensor))
    found: dict[int, str] = {}
    furthest = None
    for span in sorted(spans, key=lambda s: s[:3]):
        if furthest is not None and span[0] == furthest[0] and span[1] < furthest[2]:
            for _, _, _, _, tensor in (span, furthest):
                found[id(tensor)] = f"{span[3]} and {furthest[3]} are parameters of one memory"
        if furthest is None or span[0] != furthest[0] or span[2] > furthest[2]:
            furthest = span
    return found


def is_position(name: str) -> bool:
    """Is it a name that only says where in the optimizers a parameter stands?"""
    return re.fullmatch(r"optimizer\d+\.\d+\.\d+", name) is not None


def trained_by(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """All parameters of these optimizers."""
    return [p for opt in optimizers for group in opt.param_groups for p in group["params"]]


def take(model: torch.nn.Module | None, optimizers: Sequence[torch.optim.Optimizer], book: TraceBook) -> Inventory:
    """Name everything. ``model`` is the unwrapped module or None."""
    found = Inventory()
    trained = trained_by(optimizers)
    ids = {id(p) for p in trained}
    names: dict[int, str] = {}
    if model is not None:
        names = _model_names(model, ids, found)
    else:  # frozen parameters and buffers of the modules whose compiled graphs read one of our parameters
        for name, frozen in book.models.frozen(of=trained):
            if id(frozen) not in ids:
                found.frozen.setdefault(name, frozen)
        for name, buffer in book.models.buffers(of=trained):
            found.add_buffer(name, buffer, True)
        found.transient.update(book.models.transient(of=trained))
    taken = {*found.frozen, *found.buffers, *found.transient, *found.ties}
    for name, param in _optimizer_names(optimizers, names, book, found):
        if name in taken:
            raise SetupError(f"two tensors would be called {name!r}; pass model= so that names are unique")
        taken.add(name)
        found.trained[name] = param
        found.name_by_id[id(param)] = name
    return found


def _model_names(model: torch.nn.Module, trained: set[int], found: Inventory) -> dict[int, str]:
    """Names from the model; ties go to the first name. Returns the names of the trained parameters by identity."""
    first: dict[int, str] = {}
    walk = every_module(model)  # one: large models have thousands of modules, and this is asked at each checkpoint
    for name, param in named_parameters(model, walk):
        if id(param) in first:
            found.ties[name] = first[id(param)]
            continue
        first[id(param)] = name
        if id(param) not in trained:
            found.frozen[name] = param
    for name, buffer, persistent in named_buffers(model, walk):
        if id(buffer) in first:
            if persistent:
                found.ties[name] = first[id(buffer)]
            continue
        first[id(buffer)] = name
        found.add_buffer(name, buffer, persistent)
    _note_places(walk, found)
    return {i: name for i, name in first.items() if i in trained}


def _note_places(walk: Walk, found: Inventory) -> None:
    """Parameters that are spread are left out: FSDP2 keeps others in their places, from a forward to its backward."""
    named = {**found.frozen, **found.buffers, **found.transient}
    kept = places(walk) if named else {}
    for name, tensor in named.items():
        prefix, _, key = name.rpartition(".")
        within = kept[prefix][name not in found.frozen]
        if not (is_spread(tensor) and name in found.frozen) and (now := within[key]) is not None:
            found.places[name] = within, key, now


def _optimizer_names(
    optimizers: Sequence[torch.optim.Optimizer], names: dict[int, str], book: TraceBook, found: Inventory
) -> Iterator[tuple[str, torch.Tensor]]:
    """``(name, parameter)`` of every optimizer parameter once, by the first source that knows it and is not taken."""
    seen: set[int] = set()
    used: set[str] = {*found.frozen, *found.buffers}
    compiled: dict[int, str] | None = None  # what the compiler saw, made once and only if a name is missing
    for i, opt in enumerate(optimizers):
        for j, group in enumerate(opt.param_groups):
            given = group.get("param_names", [None] * len(group["params"]))
            for k, param in enumerate(group["params"]):
                if id(param) in seen:
                    continue
                seen.add(id(param))
                name = next((n for n in (names.get(id(param)), given[k]) if n and n not in used), None)
                if name is None:
                    compiled = book.models.names_by_id() if compiled is None else compiled
                    name = compiled.get(id(param))
                if name is None or name in used:
                    name, found.positional = f"optimizer{i}.{j}.{k}", True
                used.add(name)
                yield name, param
