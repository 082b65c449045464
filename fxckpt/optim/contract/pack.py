"""Turns what an optimizer holds in its attributes into nodes that a record can hold; ``unpack`` is the way back.

A node is a dict with one entry, its kind. Parameters, and tensors of the optimizer's state, which lie in files of their own,
become references; every other tensor goes into one list, once, whoever holds it. What is held a second time (``self.fast_state
= inner.state``) is not described again: it is restored in place, so both owners have it.
"""

from __future__ import annotations

import collections
import enum
import functools
import logging
import pathlib
import random
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from fxckpt.compat.loaders import is_stateful
from fxckpt.compat.optimizers import ATTRIBUTES_OF_TORCH, has_own_contract, is_stock
from fxckpt.errors import StateError
from fxckpt.store.typed_json import encode_state

Node = dict[str, Any]

MAX_DEPTH = 12
"""Objects nested deeper than this are no longer an optimizer's own."""

_ATOMS = (bool, int, float, str, type(None))

_FIXED = (
    types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type, functools.partial, logging.Logger,
    re.Pattern, pathlib.PurePath, weakref.ReferenceType, type(threading.Lock()), type(threading.RLock()),
)  # fmt: skip
"""Part of how an optimizer was made, not of how far it has come: whoever makes it anew gives it these."""

_FIXED_MODULES = ("torch._C", "torch.distributed", "torch.cuda", "torch.utils.hooks")
"""Where streams, events, process groups and handles of hooks come from."""

GENERATORS: Mapping[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    np.random.Generator: (lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, "state", state)),
    np.random.RandomState: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    random.Random: (lambda g: g.getstate(), lambda g, state: g.setstate(state)),
}
"""By type: what reads the state of a random generator, and what sets it."""


class Unstorable(Exception):
    """A value that no record can hold, where it is, and why."""

    def __init__(self, path: str, value: object, why: str = ""):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        super().__init__(f"a {kind} in {path}{why and f', {why}'}")


class Packer:
    """One look at one optimizer. ``tensors`` are those that nodes refer to by their place in it; ``made_of`` the paths of objects
    that a new process must have, too, with their classes.

    ``ours``: tensors that a checkpoint has elsewhere, by ``id``. ``known``: ``made_of`` of the start; objects that it lacks were
    made in training, and a new process has none to give their state to.
    """

    def __init__(self, opt: torch.optim.Optimizer, ours: Iterable[int] = (), known: Mapping[str, str] | None = None):
        self.tensors: list[torch.Tensor] = []
        self.made_of: dict[str, str] = {}
        self._opt, self._known = opt, known
        self._all = [p for group in opt.param_groups for p in group["params"]]
        self._params = {id(p): i for i, p in enumerate(self._all)}
        self._ours = {*ours, *self._params}
        self._seen: dict[int, object] = {}  # what was met, kept alive: an id is given again after its owner's death
        states = [opt.state[p] for p in self._all if p in opt.state]
        for each in (opt, opt.state, *states, opt.param_groups, *opt.param_groups, *(g["params"] for g in opt.param_groups)):
            self._meet(each)

    @functools.cached_property
    def _places(self) -> dict[object, Node]:
        """Tensors that have a node already, by where they lie; made only for those that hold any."""
        found: dict[object, Node] = {_place(p): {"data": i} for i, p in enumerate(self._all)}
        for i, param in enumerate(self._all):
            for key, value in self._opt.state[param].items() if param in self._opt.state else ():
                if isinstance(value, torch.Tensor) and type(key) is str:
                    found[_place(value)] = {"state": [i, key]}
        return found

    def _meet(self, value: object) -> bool:
        """Is this the first time?"""
        known = id(value) in self._seen
        self._seen[id(value)] = value
        return not known

    def attributes(self, opt: torch.optim.Optimizer, prefix: str = "", depth: int = 0) -> dict[str, Node]:
        """Those of an optimizer which are not torch's own. Where its class says itself what its state is, those that cannot be
        stored are its business; else raises Unstorable."""
        out = {}
        for name, value in vars(opt).items():
            if is_torchs_own(opt, name):
                continue
            try:
                node = self.pack(value, f"{prefix}{name}", depth)
            except Unstorable:
                if not has_own_contract(opt):
                    raise
                within = f"{prefix}{name}"
                self.made_of = {path: kind for path, kind in self.made_of.items() if not path.startswith(within)}
                node = {"fixed": None}
            out[name] = node
        return out

    def contract(self, opt: torch.optim.Optimizer) -> Node | None:
        """What ``state_dict()`` of its class gives, if that is not PyTorch's. Raises Unstorable."""
        if not has_own_contract(opt):
            return None
        given = dict(opt.state_dict())
        usual = {self._params.get(id(key), key): value for key, value in opt.state.items()}
        if usual_state := _same_objects(given.get("state"), usual):
            given["state"] = None  # as it is restored anyway: hundreds of parameters need not be listed
        return {"contract": [usual_state, self._data(given, "state_dict()")]}

    def _data(self, value: Any, path: str) -> Node:
        """What ``state_dict()`` gave: values alone, for nobody has the other objects in it."""
        before, self._seen = self._seen, {}
        try:
            return self.pack(value, path, objects=False)
        finally:
            self._seen = before

    def foreign(self, opt: torch.optim.Optimizer) -> Node:
        """The entries of ``opt.state`` that belong to no parameter."""
        found = {key: value for key, value in opt.state.items() if not isinstance(key, torch.Tensor)}
        return self._dict(found, "state", 0, True)

    def pack(self, value: Any, path: str, depth: int = 0, objects: bool = True) -> Node:
        """One value. Raises Unstorable."""
        if depth > MAX_DEPTH:
            raise Unstorable(path, value, "nested too deeply")
        if type(value) in _ATOMS:
            return {"id": self._params[value]} if type(value) is int and value in self._params else {"value": value}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, (dict, list, collections.deque)) and not self._meet(value) and objects:
            return {"same": None}
        if type(value) in (dict, list) and self._is_flat(value):
            return {"value": value}
        if isinstance(value, dict):
            return self._dict(value, path, depth, objects)
        if isinstance(value, (list, tuple, collections.deque)):
            kind = next(k for k in (list, tuple, collections.deque) if isinstance(value, k)).__name__
            return {kind: [self.pack(each, f"{path}[{i}]", depth + 1, objects) for i, each in enumerate(value)]}
        return self._object(value, path, depth) if objects else _plain(value, path)

    def _is_flat(self, value: dict | list) -> bool:
        """Does it hold numbers and text alone? Then it is described as a whole."""
        held = (*value.keys(), *value.values()) if isinstance(value, dict) else value
        return all(type(each) in _ATOMS and each not in self._params for each in held)

    def _dict(self, value: dict, path: str, depth: int, objects: bool) -> Node:
        """Its entries in their order; a key may be a parameter."""
        pack = functools.partial(self.pack, depth=depth + 1, objects=objects)
        return {"dict": [[pack(key, f"a key of {path}"), pack(each, f"{path}[{_name(key)}]")] for key, each in value.items()]}

    def _tensor(self, value: torch.Tensor, path: str) -> Node:
        if id(value) in self._params:
            return {"param": self._params[id(value)]}
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.device.type == "meta":
            raise Unstorable(path, value)
        if value.layout not in (torch.strided, torch.sparse_coo):
            raise Unstorable(path, value, f"whose layout is {value.layout}")
        place = _place(value)
        if place not in self._places:
            self._places[place] = {"tensor": len(self.tensors)}
            self.tensors.append(value)
        return self._places[place]

    def _object(self, value: Any, path: str, depth: int) -> Node:
        """Something with an identity: it is not made anew, but given its state back."""
        if isinstance(value, enum.Enum):
            return {"enum": value.name}
        if isinstance(value, _FIXED):
            return {"fixed": None}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        known = type(value) in GENERATORS or isinstance(value, (torch.nn.Module, torch.optim.Optimizer)) or is_stateful(value)
        if not known and kind.startswith(_FIXED_MODULES) and type(value) not in (torch.dtype, torch.device, torch.Size):
            return {"fixed": None}
        if not known and not hasattr(value, "__dict__"):
            return _plain(value, path)
        if not self._meet(value):
            return {"same": None}
        if isinstance(value, torch.nn.Module) and {id(t) for t in (*value.parameters(), *value.buffers())} <= self._ours:
            return {"fixed": None}  # the model, or a part of it
        if self._known is not None and self._known.get(path) != kind:
            raise Unstorable(path, value, "made in training, so that a resumed process has none to give its state to")
        self.made_of[path] = kind
        if isinstance(value, torch.optim.Optimizer):
            return {"optimizer": self.optimizer(value, path, depth)}
        if type(value) in GENERATORS:
            return {"generator": GENERATORS[type(value)][0](value)}
        if known:
            return {"state_dict": self._data(value.state_dict(), f"{path}.state_dict()")}
        return {"object": {k: self.pack(v, f"{path}.{k}", depth + 1) for k, v in vars(value).items()}}

    def optimizer(self, opt: torch.optim.Optimizer, path: str, depth: int) -> dict[str, Any]:
        """One that our optimizer holds: its state, the settings of groups that are not ours too, its attributes."""
        if any(id(p) not in self._params for group in opt.param_groups for p in group["params"]):
            raise Unstorable(path, opt, "which trains parameters that are in no group of the optimizer that holds it")
        groups = [self._settings(group, f"{path}.param_groups[{i}]", depth) for i, group in enumerate(opt.param_groups)]
        state = self.pack(opt.state, f"{path}.state", depth + 1)
        body = {"groups": groups, "state": state, "attributes": self.attributes(opt, f"{path}.", depth + 1)}
        return body | (self.contract(opt) or {})

    def _settings(self, group: dict[str, Any], path: str, depth: int) -> Node:
        if not self._meet(group):
            return {"same": None}
        return self._dict({k: v for k, v in group.items() if k not in ("params", "param_names")}, path, depth, True)


def is_torchs_own(opt: torch.optim.Optimizer, name: str) -> bool:
    """Is this attribute torch's or ours, and no state of the optimizer's class or user?"""
    return name in ATTRIBUTES_OF_TORCH or name.startswith("_fxckpt_") or (is_stock(opt) and name[0] == "_")


def _same_objects(a: Any, b: dict[Any, Any]) -> bool:
    return isinstance(a, dict) and list(a) == list(b) and all(a[k] is b[k] for k in a)


def _place(tensor: torch.Tensor) -> object:
    """What two tensors have in common that are one in memory."""
    if tensor.layout is not torch.strided or not tensor.numel() or tensor.device.type == "meta":
        return id(tensor)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _plain(value: Any, path: str) -> Node:
    """A value that typed JSON brings back. Raises Unstorable for others."""
    try:
        encode_state(value, {}, path)
    except StateError:
        raise Unstorable(path, value) from None
    return {"value": value}


def _name(key: object) -> str:
    """A dict's key, for a message."""
    return repr(key) if type(key) in _ATOMS else type(key).__name__
