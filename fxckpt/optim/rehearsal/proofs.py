"""Shows that a step may be split: each parameter acts as its part does, and the bits are those of the optimizer's own step."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch

from fxckpt.graph.update.trace import MakesState, NotTraceable
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.calls import Inputs, calls_for
from fxckpt.optim.held import HeldWeakly
from fxckpt.optim.rehearsal import values
from fxckpt.optim.rehearsal.acting import Found, Stage
from fxckpt.optim.rehearsal.casting import Cast
from fxckpt.optim.rehearsal.parts import Partition, alone

PROOFS = 2
"""Steps in which programs are compared with the optimizer's own step before they take its place."""

MOST = 64
"""Tapes that one optimizer may have. More come from a step that never does the same again, and each is compared anew."""


class Proofs:
    """What was compared so far: each tape, alone in its group or beside a part that does the same, and each parameter."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt
        self.done: collections.Counter[object] = collections.Counter()  # steps in which a situation was compared
        self._compared: set[int] = set()  # parameters that took part

    def any(self) -> bool:
        """Was some step proven?"""
        return any(count >= PROOFS for count in self.done.values())

    def hold(self, found: Found) -> bool:
        """Was all of this step proven? Raises NotTraceable for a step that does something else every time."""
        if _params(found) <= self._compared and all(self.done[each] >= PROOFS for each in _situations(found)):
            return True
        if len(self.done) > MOST:
            raise NotTraceable(f"it asked for {len(self.done)} different sequences of operators")
        return False

    def add(self, found: Found) -> int:
        """This step had the right bits; returns how often the least proven situation of it was compared."""
        self._compared |= _params(found)
        self.done.update(situations := _situations(found))
        return min(self.done[each] for each in situations)

    def foresee(self, found: Found, casts: Sequence[Cast]) -> list[Any]:
        """Digests of everything after the step, by the programs, on copies: one member at a time, for its memory."""
        scalars = [tuple(cast.role.scalars) for cast in casts]
        after: dict[int, list[Any]] = {}
        with torch.no_grad():
            for cast in casts:
                for member in cast.members:
                    twin = _twin(member)
                    for key, count in cast.role.counts.items():
                        twin.state[key].copy_(count)
                    twin.state.update(cast.role.plain)
                    gradients = [None] * twin.index + [twin.param.grad]
                    for call in calls_for([twin], {twin.index: cast}):
                        call(Inputs(scalars, gradients))
                    after[member.index] = _digests(twin)
        groups = [
            {k: values.copy(v, {}) for k, v in {**g, **c}.items() if k != "params"}
            for g, c in zip(self.opt.param_groups, found.groups)
        ]
        return [*(after.get(m.index) or _digests(m) for role in found.roles for m in role.part.members), groups]

    def observe(self, found: Found) -> list[Any]:
        """The same of what lies there now."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.opt.param_groups]
        return [*(_digests(m) for role in found.roles for m in role.part.members), groups]


def _params(found: Found) -> set[int]:
    """The ids of the parameters that take part."""
    return {id(m.param) for role in found.roles if role.part.present for m in role.part.members}


def _situations(found: Found) -> set[object]:
    """What has to be proven for this step."""
    used = collections.Counter((role.part.first.group, role.tape) for role in found.roles if role.part.present)
    return {(noted, count > 1) for (_, noted), count in used.items()}


def compare_all(stage: Stage, partition: Partition, found: Found, closure: bool) -> None:
    """Rehearse with a stand-in for each parameter, and two at least for each part. Raises NotTraceable if one of them does
    something else than its part's, or if something changes that no step may change."""
    everyone = sorted(((m, role) for role in found.roles for m in role.part.members), key=lambda each: each[0].index)
    twice = [id(role) for role in found.roles if role.part.present and len(role.part.members) == 1]
    players = [(alone(m, role.part), role) for m, role in everyone for _ in range(1 + (id(role) in twice))]
    all_of_them = stage.act([player for player, _ in players], closure, guarded=True)
    if all_of_them.by_shape and not partition.by_shape:
        partition.by_shape = True
        raise MakesState("")  # this step runs whole; the next one is rehearsed by shape
    if not values.same(all_of_them.groups, found.groups):
        raise NotTraceable("what it keeps in its parameter group depends on how many parameters there are")
    for (_, role), other in zip(players, all_of_them.roles):
        if other.tape != role.tape or not values.same(values.numbers(other.scalars), values.numbers(role.scalars)):
            raise NotTraceable("it treats parameters differently that look alike")
        after, expected = ((r.plain, values.numbers(r.counts.values())) for r in (other, role))
        if not values.same(after, expected):
            raise NotTraceable("it counts steps differently for parameters that look alike")


def _twin(member: BoundParam) -> BoundParam:
    """A member with copies of its tensors."""
    param = member.param.detach().clone()
    param.grad = None if member.param.grad is None else member.param.grad.detach().clone()
    state = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in member.state.items()}
    return BoundParam(member.name, param, member.group, member.index, state)


def _digests(member: BoundParam) -> list[Any]:
    """Parameter, gradient, and state by key: what a step leaves behind."""
    grad = member.param.grad
    state = {k: values.digest(v) if isinstance(v, torch.Tensor) else v for k, v in member.state.items()}
    return [values.digest(member.param), None if grad is None else values.digest(grad), state]
