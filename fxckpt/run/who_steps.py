"""Which optimizers of a run step in an iteration, and in which order: observed between boundaries, else as they are listed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fxckpt.errors import SetupError
from fxckpt.optim.stepper import Stepper
from fxckpt.run.clock import StepClock

log: logging.Logger = logging.getLogger("fxckpt")

_PATIENCE = 10  # steps of others without one of the leading optimizer, before somebody is told that no checkpoint is taken


class WhoSteps:
    """Says of each attempt whether it counts as a step of the run, and whether it is likely the last one before the boundary.

    In a loop of ``fxckpt.steps``, ``epochs`` or ``batches`` an iteration has as many steps as the optimizer that steps most often
    in it, and its last attempt is expected where the iteration before it had it. In a loop without boundaries the last optimizer
    of the list leads: its steps count, and end an iteration.
    """

    def __init__(self, steppers: Sequence[Stepper], clock: StepClock):
        self._index = {id(stepper.opt): i for i, stepper in enumerate(steppers)}
        self._steppers, self._clock = steppers, clock
        self._leader = steppers[-1]
        self._now: list[int] = []  # the optimizers that stepped in this iteration, in order
        self._before: list[int] = []  # in the one before
        self._counted = 0  # how many attempts of this iteration counted
        self._alone = 0  # steps of others since the leader's last one
        self._said = False

    def attempt(self, opt: torch.optim.Optimizer) -> tuple[bool, bool]:
        """One more attempt: does it count, and does a checkpoint that is due begin here?"""
        if not self._clock.in_iteration:
            leads = opt is self._leader.opt
            if len(self._steppers) > 1:
                self._check_order(self._steppers[self._index[id(opt)]], leads)
            return leads, leads
        self._now.append(index := self._index[id(opt)])
        if counts := self._now.count(index) > self._counted:
            self._counted += 1
        return counts, self._now == self._before

    def iteration_ended(self) -> bool:
        """Did anybody step in it?"""
        found, self._now, self._counted = self._now, [], 0
        if found:
            self._before = found
        return bool(found)

    def _check_order(self, stepper: Stepper, leads: bool) -> None:
        """In a loop without boundaries: does the optimizer that leads step after the others? Raises SetupError if another one
        steps for the first time behind it, before a new gradient has reached the leader: a checkpoint would mix two steps."""
        name, leader = type(stepper.opt).__name__, type(self._leader.opt).__name__
        way_out = "Loop with fxckpt.steps, fxckpt.epochs or fxckpt.batches, where any order is right"
        if leads:
            self._alone = 0
            return
        self._alone += 1
        if not stepper.stepped and 0 < self._clock.attempts <= 2 and not self._leader.accumulated:
            raise SetupError(
                f"the last optimizer of the list, the {leader}, stepped before the {name}: without a boundary, a checkpoint is "
                f"taken at its step, and would mix two steps. {way_out}, or put the optimizer that steps last at the list's end."
            )
        if self._alone == _PATIENCE and not self._said:
            self._said = True
            log.warning(
                "fxckpt: no checkpoint is taken: without a boundary, that is done at the step of the list's last optimizer, "
                f"and the {leader} has not made one while others made {_PATIENCE}. {way_out}"
            )
