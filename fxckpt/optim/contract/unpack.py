"""Gives an optimizer back what ``pack`` found: in place, so that whoever else holds a list, a tensor or an object has it, too."""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxckpt.compat.optimizers import has_own_contract, plain_class
from fxckpt.errors import LayoutMismatch
from fxckpt.optim.contract.pack import GENERATORS, Node


class Unpacker:
    """One restoration. ``opt`` is the optimizer, its state and groups restored already; ``tensors`` those that nodes refer to."""

    def __init__(self, opt: torch.optim.Optimizer, tensors: Sequence[torch.Tensor]):
        self.opt: torch.optim.Optimizer = opt
        self.tensors: Sequence[torch.Tensor] = tensors
        self._params = [p for group in opt.param_groups for p in group["params"]]

    def unpack(self, node: Node, live: Any = None) -> Any:
        """The value; ``live``, brought up to date, where that can be."""
        [(kind, body)] = node.items()
        if live is None and kind in ("optimizer", "generator", "state_dict", "object"):
            raise LayoutMismatch(f"{plain_class(self.opt).__name__}: the checkpoint has an object that is not there ({kind})")
        return _UNPACK[kind](self, body, live)

    def entries(self, live: dict[Any, Any], pairs: Sequence[Sequence[Node]]) -> None:
        """Bring these up to date, and leave others."""
        for key, node in pairs:
            name = self.unpack(key)
            live[name] = self.unpack(node, live.get(name))

    def attributes(self, owner: Any, nodes: Mapping[str, Node]) -> None:
        """Set those that are not as they should be: of some, only the values in them."""
        for name, node in nodes.items():
            before = vars(owner).get(name)
            if (after := self.unpack(node, before)) is not before or name not in vars(owner):
                vars(owner)[name] = after

    def contract(self, opt: torch.optim.Optimizer, usual_state: bool, node: Node) -> None:
        """Have the class take its own ``state_dict``. Raises LayoutMismatch if it does not."""
        if not has_own_contract(opt):
            return
        given = self.unpack(node)
        if usual_state:
            number = {id(p): i for i, p in enumerate(p for group in opt.param_groups for p in group["params"])}
            given["state"] = {number.get(id(key), key): value for key, value in opt.state.items()}
        try:
            plain_class(opt).load_state_dict(opt, given)
        except Exception as error:
            name = plain_class(opt).__name__
            what = f"{name}.load_state_dict() did not take what {name}.state_dict() gave when the checkpoint was taken"
            raise LayoutMismatch(f"{what}: {type(error).__name__}: {error}") from error

    def optimizer(self, body: Mapping[str, Any], live: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """One that our optimizer holds: what its class does with its contract first, what is exact after that."""
        for again in (False, True) if "contract" in body else (True,):
            self.unpack(body["state"], live.state)
            for group, node in zip(live.param_groups, body["groups"]):
                self.entries(group, node.get("dict", ()))
            if not again:
                self.contract(live, *body["contract"])
        self.attributes(live, body["attributes"])
        return live

    def _value(self, body: Any, live: Any) -> Any:
        """A container stays the one that others may have, too."""
        if isinstance(live, dict) and type(body) is dict:
            live.clear()
            live.update(body)
            return live
        if type(live) is list and type(body) is list:
            live[:] = body
            return live
        return body

    def _dict(self, pairs: Sequence[Sequence[Node]], live: Any) -> dict[Any, Any]:
        if not isinstance(live, dict):
            return {self.unpack(key): self.unpack(node) for key, node in pairs}
        now = [(name := self.unpack(key), self.unpack(node, live.get(name))) for key, node in pairs]
        live.clear()
        live.update(now)
        return live

    def _list(self, nodes: Sequence[Node], live: Any, make: Callable[[list[Any]], Any] = list) -> Any:
        before = list(live) if isinstance(live, (list, tuple, collections.deque)) else []
        now = [self.unpack(node, before[i] if i < len(before) else None) for i, node in enumerate(nodes)]
        if make is tuple:
            return type(live)(*now) if hasattr(live, "_fields") and len(before) == len(now) else tuple(now)
        if isinstance(live, (list, collections.deque)):
            live.clear()
            live.extend(now)
            return live
        return make(now)

    def _state_dict(self, node: Node, live: Any) -> Any:
        live.load_state_dict(self.unpack(node))
        return live

    def _generator(self, state: Any, live: Any) -> Any:
        GENERATORS[type(live)][1](live, state)
        return live

    def _object(self, nodes: Mapping[str, Node], live: Any) -> Any:
        self.attributes(live, nodes)
        return live


@torch.no_grad()
def _fill(live: Any, value: torch.Tensor) -> torch.Tensor:
    """The live tensor with this value, or the value if it is not one like it."""
    if not isinstance(live, torch.Tensor) or value.layout is not torch.strided or live.layout is not torch.strided:
        return value
    if (live.shape, live.dtype, live.device) != (value.shape, value.dtype, value.device):
        return value
    return live.copy_(value)


_UNPACK: Mapping[str, Callable[[Unpacker, Any, Any], Any]] = {
    "value": Unpacker._value,
    "same": lambda self, body, live: live,
    "fixed": lambda self, body, live: live,
    "param": lambda self, body, live: self._params[body],
    "data": lambda self, body, live: self._params[body].detach(),
    "id": lambda self, body, live: id(self._params[body]),
    "state": lambda self, body, live: self.opt.state[self._params[body[0]]][body[1]],
    "tensor": lambda self, body, live: _fill(live, self.tensors[body]),
    "dict": Unpacker._dict,
    "list": Unpacker._list,
    "tuple": lambda self, body, live: self._list(body, live, tuple),
    "deque": lambda self, body, live: self._list(body, live, collections.deque),
    "enum": lambda self, body, live: type(live)[body] if isinstance(live, enum.Enum) else live,
    "generator": Unpacker._generator,
    "state_dict": Unpacker._state_dict,
    "object": Unpacker._object,
    "optimizer": lambda self, body, live: self.optimizer(body, live),
}  # fmt: skip
"""By the kind of a node: what it stands for, given what is there."""


def is_node(value: Any, params: int, tensors: int) -> bool:
    """Is it a node as ``pack`` makes them, that names none but the first so many parameters and tensors?"""
    if type(value) is not dict or len(value) != 1:
        return False
    [(kind, body)] = value.items()
    return kind in _CHECK and _CHECK[kind](body, params, tensors)


def is_optimizer(value: Any, params: int, tensors: int) -> bool:
    """The same for what is said of a whole optimizer."""
    if type(value) is not dict or not {"groups", "state", "attributes"} <= set(value) <= {*_OPTIMIZER}:
        return False
    return all(_OPTIMIZER[key](body, params, tensors) for key, body in value.items())


def _below(kind: str) -> Callable[[Any, int, int], bool]:
    return lambda body, params, tensors: type(body) is int and 0 <= body < (tensors if kind == "tensor" else params)


def _nodes(body: Any, params: int, tensors: int) -> bool:
    return type(body) is list and all(is_node(each, params, tensors) for each in body)


def _pairs(body: Any, params: int, tensors: int) -> bool:
    return type(body) is list and all(_nodes(pair, params, tensors) and len(pair) == 2 for pair in body)


def _named(body: Any, params: int, tensors: int) -> bool:
    return type(body) is dict and all(type(k) is str and is_node(v, params, tensors) for k, v in body.items())


def _state(body: Any, params: int, tensors: int) -> bool:
    return type(body) is list and len(body) == 2 and _below("param")(body[0], params, tensors) and type(body[1]) is str


def _contract(body: Any, params: int, tensors: int) -> bool:
    whole = type(body) is list and len(body) == 2 and type(body[0]) is bool and is_node(body[1], params, tensors)
    return whole and ("dict" in body[1] or type(body[1].get("value")) is dict)


def _anything(body: Any, params: int, tensors: int) -> bool:
    return True


_CHECK: Mapping[str, Callable[[Any, int, int], bool]] = {
    **dict.fromkeys(("value", "generator", "same", "fixed"), _anything),
    **{kind: _below(kind) for kind in ("param", "data", "id", "tensor")},
    **dict.fromkeys(("list", "tuple", "deque"), _nodes),
    "state": _state, "dict": _pairs, "enum": lambda body, *_: type(body) is str, "state_dict": is_node, "object": _named,
    "optimizer": is_optimizer,
}  # fmt: skip
_OPTIMIZER = {"groups": _nodes, "state": is_node, "attributes": _named, "contract": _contract}
