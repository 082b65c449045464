"""Values of an optimizer's groups, states and attributes: copies, comparisons to the bit, and what a copy may share."""

from __future__ import annotations

import collections
import enum
import hashlib
import logging
import types
from typing import Any

import torch

from fxckpt.graph.update.trace import NotTraceable

ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_FIXED = (*ATOMS, type, types.ModuleType, types.BuiltinFunctionType, logging.Logger, enum.Enum, torch.Tensor)
CONTAINERS = (list, tuple, dict, set, frozenset, collections.OrderedDict, collections.defaultdict, collections.deque)


def copy(value: Any, memo: dict[int, Any]) -> Any:
    """Copies of containers, the rest as it is; what is one object stays one object."""
    if type(value) not in CONTAINERS or type(value) in (tuple, frozenset):
        return tuple(copy(v, memo) for v in value) if type(value) is tuple else value
    if id(value) not in memo:
        made = memo[id(value)] = value.copy()
        if isinstance(made, dict):
            made.update({k: copy(v, memo) for k, v in value.items()})
        elif not isinstance(made, set):
            made.clear()
            made.extend(copy(v, memo) for v in value)
    return memo[id(value)]


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, containers element by element; NaN equals NaN, tensors and objects only themselves."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return bool(a.hex() == b.hex())
    return isinstance(a, (*ATOMS, set, frozenset, type(range(0)))) and bool(a == b)


def is_plain(value: Any) -> bool:
    """Can a record hold it?"""
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def refuse_objects(name: str, value: Any, parameters: set[int]) -> None:
    """Raises NotTraceable for an attribute that a copy of the optimizer would share, and its step might change, and for one
    that names parameters (``parameters``: their ``id``), since stand-ins have another identity."""
    if type(value) in CONTAINERS:
        for each in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            refuse_objects(name, each, parameters)
        return
    if id(value) in parameters or (type(value) is int and value in parameters):
        raise NotTraceable(f"it knows its parameters by identity (attribute {name!r})")
    if isinstance(value, types.FunctionType):
        if value.__closure__ is None:
            return
    elif isinstance(value, _FIXED):
        return
    raise NotTraceable(f"it keeps a {type(value).__name__} in its attribute {name!r}, which its step might change")


def numbers(scalars: Any) -> list[Any]:
    """Scalars that can be compared: tensors by type and bits."""
    return [(str(s.dtype), digest(s)) if isinstance(s, torch.Tensor) else s for s in scalars]


def digest(tensor: torch.Tensor) -> bytes:
    """Of its exact bits, in row-major order."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()


def assign(group: dict[str, Any], key: str, value: Any) -> None:
    """Give an entry its new value; a list or dict stays the same object, since others may hold it too."""
    current = group.get(key)
    if isinstance(current, list) and type(current) is type(value):
        current[:] = value
    elif isinstance(current, dict) and type(current) is type(value):
        current.clear()
        current.update(value)
    else:
        group[key] = value
