"""What a rehearsal found, put to use: parts with their programs for the executor, and what the step did in Python."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from fxckpt.compat.optimizers import plain_class
from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.trace import Signature
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.calls import ScalarGroup
from fxckpt.optim.held import HeldWeakly
from fxckpt.optim.rehearsal import values
from fxckpt.optim.rehearsal.acting import Found, Role
from fxckpt.optim.rehearsal.stand_in import Hole, Ref, StandIn

log: logging.Logger = logging.getLogger("fxckpt")


class Cast(ScalarGroup):
    """A part with its program: the scalars of a step are those that its rehearsal found."""

    def __init__(self, index: int, role: Role, program: Program):
        super().__init__(index, role.part.first, program)
        self.role: Role = role
        self.members: list[BoundParam] = role.part.members
        self.columns: dict[str, list[Any]] = {key: [m.state[key] for m in self.members] for key in role.counts}

    def scalars(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Advance the counts of all members; returns this step's numbers."""
        for key, column in self.columns.items():
            torch._foreach_copy_(column, [self.role.counts[key]] * len(column))
        return tuple(self.role.scalars)


class Casting:
    """The casts of one optimizer, and their programs by what was noted."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt
        self.programs: dict[object, Program] = {}
        self._casts: list[Cast] = []

    def casts(self, found: Found) -> list[Cast]:
        """The parts that take part, with their programs; the same list as long as nothing but numbers changes."""
        present = [(role, self._program(role)) for role in found.roles if role.part.present]
        kept = [(id(cast.members), id(cast.program)) for cast in self._casts]
        if kept != [(id(role.part.members), id(program)) for role, program in present]:
            self._casts = [Cast(index, *each) for index, each in enumerate(present)]
        for cast, (role, _) in zip(self._casts, present):
            cast.role = role
        return self._casts

    def _program(self, role: Role) -> Program:
        param = role.part.first.param
        key = role.tape, param.dtype, param.device
        if key not in self.programs:
            self.programs[key] = program_of(role.part.stand_in, plain_class(self.opt))
            log.debug("noted %s: %d operators on %s", plain_class(self.opt).__name__, len(role.tape), self.programs[key].inputs)
        return self.programs[key]

    def take_over(self, found: Found) -> None:
        """What the step did in Python, in the optimizer's own groups and states."""
        for group, changed in zip(self.opt.param_groups, found.groups):
            for key, value in changed.items():
                values.assign(group, key, value)
        for role in found.roles:
            for key, value in role.plain.items():
                if role.part.plain[key] is not value:
                    role.part.plain[key] = value
                    for member in role.part.members:
                        member.state[key] = value


def program_of(stand_in: StandIn, cls: type) -> Program:
    """Its tape as a body that runs on real tensors: ``body(parameter, gradient, *states, *scalars)``. It has no host part: the
    scalars are what the rehearsal of the step found."""
    graph, param = fx.Graph(), stand_in.param
    leaves = list(_leaves(stand_in.tape()))
    read = [leaf.name for leaf in leaves if isinstance(leaf, Ref) and not isinstance(leaf.name[0], int)]
    names = dict.fromkeys([("param", None), ("grad", None), *read])
    inputs = {name: graph.placeholder(str(name[1] if name[0] == "state" else name[0])) for name in names}
    holes = [graph.placeholder(f"scalar{i}") for i in range(sum(isinstance(leaf, Hole) for leaf in leaves))]
    left, made = iter(holes), list[fx.Node]()

    def decode(value: Any) -> Any:
        if isinstance(value, Ref):
            index, output = value.name
            if not isinstance(index, int):
                return inputs[value.name]
            return made[index] if output is None else graph.call_function(operator.getitem, (made[index], output))
        if isinstance(value, Hole):
            return next(left)
        return [decode(v) for v in value] if isinstance(value, tuple) else value

    for op, out, _ in stand_in.noted:
        args = tuple(decode(a) for a in op.args)
        made.append(graph.call_function(op.target, args, {k: decode(v) for k, v in op.kwargs}))
        made[-1].meta["val"] = out
    graph.output(())
    graph.lint()
    nothing, root = fx.Graph(), torch.nn.Module()
    nothing.output(())
    host, body = fx.GraphModule(root, nothing, "Scalars"), fx.GraphModule(root, graph, "Update")
    signature = Signature(cls, "rehearsed", (), (), (), param.dtype, str(param.device))
    return Program(signature, "each", host, body, (), tuple(inputs), len(holes))


def _leaves(value: Any) -> Iterator[Ref | Hole]:
    """The tensors and numbers of a tape, in order."""
    if isinstance(value, (Ref, Hole)):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _leaves(each)
