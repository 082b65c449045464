"""Puts parameters together whose update is the same code with the same numbers: one stand-in acts for all of them."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxckpt.compat import cuda
from fxckpt.graph.update.trace import NotTraceable, is_count
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.held import HeldWeakly
from fxckpt.optim.rehearsal import values
from fxckpt.optim.rehearsal.stand_in import StandIn

Mask = Sequence[Any]
"""What is seen of each parameter's gradient; None where it has none."""


@dataclass
class Part:
    """Parameters of one group that are alike; those of an absent part have no gradient in this step, and are there because the
    step's code may look."""

    members: list[BoundParam]
    position: int  # of its first member among the group's parameters
    present: bool
    stand_in: StandIn
    plain: dict[str, Any]  # of the first member's state what is no tensor, as it was set last

    @property
    def first(self) -> BoundParam:
        """Whose counts and shapes stand for all."""
        return self.members[0]


class Partition:
    """The parts of one optimizer, kept while nothing that decides them changes."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt
        self.by_shape = False  # a part must not hold parameters of different shapes
        self._members: Sequence[BoundParam] = ()
        self._mask: Mask = ()
        self._parts: list[Part] = []
        self._stand_ins: dict[object, list[StandIn]] = {}

    def of(self, members: Sequence[BoundParam], mask: Mask, same: bool) -> list[Part]:
        """The parts of these parameters. ``same``: no count was changed by anything but our own steps since the last call."""
        kept = same and members is self._members and mask == self._mask
        if not kept or any(m.state[key] is not v for p in self._parts for key, v in p.plain.items() for m in p.members):
            self._parts = self._made(members, mask)
            self._members, self._mask = members, mask
        return self._parts

    def _made(self, members: Sequence[BoundParam], mask: Mask) -> list[Part]:
        """Raises NotTraceable where one stand-in cannot act for several parameters."""
        if extra := [k for k in self.opt.state if not isinstance(k, torch.Tensor)]:
            raise NotTraceable(f"it keeps state {extra[0]!r} that belongs to no parameter")
        _refuse_aliases(members)
        counts = cuda.count_values([[t for _, t in m.counts()] for m in members])
        parts: dict[object, Part] = {}
        places: collections.Counter[int] = collections.Counter()
        used: collections.Counter[object] = collections.Counter()
        for member, seen, counted in zip(members, mask, counts):
            key = (member.group, self._kind(member), counted) if seen is not None else (member.group,)
            if key in parts:
                parts[key].members.append(member)
            else:
                looks = _looks(member, seen is not None)
                free, used[looks] = self._stand_ins.setdefault(looks, []), used[looks] + 1
                if len(free) < used[looks]:
                    free.append(new_stand_in(member, seen is not None))
                parts[key] = Part([member], places[member.group], seen is not None, free[used[looks] - 1], plain_state(member))
            places[member.group] += 1
        return list(parts.values())

    def _kind(self, member: BoundParam) -> tuple[Any, ...]:
        """Two members of one kind may be one part: what the step's code can see of them is the same."""
        plain = tuple((key, type(value), value) for key, value in plain_state(member).items())
        return plain, _looks(member, True) if self.by_shape else _types(member)


def alone(member: BoundParam, part: Part) -> Part:
    """A part of this one member of ``part``, with a new stand-in."""
    return Part([member], part.position, part.present, new_stand_in(member, part.present), plain_state(member))


def new_stand_in(member: BoundParam, present: bool) -> StandIn:
    """A new stand-in of this member. Raises NotTraceable for tensors that are not plain ones."""
    counts = dict(member.counts())
    for tensor in (member.param, *(t for _, t, _ in member.items)):
        if tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise NotTraceable(f"it updates a {type(tensor).__name__} of layout {tensor.layout}")
    grad = member.param.grad if member.param.grad is not None else member.param
    return StandIn(member.param, grad if present else None, {k: t for k, t, _ in member.items if k not in counts})


def plain_state(member: BoundParam) -> dict[str, Any]:
    """The state that is no tensor. Raises NotTraceable for what may change in place."""
    return {k: plain_value(k, v) for k, v in member.state.items() if not isinstance(v, torch.Tensor)}


def plain_value(key: str, value: Any) -> Any:
    """``value``, if it cannot change in place; else raises NotTraceable."""
    if isinstance(value, values.ATOMS) or (type(value) is tuple and all(isinstance(v, values.ATOMS) for v in value)):
        return value
    raise NotTraceable(f"its state {key!r} is a {type(value).__name__}")


def _refuse_aliases(members: Sequence[BoundParam]) -> None:
    """Raises NotTraceable for tensors that are the same memory: no two stand-ins are."""
    tensors = [t for m in members for t in (m.param, m.param.grad, *(t for _, t, _ in m.items)) if t is not None and t.numel()]
    if len({t.data_ptr() for t in tensors}) != len(tensors):
        raise NotTraceable("two of its tensors, states or gradients, are the same memory")


def _types(member: BoundParam) -> tuple[Any, ...]:
    """All that the step's code can see of a member but shapes and values."""
    grad, param = member.param.grad, member.param
    states = tuple((k, t.dtype, str(t.device), t.requires_grad, is_count(k, t, param), t.dim() == 0) for k, t, _ in member.items)
    seen = param.dtype, str(param.device), param.requires_grad, param.dim() == 0, None if grad is None else grad.dtype
    return *seen, tuple(member.state), states


def _looks(member: BoundParam, present: bool) -> tuple[Any, ...]:
    """All that a stand-in is made of."""
    grad = member.param.grad if present else None
    tensors = [t for t in (member.param, grad, *(t for _, t, _ in member.items)) if t is not None]
    return (*_types(member), present, *((tuple(t.shape), t.stride()) for t in tensors))
