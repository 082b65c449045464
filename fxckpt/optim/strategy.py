"""How one step of an optimizer runs: what its own ``step`` does of it, and what the StepGraph does.

Every step has two parts, either of which may be empty. Its *own part* is the optimizer's own step, on all or some of its
parameters, once nothing is being copied: nothing guards copies inside it. Its *graph part* updates layer by layer, with fences
and emits in between. Optimizer, state and inputs decide which parameters are in which part, and never how the process came
there: so a step after a restart is the same step.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from fxckpt.compat import cuda
from fxckpt.compat.optimizers import stock_step
from fxckpt.compat.spread import local_gradient
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.calls import ScalarGroup
from fxckpt.optim.executor import Executor
from fxckpt.optim.held import HeldWeakly
from fxckpt.optim.programs import ProgramCache

log: logging.Logger = logging.getLogger("fxckpt")

_gradient_of = operator.attrgetter("grad")
"""For ``map``: what runs for each parameter at every step runs at C speed."""

_DENSE = {torch.strided, None}

Closure = Callable[[], object]
"""What ``opt.step(closure)`` is given: it evaluates the model again, and returns the loss."""

OwnPart = Callable[[], object]
"""The own part of a step, ready to run; returns what the optimizer's ``step`` returns."""


class Strategy(Protocol):
    """One way to run the steps of an optimizer."""

    @property
    def whole(self) -> str | None:
        """Why all steps have no graph part; None if some have one, or may have."""

    def calls_closure_first(self) -> bool:
        """May the closure be called before the coming step begins? Else the own part takes it."""

    def own_part(self, closure: Closure | None) -> OwnPart | None:
        """What the coming step leaves to the optimizer's own ``step``; None, most often, if nothing."""

    def run(self, number: int | None) -> bool:
        """The graph part, with the ops of run ``number``; or, when it is None, in as few calls as update all layers at once.
        Returns whether there was one: else nothing was emitted."""

    def abandon(self) -> None:
        """The step was left by an exception: keep nothing of it."""

    def describe(self) -> str:
        """What runs a step, in a few words; empty while no state exists yet to tell."""


class WholeStep:
    """The strategy that splits nothing: the optimizer's own step, on all of its parameters."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer, whole: str | None = None):
        self.opt = opt
        self.whole: str | None = whole

    def calls_closure_first(self) -> bool:
        """The optimizer calls it, when and as often as it likes."""
        return False

    def own_part(self, closure: Closure | None) -> OwnPart:
        """All of the step."""
        return functools.partial(own_step, self.opt, closure)

    def run(self, number: int | None) -> bool:
        """Nothing is left to update."""
        return False

    def abandon(self) -> None:
        """Nothing was kept."""

    def describe(self) -> str:
        """That it is whole, and why."""
        return f"its own step, whole ({self.whole}), then every layer is handed over"


class SplitStep:
    """The strategy for classes of ``torch.optim`` that can be traced: their own step for parameters that have no state yet or a
    sparse gradient, the StepGraph for all others."""

    whole = None

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer, programs: ProgramCache, executor: Executor):
        self.opt = opt
        self.programs: ProgramCache = programs
        self.executor: Executor = executor
        self._gradients: list[torch.Tensor | None] = []  # of all parameters; not kept over an own part
        self._complete = False  # none of them is missing, as far as is known
        self._done: set[int] = set()  # parameters that the own part of this step updated
        self._before: list[list[torch.Tensor]] = []  # the counts that a step in sections began with, by group

    def calls_closure_first(self) -> bool:
        """Those of ``torch.optim`` whose step is split call it once, before all else."""
        return True

    def own_part(self, closure: Closure | None) -> OwnPart | None:
        """The optimizer's own step, on the parameters whose state it must make or whose gradient is sparse."""
        arranged, self._done = self.executor.arranged, set()
        gradients = self._gradients = self._read_gradients()
        layouts = set(map(getattr, gradients, itertools.repeat("layout"), itertools.repeat(None)))
        self._complete = None not in layouts
        if layouts <= _DENSE and not self.programs.missing:
            return None
        present = [(m, grad) for m, grad in zip(arranged.members, gradients) if grad is not None]
        chosen = [m for m, grad in present if m.program is None or grad.layout != torch.strided]
        if not chosen:
            return None
        self._gradients, self._complete = [], False
        return functools.partial(self._step_of, chosen, closure)

    @property
    def given(self) -> list[torch.Tensor | None]:
        """The gradients that the step which is about to run is given, one for each parameter; none where an own part has run."""
        return self._gradients

    def _read_gradients(self) -> list[torch.Tensor | None]:
        """Those of all parameters; of DTensors this rank's part."""
        arranged = self.executor.arranged
        found = list(map(_gradient_of, arranged.params))
        return list(map(local_gradient, found, arranged.params)) if arranged.spread else found

    def _step_of(self, members: Sequence[BoundParam], closure: Closure | None) -> object:
        """The optimizer's own step on these parameters alone; they are left out of this step's graph part."""
        reason = "which have no state yet or no dense gradient"
        log.debug("the stock step updates %d parameters, %s: %s ...", len(members), reason, members[0].name)
        chosen = {id(m.param) for m in members}
        groups = self.opt.param_groups
        saved = [g["params"] for g in groups]
        try:
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) in chosen]
            loss = own_step(self.opt, closure)
        finally:
            for group, params in zip(groups, saved):
                group["params"] = params
        self._done = chosen
        return loss

    def run(self, number: int | None) -> bool:
        """Update everything that has a gradient and was not updated by the own part; most steps find the calls of the step
        before."""
        executor, done = self.executor, self._done
        gradients, self._gradients = self._gradients or self._read_gradients(), []
        mask = [True] * len(gradients) if self._complete else [g is not None for g in gradients]
        if done:
            mask = [present and id(p) not in done for present, p in zip(mask, executor.arranged.params)]
        self.prepare_for(mask)
        executor.run(number, gradients)
        return True

    def prepare_for(self, mask: list[bool]) -> None:
        """Have the calls of a step of these parameters: those of the step before, unless that was another one."""
        executor, prepared, groups = self.executor, self.executor.prepared, self.opt.param_groups
        holds = mask == prepared.made_for and executor.untouched()
        if not holds or (prepared.branching and not all(group.holds(groups[group.group]) for group in prepared.branching)):
            self._prepare(mask)

    def begin(self, number: int | None, mask: list[bool]) -> list[torch.Tensor | None]:
        """Begin a step of these parameters whose layers are updated one by one, by ``executor.section``. The list that comes back
        is where it reads their gradients; ``number`` as in ``run``."""
        self.prepare_for(mask)
        self._before = [[t.clone() for t in group.representative] for group in self.executor.prepared.groups]
        gradients: list[torch.Tensor | None] = [None] * len(mask)
        self.executor.begin(number, gradients)
        return gradients

    def take_back(self, updated: Collection[int]) -> None:
        """A step was begun, and other parameters have gradients than it was begun for: those that are not ``updated`` (by index)
        get their counts back, for a step of their own. Nothing may be copied meanwhile."""
        self.executor.end()
        members = self.executor.arranged.members
        waiting = {id(t) for m in members if m.index not in updated for t in m.state.values()}
        for group, before in zip(self.executor.prepared.groups, self._before):
            for value, first, column in zip(before, group.representative, group.others):
                for count in (first, *column):
                    if id(count) in waiting:
                        count.copy_(value)

    def run_others(self, updated: set[int]) -> None:
        """The rest of such a step: for all but these (by ``id``) and those that the own part updated."""
        self._done = self._done | updated
        self._gradients, self._complete = [], False
        self.run(None)

    def _prepare(self, mask: list[bool]) -> None:
        """Have the calls for these parameters, put together by their group, program and counts."""
        members = [m for m, present in zip(self.executor.arranged.members, mask) if present]
        programs = [self.programs.follow(member) for member in members]
        values = cuda.count_values([[m.state[key] for key in program.counts] for m, program in zip(members, programs)])
        groups: dict[object, ScalarGroup] = {}
        group_of: dict[int, ScalarGroup] = {}
        for member, program, counts in zip(members, programs, values):
            key = (member.group, program.key, counts)
            if key in groups:
                groups[key].add(member)
            else:
                groups[key] = ScalarGroup(len(groups), member, program)
            group_of[member.index] = groups[key]
        self.executor.prepare(mask, group_of)

    def abandon(self) -> None:
        """Whoever drops the gradients has their memory back."""
        self._gradients, self._complete = [], False
        self.executor.end()

    def describe(self) -> str:
        """Which kernels update the layers."""
        members, layers = self.executor.arranged.members, self.executor.arranged.graph.layers
        kinds = sorted({"Inductor" if m.flat else f"native {m.implementation}" for m in members if m.program is not None})
        return f"{' and '.join(kinds)}, {len(layers)} layers" if kinds else ""


def own_step(opt: torch.optim.Optimizer, closure: Closure | None) -> object:
    """The optimizer's own step, less the hooks; returns what it returns."""
    step = stock_step(opt)  # some take no closure at all
    if isinstance(closure, Arguments):
        return step(opt, *closure.positional, **closure.named)
    return step(opt) if closure is None else step(opt, closure)


class Arguments:
    """What ``opt.step()`` was given, where that is more than a closure. It goes the closure's way, and its step runs whole: only
    the class knows what it is for."""

    def __init__(self, positional: tuple[object, ...], named: dict[str, object]):
        self.positional: tuple[object, ...] = positional
        self.named: dict[str, object] = named

    def __call__(self) -> object:
        raise TypeError("arguments of a step, not a closure")


class EvaluatedClosure:
    """A closure whose first call was made before the step, and gave ``loss``."""

    def __init__(self, closure: Closure, loss: object):
        self.closure: Closure = closure
        self.first: list[object] = [loss]

    def __call__(self) -> object:
        return self.first.pop() if self.first else self.closure()
