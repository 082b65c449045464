"""Runs an optimizer's own step on a copy of it that holds stand-ins, and tells what it did."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxckpt.compat.optimizers import inner_hooks, plain_class
from fxckpt.compat.tracing import watched
from fxckpt.graph.update.trace import MakesState, NotTraceable
from fxckpt.optim.held import HeldWeakly
from fxckpt.optim.rehearsal import effects, values
from fxckpt.optim.rehearsal.parts import Part, plain_value
from fxckpt.optim.rehearsal.recorder import Recorder
from fxckpt.optim.rehearsal.stand_in import Tape
from fxckpt.optim.strategy import own_step

_OURS = {"state", "param_groups", "step", "_fxckpt_run", "grad_scale", "found_inf"}


@dataclass
class Role:
    """What the stand-in of a part did in one rehearsal."""

    part: Part
    tape: Tape
    scalars: list[Any]
    plain: dict[str, Any]  # the values of its state that are no tensors
    counts: dict[str, torch.Tensor]


@dataclass
class Found:
    """What one rehearsal showed."""

    roles: list[Role]
    groups: list[dict[str, Any]]  # the entries of each group that changed
    by_shape: bool


class Stage:
    """Where one optimizer's step is rehearsed."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt

    @functools.cached_property
    def _reach(self) -> effects.Reach:
        return effects.reach(self.opt)

    def act(self, parts: Sequence[Part], closure: bool, guarded: bool) -> Found:
        """Run the step for these parts, each played by its stand-in. Raises NotTraceable. ``closure``: call it with one.
        ``guarded``: look whether anything outside changes."""
        reach = self._reach
        clone, attributes = self._clone()
        counts = [{key: t.clone() for key, t in part.first.counts()} for part in parts]
        states = [
            {k: copies.get(k, part.stand_in.tensors.get(k, v)) for k, v in part.first.state.items()}
            for part, copies in zip(parts, counts)
        ]
        clone.param_groups = groups = self._groups(parts)
        clone.state = collections.defaultdict(dict)
        clone.state.update({p.stand_in.param: dict(s) for p, s in zip(parts, states) if p.first.param in self.opt.state})
        recorder = Recorder([part.stand_in for part in parts])
        for part, copies in zip(parts, counts):
            part.stand_in.begin()
            recorder.host |= {id(tensor): (tensor, part.stand_in) for tensor in copies.values()}
        with effects.none_outside(self.opt, reach) if guarded else contextlib.nullcontext():
            _run(clone, recorder, closure)
        now = _attributes(clone)
        changed = [k for k in attributes | now if k not in attributes or k not in now or not values.same(attributes[k], now[k])]
        if changed:  # a checkpoint holds none of them
            raise NotTraceable(f"it changes its attribute {changed[0]!r}")
        roles = [_role(clone, part, state, copies) for part, state, copies in zip(parts, states, counts)]
        return Found(roles, self._changed(groups), recorder.peeked or recorder.sized)

    def _clone(self) -> tuple[Any, dict[str, Any]]:
        """A copy of the optimizer without groups and state, and the attributes that it must have afterwards."""
        if inner_hooks(self.opt):
            raise NotTraceable("hooks are registered, which a step inside its step would call")
        kept, memo = _attributes(self.opt), dict[int, Any]()
        identities = {id(p) for group in self.opt.param_groups for p in group["params"]}
        for name, value in kept.items():
            values.refuse_objects(name, value, identities)
        clone: Any = object.__new__(plain_class(self.opt))
        vars(clone).update({k: values.copy(v, memo) for k, v in kept.items()})
        vars(clone).update({k: collections.OrderedDict() for k in vars(self.opt) if k.startswith("_optimizer_")})
        return clone, kept

    def _groups(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """Copies of the parameter groups, with stand-ins for parameters."""
        memo: dict[int, Any] = {}
        groups = [{k: values.copy(v, memo) for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        for index, group in enumerate(groups):
            group["params"] = [part.stand_in.param for part in parts if part.first.group == index]
            if "param_names" in group:
                group["param_names"] = [group["param_names"][part.position] for part in parts if part.first.group == index]
        return groups

    def _changed(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of each group that the step changed. Raises NotTraceable for what no record could hold."""
        out = []
        for before, after in zip(self.opt.param_groups, groups):
            if gone := [k for k in before if k not in after]:
                raise NotTraceable(f"it removes {gone[0]!r} from its parameter group")
            changed = {k: v for k, v in after.items() if k not in before or not values.same(before[k], v)}
            out.append({k: v for k, v in changed.items() if k not in ("params", "param_names")})
            if strange := [k for k, v in out[-1].items() if not values.is_plain(v)]:
                raise NotTraceable(f"it keeps a {type(after[strange[0]]).__name__} in its parameter group ({strange[0]!r})")
        return out


def _run(clone: Any, recorder: Recorder, with_closure: bool) -> None:
    """The step, watched. Raises NotTraceable, too, unless it calls its closure just once, before the first operator."""
    calls, loss = 0, torch.zeros(()) if with_closure else None

    def closure() -> torch.Tensor | None:
        nonlocal calls
        calls += 1
        if recorder.operators:
            raise NotTraceable("it calls its closure after it has begun to update")
        if not torch.is_grad_enabled():
            raise NotTraceable("it calls its closure without gradients")
        return loss

    try:
        with watched(recorder.called, recorder.dispatched):
            returned = own_step(clone, closure if with_closure else None)
    except NotTraceable:
        raise
    except Exception as error:  # whatever the optimizer's own code does with a stand-in
        said = (str(error).strip().splitlines() or [""])[0]
        if "dynamo-optimized function" in said:
            raise NotTraceable("it calls a function that torch.compile made") from error
        raise recorder.refusal or NotTraceable(f"{type(error).__name__}: {said[:160]}") from error
    if recorder.refusal is not None:
        raise recorder.refusal
    if with_closure and calls != 1:
        raise NotTraceable(f"it called its closure {calls} times")
    if returned is not loss:
        raise NotTraceable("it returns something else than the closure's loss")


def _attributes(opt: Any) -> dict[str, Any]:
    """An optimizer's attributes, less groups, state and hooks."""
    return {k: v for k, v in vars(opt).items() if k not in _OURS and not k.startswith("_optimizer_")}


def _role(clone: Any, part: Part, before: dict[str, Any], counts: dict[str, torch.Tensor]) -> Role:
    """What one stand-in did. Raises MakesState or NotTraceable where its state is not what it was made of."""
    after = dict(clone.state.get(part.stand_in.param, {}))
    if list(after) != list(before):
        raise MakesState(f"its step makes state {sorted(map(str, set(after) ^ set(before)))}")
    plain = {}
    for key, value in after.items():
        if not isinstance(before[key], torch.Tensor) and not isinstance(value, torch.Tensor):
            plain[key] = plain_value(key, value)
        elif value is not before[key]:
            raise NotTraceable(f"it replaces its state {key!r}")
    noted = part.stand_in.tape()
    if not part.present and (noted or not values.same(plain, part.plain)):
        raise NotTraceable("it changes parameters that have no gradient")
    return Role(part, noted, part.stand_in.scalars, plain, counts)
