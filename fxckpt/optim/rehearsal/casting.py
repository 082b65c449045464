"""What a rehearsal found, put to use: parts with their programs for the executor, and what the step did in Python."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fxckpt.compat.optimizers import plain_class
from fxckpt.graph.update.hoist import Program
from fxckpt.optim.rehearsal import values
from fxckpt.optim.rehearsal.acting import Found, Role
from fxckpt.optim.rehearsal.parts import Part
from fxckpt.optim.rehearsal.program import program_of
from fxckpt.optim.scalar_group import ScalarGroup

log = logging.getLogger("fxckpt")


class Cast(ScalarGroup):
    """A part with its program: the scalars of a step are those that its rehearsal found."""

    def __init__(self, index: int, part: Part, program: Program, role: Role):
        super().__init__(index, part.first, program)
        self.part, self.role = part, role
        self.columns = {key: [m.state[key] for m in part.members] for key in role.counts}

    def scalars(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Advance the counts of all members; returns this step's numbers."""
        for key, column in self.columns.items():
            torch._foreach_copy_(column, [self.role.counts[key]] * len(column))
        return tuple(self.role.scalars)


class Casting:
    """The casts of one optimizer, and their programs by what was noted."""

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt
        self.programs: dict[object, Program] = {}
        self._casts: list[Cast] = []

    def casts(self, parts: Sequence[Part], found: Found) -> list[Cast]:
        """The parts that take part, with their programs; the same list as long as nothing but numbers changes."""
        present = [(part, self._program(part, role), role) for part, role in zip(parts, found.roles) if part.present]
        kept = [(cast.part, cast.program) for cast in self._casts]
        if len(kept) != len(present) or any(a is not c or b is not d for (a, b), (c, d, _) in zip(kept, present)):
            self._casts = [Cast(index, *each) for index, each in enumerate(present)]
        for cast, (_, _, role) in zip(self._casts, present):
            cast.role = role
        return self._casts

    def _program(self, part: Part, role: Role) -> Program:
        key = role.tape, part.first.param.dtype, part.first.param.device
        if key not in self.programs:
            found = self.programs[key] = program_of(part.stand_in, plain_class(self.opt))
            log.debug(
                "noted %s (%s): %d operators, %d scalars, inputs %s",
                plain_class(self.opt).__name__,
                part.first.param.dtype,
                len(role.tape),
                found.scalars,
                found.inputs,
            )
        return self.programs[key]

    def take_over(self, parts: Sequence[Part], found: Found) -> None:
        """What the step did in Python, in the optimizer's own groups and states."""
        for group, changed in zip(self.opt.param_groups, found.groups):
            for key, value in changed.items():
                values.assign(group, key, value)
        for part, role in zip(parts, found.roles):
            for key, value in role.plain.items():
                if part.plain[key] is not value:
                    part.plain[key] = value
                    for member in part.members:
                        member.state[key] = value
