"""Plain values in ``extra=``: what a script keeps in a dict, a list or an object of fields, taken out and put back in place."""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fxckpt.compat.loaders import is_stateful
from fxckpt.data.generators import GENERATORS, entry, kind_of, new_of, packed, read, write
from fxckpt.errors import LayoutMismatch, StateError
from fxckpt.store.typed_json import MAX_DEPTH

_OBJECT, _FIELDS = "\0object", "\0fields"
"""How an object of fields is written, as a dict: by the name of its class, and what its fields hold."""

_GENERATOR, _STATEFUL = "\0generator", "\0state_dict"
"""Stand where the name of a class does: for a random generator, and for an object that takes its own state back."""

_KNOWN = ("builtins", "collections", "numpy", "torch")  # where the types are from that are stored as they are, or said to be none

_CONTAINERS = (dict, list, deque, set, bytearray)


def is_plain(value: Any) -> bool:
    """Is it something to change in place whose values say all of it?"""
    return isinstance(value, (*_CONTAINERS, np.ndarray, torch.Tensor)) or _has_fields(value)


def _has_fields(value: Any) -> bool:
    """A dataclass instance or a ``SimpleNamespace``."""
    return isinstance(value, types.SimpleNamespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def take_out(value: Any, path: str, depth: int = 0) -> Any:
    """What ``encode_state`` can store of it: objects of fields as dicts that say so, everything else as it is. Raises StateError,
    with the path, for an object that a new process could not make again."""
    if depth > MAX_DEPTH:
        raise StateError(f"{path}: nested more than {MAX_DEPTH} levels deep, or it contains itself")
    if isinstance(value, GENERATORS):
        return {_OBJECT: _GENERATOR, _FIELDS: entry(value, packed(read(value)))}
    if is_stateful(value):
        _refuse_inside(value, path)
        return {_OBJECT: _STATEFUL, _FIELDS: {"state": value.state_dict()}}
    if _has_fields(value) or _is_namedtuple(type(value)):
        fields = {name: take_out(each, f"{path}.{name}", depth + 1) for name, each in _fields(value).items()}
        if depth and type(value) is not types.SimpleNamespace and _class(_name(type(value))) is not type(value):
            raise StateError(
                f"{path}: a {type(value).__qualname__} inside of a container, which a new process has to make again, and cannot: "
                "define that class at the top of its module"
            )
        return {_OBJECT: _name(type(value)), _FIELDS: fields}
    if type(value) in (list, deque, tuple):
        taken = [take_out(each, f"{path}[{at}]", depth + 1) for at, each in enumerate(value)]
        return deque(taken, value.maxlen) if isinstance(value, deque) else type(value)(taken)
    if isinstance(value, dict):
        if _OBJECT in value:
            raise StateError(f"{path}: a dict with the key {_OBJECT!r}, which stands for an object here")
        made = value.copy()  # of its own type, with its order and its default
        for key, each in value.items():
            made[key] = take_out(each, f"{path}[{key!r}]", depth + 1)
        return made
    if hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _KNOWN and not isinstance(value, enum.Enum):
        kind = type(value).__qualname__
        raise StateError(
            f"{path}: a {kind} cannot be stored without pickle. Put vars(...) of it there, or give it state_dict() and "
            "load_state_dict()"
        )
    return value


def _refuse_inside(value: Any, path: str) -> None:
    """Raises StateError for an object with a state that has no place inside of a container."""
    if isinstance(value, torch.amp.GradScaler):
        raise StateError(f"{path}: name the GradScaler itself in extra=, as what it skips is counted")
    if isinstance(value, torch.utils.data.DataLoader):
        raise StateError(f"{path}: a loader's place is kept by `for x in fxckpt.batches(loader)`; leave it out here")


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple)


def _fields(value: Any) -> dict[str, Any]:
    """Of a dataclass its fields and whatever else was set on it; some have no ``__dict__``."""
    if _is_namedtuple(type(value)):
        return dict(zip(value._fields, value))
    named = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    return {**{name: getattr(value, name) for name in named if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> type | None:
    """The class of objects with fields that a loaded module has by this name. Nothing is imported, and none other is taken."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    known = isinstance(found, type) and (
        dataclasses.is_dataclass(found) or found is types.SimpleNamespace or _is_namedtuple(found)
    )
    return found if known else None


def put_back(live: Any, saved: Any, path: str) -> Any:
    """``live`` with the values of ``saved``, changed in place if it can be; else what is to take its place. Raises LayoutMismatch
    for an object whose class this process does not have."""
    if isinstance(saved, dict) and _OBJECT in saved:
        return _put_fields(live, saved[_OBJECT], saved[_FIELDS], path)
    if isinstance(saved, dict) and type(live) is type(saved):
        before = dict(live)
        live.clear()
        for key, each in saved.items():
            live[key] = put_back(before.get(key), each, f"{path}[{key!r}]")
        return live
    if isinstance(saved, (list, deque, tuple)):
        old = list(live) if isinstance(live, type(saved)) else []
        made = [put_back(old[at] if at < len(old) else None, each, f"{path}[{at}]") for at, each in enumerate(saved)]
        return _refilled(live, saved, made)
    if isinstance(saved, dict):
        new = saved.copy()
        for key, each in saved.items():
            new[key] = put_back(None, each, f"{path}[{key!r}]")
        return new
    return _refilled(live, saved, saved)


def _refilled(live: Any, saved: Any, made: Any) -> Any:
    """``live`` holding what was ``made`` of ``saved``, if it is of its kind and can change; else a new one."""
    if isinstance(saved, torch.Tensor):
        if isinstance(live, torch.Tensor) and (live.shape, live.dtype, live.layout) == (saved.shape, saved.dtype, saved.layout):
            with torch.no_grad():
                return live.copy_(saved)
        return saved
    if isinstance(saved, np.ndarray):
        if isinstance(live, np.ndarray) and (live.shape, live.dtype) == (saved.shape, saved.dtype) and live.flags.writeable:
            live[...] = saved
            return live
        return saved
    if type(live) is type(saved):
        if isinstance(live, (list, bytearray)):
            live[:] = made
            return live
        if isinstance(live, deque) and live.maxlen == saved.maxlen:
            live.clear()
            live.extend(made)
            return live
        if isinstance(live, set):
            live.clear()
            live.update(made)
            return live
    if isinstance(saved, deque):
        return deque(made, saved.maxlen)
    return type(saved)(made) if isinstance(saved, (list, tuple)) else made


def _put_fields(live: Any, name: str, saved: Mapping[str, Any], path: str) -> Any:
    """An object with these fields: the live one if it is of that class, else a new one. No code of the class runs."""
    if name == _STATEFUL:
        return _put_state(live, saved, path)
    if name == _GENERATOR:
        made = live if isinstance(live, GENERATORS) and kind_of(live) == saved["kind"] else new_of(saved["kind"])
        write(made, saved["state"])
        return made
    if (kind := _class(name)) is not None and _is_namedtuple(kind):
        return _new_tuple(kind, live, saved, path)
    if _name(type(live)) != name or not _has_fields(live):
        if kind is None:
            raise LayoutMismatch(
                f"{path} was a {name.replace(':', '.')}, and this process has no such class: define or import it"
            )
        live = _new(kind)
    elif is_frozen(live):
        old, live = live, _new(type(live))
        vars(live).update(_fields(old)) if hasattr(live, "__dict__") else None
    for gone in set(getattr(live, "__dict__", {})) - set(saved):
        object.__delattr__(live, gone)
    for field, value in saved.items():
        object.__setattr__(live, field, put_back(getattr(live, field, None), value, f"{path}.{field}"))
    return live


def _put_state(live: Any, saved: Mapping[str, Any], path: str) -> Any:
    """An object that takes its own state back, where there is one. Raises LayoutMismatch where there is none."""
    if not is_stateful(live):
        raise LayoutMismatch(
            f"{path} had a state_dict(), and this process has no such object there, which a load cannot make: have it there "
            "before the load, or keep plain values"
        )
    live.load_state_dict(saved["state"])
    return live


def _new_tuple(kind: Any, live: Any, saved: Mapping[str, Any], path: str) -> Any:
    """A namedtuple; what the live one holds is changed in place, if it can be. Raises LayoutMismatch for one of other fields."""
    if set(kind._fields) != set(saved):
        raise LayoutMismatch(f"{path}: {kind.__qualname__} had the fields {list(saved)}, and has {list(kind._fields)} now")
    old = live if type(live) is kind else None
    return tuple.__new__(kind, [put_back(getattr(old, name, None), saved[name], f"{path}.{name}") for name in kind._fields])


def _new(kind: Any) -> Any:
    """An object of this class, without its ``__init__``."""
    return kind.__new__(kind)


def is_frozen(value: Any) -> bool:
    """Is it a dataclass whose instances do not change?"""
    return dataclasses.is_dataclass(value) and getattr(type(value), "__dataclass_params__").frozen  # noqa: B009 (mypy knows it not)


def replaces(live: Any, saved: Any) -> str | None:
    """Why ``live``, an entry of ``extra=`` itself, cannot become ``saved`` in place; None if it can."""
    if isinstance(saved, dict) and _OBJECT in saved:
        kind = saved[_OBJECT].replace(":", ".")
        return None if _name(type(live)) == saved[_OBJECT] else f"checkpoint {kind}, live {type(live).__name__}"
    if isinstance(saved, (torch.Tensor, np.ndarray)) and isinstance(live, type(saved)):
        if (tuple(live.shape), live.dtype) == (tuple(saved.shape), saved.dtype):
            return None
        return f"checkpoint {saved.dtype}{list(saved.shape)}, live {live.dtype}{list(live.shape)}"
    if type(live) is not type(saved) or _has_fields(live):
        return f"checkpoint {type(saved).__name__}, live {type(live).__name__}"
    return (
        f"maxlen: checkpoint {saved.maxlen}, live {live.maxlen}"
        if getattr(saved, "maxlen", 0) != getattr(live, "maxlen", 0)
        else None
    )
