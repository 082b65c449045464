"""A tape as a program: what a rehearsal noted on stand-ins, for real tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.trace import Signature
from fxckpt.optim.rehearsal.stand_in import Hole, Items, Name, Ref, StandIn


def program_of(stand_in: StandIn, cls: type) -> Program:
    """Its tape as a body that runs on real tensors: ``body(parameter, gradient, *states, *scalars)``.

    It has no host part: the scalars are what the rehearsal of the step found.
    """
    tape, param = stand_in.tape(), stand_in.param
    graph, inputs = fx.Graph(), {}
    for name in dict.fromkeys([("param", None), ("grad", None), *_inputs(tape)]):
        inputs[name] = graph.placeholder(str(name[1] if name[0] == "state" else name[0]))
    holes = [graph.placeholder(f"scalar{i}") for i in range(sum(map(_count_holes, tape)))]
    left, made = iter(holes), []

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
