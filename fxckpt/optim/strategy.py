"""How one step of an optimizer runs: what its own ``step`` does of it, and what the StepGraph does.

Every step has two parts, either of which may be empty. Its *own part* is the optimizer's own step, on all or some of its
parameters, once nothing is being copied: nothing guards copies inside it. Its *graph part* updates layer by layer, with fences
and emits in between. Which parameters are updated by which part depends on the optimizer, its state and the step's inputs, and
never on how the process came there: so a step after a restart is the same step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch

from fxckpt.compat.optimizers import stock_step

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

    def describe(self) -> str:
        """What runs a step, in a few words; empty while no state exists yet to tell."""


class WholeStep:
    """The strategy that splits nothing: the optimizer's own step, on all of its parameters."""

    def __init__(self, opt: torch.optim.Optimizer, whole: str | None = None):
        self.opt: torch.optim.Optimizer = opt
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

    def describe(self) -> str:
        """That it is whole, and why."""
        return whole_words(self.whole)


def whole_words(reason: str | None) -> str:
    """What a whole step is called in the log."""
    return f"its own step, whole ({reason}), then every layer is handed over"


def own_step(opt: torch.optim.Optimizer, closure: Closure | None) -> object:
    """The optimizer's own step, less the hooks; returns what it returns."""
    step = stock_step(opt)  # some take no closure at all
    return step(opt) if closure is None else step(opt, closure)


class EvaluatedClosure:
    """A closure whose first call was made before the step, and gave ``loss``."""

    def __init__(self, closure: Closure, loss: object):
        self.closure: Closure = closure
        self.first: list[object] = [loss]

    def __call__(self) -> object:
        return self.first.pop() if self.first else self.closure()
