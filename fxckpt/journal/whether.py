"""Whether a run has a journal, and how many steps lie between its full checkpoints, until something forbids it: said once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fxckpt.journal.length import Trial, choose, describe
from fxckpt.journal.machine import Where
from fxckpt.journal.repeatable import WAY_OUT, why_not, why_not_now, why_not_there
from fxckpt.journal.shown import Shown
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.landing import Landing

log: logging.Logger = logging.getLogger("fxckpt")

_PATIENCE = 3  # checkpoints in a row that could not be records, before somebody is told
_DISAGREED = 3  # times that ranks did not agree whether a step is a record, with none between, before there is no journal


class Whether:
    """``steps``: from one full checkpoint to the next, 1: no journal. ``trial``: they are to be chosen, and so many until then.
    ``together``: how many ranks write the store. ``shown``: what steps on a device have shown of themselves."""

    def __init__(self, steps: int, steppers: Sequence[Stepper], where: Where, shown: Shown, trial: Trial | None, together: int):
        self.steps: int = steps
        self.trial: Trial | None = trial
        self._steppers, self._where, self._shown, self._together = steppers, where, shown, together
        self._off: str | None = None
        self._said: set[str] = set()
        self._refused = 0  # checkpoints in a row that could not be records
        self._under_way: list[tuple[Landing, bool]] = []  # that may not have ended, and which of them are records
        self._disagreed = 0  # see ``_DISAGREED``

    def start(self) -> None:
        """Say at once what will not be journalled."""
        if self.steps > 1:
            off = why_not(self._steppers, self._where.given(), self._together)
            if self.trial is not None and self._together > 1:
                off = 'journal="auto" goes by what each rank measures, and all need the same number'
            if off is not None:
                self._turn_off(off)

    @property
    def length(self) -> int:
        """Steps from one full checkpoint to the next."""
        return self.steps if self._off is None else 1

    def _turn_off(self, why: str) -> None:
        """Each step is a full checkpoint from here on."""
        self._off, self.trial = why, None
        self._say(why)

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.warning("fxckpt: no journal: %s; %s", why, WAY_OUT)

    def why_not(self, index: int, gradients: Sequence[torch.Tensor | None]) -> str | None:
        """Why the coming step of this optimizer is in no record. On a device it may be made twice, to show what comes of it."""
        stepper = self._steppers[index]
        why = why_not_now(stepper, gradients, self._together)
        why = why or why_not_there(self._steppers, self._where.now(), self._together)
        if why is None and (device := self._where.device()) is not None:
            self._shown.begins(index, gradients, device)
            if self._shown.refused is not None:
                self._turn_off(self._shown.refused)
        return why

    def refused(self, why: str | None) -> None:
        """A checkpoint comes whose steps are in no record for this reason, or None: said where it is so again and again."""
        self._refused = 0 if why is None else self._refused + 1
        if why is not None and self._refused >= _PATIENCE:
            self._say(why)

    def disagreed(self) -> bool:
        """Is there no journal any more, since the ranks take other steps for records, again and again?"""
        for landing, is_record in self._under_way:
            if landing.unlike:
                self._disagreed += 1
            elif is_record and landing.generation is not None:
                self._disagreed = 0
        self._under_way = [each for each in self._under_way if each[0].generation is None and not each[0].failed]
        if self._disagreed < _DISAGREED:
            return False
        self._turn_off("the ranks do not agree on which steps can be records of it")
        return True

    def taken(self, pending: InFlight) -> None:
        """This one was taken. Chooses how many steps there are to be, once it can be known."""
        is_record = pending.link is not None
        if self._together > 1:
            self._under_way.append((pending.landing, is_record))
        if self.trial is None:
            return
        self.trial.taken(pending.landing, is_record)
        if (found := self.trial.measured()) is not None:
            choice = choose(found, self.trial.restore_seconds)
            self.steps, self.trial = choice.steps, None
            log.info("fxckpt: %s", describe(found, choice))
