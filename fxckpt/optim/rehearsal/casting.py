"""What a rehearsal found, put to use: parts with their programs for the executor, and what the step did in Python."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from fxckpt.compat.optimizers import plain_class
from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.trace import Signature
from fxckpt.optim.rehearsal import values
from fxckpt.optim.rehearsal.acting import Found, Role
from fxckpt.optim.rehearsal.parts import Part
from fxckpt.optim.rehearsal.stand_in import Hole, Items, Name, Ref, StandIn
from fxckpt.optim.scalar_group import ScalarGroup

log: logging.Logger = logging.getLogger("fxckpt")


class Cast(ScalarGroup):
    """A part with its program: the scalars of a step are those that its rehearsal found."""

    def __init__(self, index: int, part: Part, program: Program, role: Role):
        super().__init__(index, part.first, program)
        self.part: Part = part
        self.role: Role = role
        self.columns: dict[str, list[Any]] = {key: [m.state[key] for m in part.members] for key in role.counts}

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


def program_of(stand_in: StandIn, cls: type) -> Program:
    """Its tape as a body that runs on real tensors: ``body(parameter, gradient, *states, *scalars)``.

    It has no host part: the scalars are what the rehearsal of the step found.
    """
    tape, param = stand_in.tape(), stand_in.param
    graph, inputs = fx.Graph(), {}
    for name in dict.fromkeys([("param", None), ("grad", None), *_inputs(tape)]):
        inputs[name] = graph.placeholder(str(name[1] if name[0] == "state" else name[0]))
    holes = [graph.placeholder(f"scalar{i}") for i in range(sum(map(_count_holes, tape)))]
    left, made = iter(holes), list[fx.Node]()

    def decode(value: Any) -> Any:
        if isinstance(value, Ref):
            index, output = value.name
            if not isinstance(index, int):
                return inputs[value.name]
            return made[index] if output is None else graph.call_function(operator.getitem, (made[index], output))
        if isinstance(value, Hole):
            return next(left)
        if isinstance(value, Items):
            return [decode(v) for v in value.items]
        return value

    for op, out, _ in stand_in.noted:
        args = tuple(decode(a) for a in op.args)
        made.append(graph.call_function(op.target, args, {k: decode(v) for k, v in op.kwargs}))
        made[-1].meta["val"] = out
    graph.output(())
    graph.lint()
    nothing = fx.Graph()
    nothing.output(())
    root = torch.nn.Module()
    signature = Signature(cls, "rehearsed", (), (), (), param.dtype, str(param.device))
    return Program(
        signature,
        "each",
        fx.GraphModule(root, nothing, "Scalars"),
        fx.GraphModule(root, graph, "Update"),
        (),
        tuple(inputs),
        len(holes),
    )


def _inputs(value: Any) -> list[Name]:
    """Parameter, gradient and states that a tape reads, in order."""
    if isinstance(value, Ref):
        return [] if isinstance(value.name[0], int) else [value.name]
    return [name for v in value for name in _inputs(v)] if isinstance(value, tuple) else []


def _count_holes(value: Any) -> int:
    if isinstance(value, Hole):
        return 1
    return sum(map(_count_holes, value)) if isinstance(value, tuple) else 0
