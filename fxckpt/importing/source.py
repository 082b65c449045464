"""What an import begins with, whatever it comes from: tensors by name, optimizers' states, and what cannot be taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxckpt.errors import SetupError
from fxckpt.store.dtypes import OF_TORCH, PARTS, item_size, raw_tensor

PIECE = 16 << 20
"""Bytes read at a time."""

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Types that one may be made of another; torch's names."""

KNOWN = frozenset(OF_TORCH.values())
"""safetensors' names of the types that a checkpoint's tensors may have."""


@dataclass(frozen=True)
class Stored:
    """A tensor that can be written: safetensors' type and its shape (a complex one as pairs of reals); ``pieces`` gives its
    bytes, row-major, each time that it is called."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[memoryview]]
    is_complex: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * item_size(self.dtype)


@dataclass
class Source:
    """All that was found. ``modules``: extra state of modules, by name; ``optimizers``: state dicts as torch has them, whose
    tensors are ``Stored``; ``config``: text of config.json; ``left_out``: why something is not taken, by its name."""

    format: str
    model: dict[str, Stored] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    config: str | None = None
    step: int | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """One entry of a model's state dict. Raises SetupError for a tensor that no checkpoint can hold."""
        if isinstance(value, Stored):
            self.model[name] = value
        elif is_tensor(value):
            self.model[name] = of_torch(value, name)
        elif name.rpartition(".")[2] == "_extra_state":
            self.modules[name.rpartition(".")[0]] = value
        else:
            self.left_out[name] = f"of type {type(value).__name__}, no tensor"


def is_tensor(value: Any) -> bool:
    """Is it torch's? Asked without torch where nothing has imported it."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "untyped_storage")


def of_torch(tensor: Any, name: str) -> Stored:
    """A torch tensor, which is kept until it is written. Raises SetupError, by name, for what no file of tensors can hold."""
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.device.type == "meta" or kind not in {**OF_TORCH, **PARTS}:
        what = f"a {type(tensor).__name__} of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise SetupError(f"cannot import {name!r}, {what}: only dense tensors of plain number types can be stored")
    is_complex = kind in PARTS
    shape = (*tensor.shape, 2) if is_complex else tuple(tensor.shape)
    return Stored(PARTS.get(kind) or OF_TORCH[kind], shape, lambda: [raw_tensor(tensor.detach()).data], is_complex)


def later(size: Iterable[int], dtype: Any, name: str, read: Callable[[], Any]) -> Stored:
    """A torch tensor that is read only when it is written, so that no two are in memory."""
    import torch

    found = of_torch(torch.empty(()).to(dtype).expand(tuple(size)), name)

    def pieces() -> Iterator[memoryview]:
        yield from of_torch(read(), name).pieces()

    return Stored(found.dtype, found.shape, pieces, found.is_complex)


def cast(stored: Stored, dtype: Any) -> Stored:
    """The same with its elements made another of torch's floating types; whole numbers and complex ones stay as they are."""
    import torch

    if stored.dtype not in FLOATS or stored.is_complex or FLOATS[stored.dtype] == str(dtype).removeprefix("torch."):
        return stored
    before, kind = getattr(torch, FLOATS[stored.dtype]), str(dtype).removeprefix("torch.")

    def pieces() -> Iterator[memoryview]:
        for piece in stored.pieces():
            for at in range(0, piece.nbytes, PIECE):
                part = torch.frombuffer(bytearray(piece[at : at + PIECE]), dtype=torch.uint8).view(before)
                yield raw_tensor(part.to(dtype)).data

    return Stored(OF_TORCH[kind], stored.shape, pieces)


def flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a state dict, those of nested ones with a dot between: several models in one dict."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name.rpartition(".")[2] != "_extra_state":
            yield from flat(value, f"{name}.")
        else:
            yield name, value


def plain_names(source: Source) -> None:
    """Take out of the names what wrappers put there: ``_orig_mod.`` of torch.compile anywhere, and ``module.`` of
    DistributedDataParallel in front of all."""
    wrapped = bool(source.model) and all(name.startswith("module.") for name in source.model)

    def plain(name: str) -> str:
        return name.removeprefix("module." if wrapped else "").replace("_orig_mod.", "")

    names = {name: plain(name) for name in source.model}
    if len(set(names.values())) != len(names):
        return  # two models, one of them compiled: their names are as they are
    source.model = {plain(name): value for name, value in source.model.items()}
    source.modules = {plain(f"{name}.").rstrip("."): value for name, value in source.modules.items()}
    for each in source.optimizers:
        each["state"] = {plain(k) if isinstance(k, str) else k: value for k, value in each["state"].items()}
        for group in each["param_groups"]:
            for key in ("params", "param_names"):
                group[key] = [plain(k) if isinstance(k, str) else k for k in group[key]] if key in group else group.get(key)
