"""The step that a backward begins: what is done before its first layer, and how ``opt.step()`` ends it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from fxckpt.errors import SetupError
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.executor import Executor
from fxckpt.optim.stepper import Stepper
from fxckpt.optim.strategy import SplitStep
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.begins import INSTEAD, Inside
from fxckpt.run.clock import RunStatus, Schedule, StepClock
from fxckpt.run.closing import Closing
from fxckpt.run.in_backward import InBackward
from fxckpt.saving.in_flight import InFlight


class Steps(Protocol):
    """What every step of a run goes through, wherever it is made; see ``Stepping``."""

    schedule: Schedule

    def attempt(self, opt: torch.optim.Optimizer) -> tuple[bool, bool]:
        """Does the step count, and may it begin a checkpoint?"""

    def before_step(self) -> None:
        """Close the step before this one."""

    def is_due(self, step: int) -> bool:
        """Is a checkpoint of this step to be begun?"""

    def begin(self, step: int) -> InFlight | None:
        """Begin it, if that can be."""

    def emit_rest(self, pending: InFlight, stepped: Stepper | None) -> None:
        """Emit what the step did not, and take what is captured at its end."""

    def left(self, stepper: Stepper, why: str) -> None:
        """A step was left in its middle."""

    def raise_callback_error(self) -> None:
        """Raise what ``on_layer`` raised."""


@dataclass(frozen=True)
class Opened:
    """A step that a backward began: does it count, and the checkpoint that was begun with it."""

    counts: bool
    pending: InFlight | None


class ArmedStep:
    """Begins a step where ``armed`` says that a backward may, and ends it. ``steps`` holds it, and is to be a weak reference."""

    def __init__(
        self,
        steps: Steps,
        arrangement: Arrangement,
        closing: Closing,
        clock: StepClock,
        status: RunStatus,
        layer: str | Callable[[str], str],
    ):
        self._steps, self._arrangement, self._closing, self._clock = steps, arrangement, closing, clock
        self._emitter = arrangement.emitter
        self._opened: Opened | None = None
        self.armed: InBackward = InBackward(arrangement, status, layer, weakref.proxy(self))

    def _inside(self) -> Inside:
        """Where the step is begun, or was: in the graph of a whole step, or in a backward."""
        return self.armed if self.armed.in_graph.now is None else self.armed.in_graph

    def under_way(self) -> bool:
        """Has a backward begun a step that ``opt.step()`` is to end?"""
        return self._opened is not None

    def ended(self) -> None:
        """A step is over that no backward began, or that it did."""
        self.armed.in_graph.ended()
        self.armed.ended()

    def leave(self, why: str) -> None:
        """If a backward began a step that nothing ended, it is left as by an exception in the middle of ``opt.step()``."""
        self.armed.in_graph.leave(why)
        self.armed.leave(why)

    def made_another_way(self) -> None:
        """A step came that is not through ``opt.step()``. Raises SetupError if it would make the rest of one."""
        self.leave("a step came another way than through opt.step()")
        self.armed.observe("its steps do not come through opt.step()")
        self.ended()
        self.armed.refuse_rest()

    def ends(self, stepper: Stepper, closure: Callable | None) -> bool:
        """``opt.step()`` is called: end the step that the backward began. False if it is to be made from the beginning."""
        inside = self._inside()
        if inside.open and not inside.complete:
            inside.leave("the backward was left by an exception")
        inside.refuse_rest()
        scaled = any(getattr(stepper.opt, name, None) is not None for name in ("grad_scale", "found_inf"))
        unusual = (
            "opt.step() was given a closure" if closure is not None else "a GradScaler scales the gradients" if scaled else None
        )
        try:
            if inside.open and unusual is not None:
                raise SetupError(f"{unusual}, when the backward had updated layers already. {INSTEAD}")
            updated = inside.consumed() if inside.open else {}
            inside.observe(unusual)
            if not inside.open:
                return False
            with torch.no_grad():
                self._finish(stepper, updated)
        except BaseException as error:
            inside.leave(f"opt.step() raised {type(error).__name__}")
            raise
        inside.ended()
        if self._emitter.callback_error is not None:
            self._steps.raise_callback_error()
        return True

    def begin(self, mask: list[bool]) -> list[torch.Tensor | None]:
        """Begin a step of these parameters inside the backward; a checkpoint with it, if one is due. The list that comes back is
        where each layer's gradients are put before it is updated."""
        [stepper] = self._arrangement.steppers
        strategy, emitter = stepper.strategy, self._emitter
        with self._closing.between_steps, torch.no_grad():
            self._emitter.saver.trainer.comes_by()
            self._closing.gradient_arrived(0)
            counts, begins = self._steps.attempt(stepper.opt) if self._clock.in_iteration else (True, True)
            self._steps.before_step()
            stepper.stepped = True
            step = self._clock.attempts + counts
            due, copying = begins and self._steps.is_due(step), emitter.engine.pending()
            if due:
                self._arrangement.look_for_names()
            self._arrangement.refresh(due or copying)
            emitter.look_for_changes(stepper.executor.arranged.numbers, self._arrangement.layout)
            pending = self._steps.begin(step) if due else None
            stepper.halfway = True
            self._opened = Opened(counts, pending)
            return strategy.begin(emitter.number if copying or pending is not None else None, mask)  # type: ignore[attr-defined]

    def _finish(self, stepper: Stepper, updated: Mapping[int, BoundParam]) -> None:
        """Update what the backward did not, and close the step."""
        opened, executor = self._opened, stepper.executor
        assert opened is not None
        if not self._update_waiting(executor, updated):
            if opened.pending is not None:
                opened.pending.replaced = self._steps.schedule.owed = True
                opened.pending.give_up("other parameters got gradients than in the step before")
                self._emitter.current, opened = None, Opened(opened.counts, None)
            self._emitter.fence_all()
            self._make_rest(stepper, updated)
        self._opened = None
        stepper.halfway = stepper.accumulated = False
        if opened.counts:
            self._clock.attempts += 1
            self._clock.applied.add()
        if opened.pending is not None:
            self._steps.emit_rest(opened.pending, stepper)

    @staticmethod
    def _update_waiting(executor: Executor, updated: Mapping[int, BoundParam]) -> bool:
        """Update the layers whose turn did not come in the backward; False, and nothing done, if other parameters got gradients
        than the step was begun for."""
        arranged, mask = executor.arranged, executor.prepared.made_for
        waiting = [m for m in arranged.members if m.index not in updated]
        present = [m.param.grad for m in waiting]
        if not all((g is not None) == mask[m.index] for m, g in zip(waiting, present)):  # type: ignore[index]
            return False
        if not all(g is None or g.layout is torch.strided for g in present):
            return False
        for member, gradient in zip(waiting, present):
            executor.gradients[member.index] = gradient
        for place, owned in enumerate(arranged.owned):
            if not any(m.index in updated for m in owned):
                executor.section(place)
        executor.end()
        return True

    def _make_rest(self, stepper: Stepper, updated: Mapping[int, BoundParam]) -> None:
        """Other parameters got gradients than this step was begun for: a step of its own for all that the backward left."""
        strategy, params = stepper.split, {id(m.param) for m in updated.values()}
        assert isinstance(strategy, SplitStep)
        strategy.take_back(updated)
        own = strategy.own_part(None)
        if own is not None:
            own()
            self._arrangement.refresh()
        strategy.run_others(params)

    def left(self, why: str) -> None:
        """The step that a backward began will not be ended."""
        self._opened = None
        [stepper] = self._arrangement.steppers
        self._steps.left(stepper, why)
