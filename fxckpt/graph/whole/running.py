"""Compiles the pieces of a whole step, and runs them with the steps between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxckpt.graph import ops
from fxckpt.graph.whole.cut import Cut, Piece, Ref, StepCall

Compile = Callable[[Piece], Callable[..., Any]]
"""Compiles one piece."""


def compiled(parts: Cut, compile_piece: Compile) -> Callable[..., Any]:
    """What Dynamo is to call in place of the graph: it takes the graph's inputs and returns a tuple."""
    runs = [_running(part, compile_piece) for part in parts.parts]
    dropped = _last_uses(parts)
    names, returns = parts.inputs, parts.returns

    def whole(*args: Any) -> tuple[Any, ...]:
        values = dict(zip(names, args))
        for run, drop in zip(runs, dropped):
            run(values)
            for name in drop:
                del values[name]
        return tuple(values[value.name] if isinstance(value, Ref) else value for value in returns)

    return whole


def _running(part: Piece | StepCall, compile_piece: Compile) -> Callable[[dict[str, Any]], None]:
    """Runs one part: it reads values by their names, and adds those that it makes."""
    if isinstance(part, StepCall):
        return _step(part)
    call: Callable[..., Any] = compile_piece(part) if part.computes else part.module
    inputs, outputs = part.inputs, part.outputs  # the piece itself holds the tensors that it was compiled with

    def run(values: dict[str, Any]) -> None:
        values.update(zip(outputs, call(*map(values.__getitem__, inputs))))

    return run


def _step(call: StepCall) -> Callable[[dict[str, Any]], None]:
    def run(values: dict[str, Any]) -> None:
        params = [values[name] for name in call.params]
        gradients = [None if name is None else values[name] for name in call.gradients]
        ops.step_port(call.run).step(params, gradients)

    return run


def _last_uses(parts: Cut) -> list[list[str]]:
    """By part, the values that nobody reads after it: what they take is to be free as early as it can be."""
    kept = {value.name for value in parts.returns if isinstance(value, Ref)} | set(parts.inputs)
    found: list[list[str]] = []
    for part in reversed(parts.parts):
        read = {*part.params, *filter(None, part.gradients)} if isinstance(part, StepCall) else {*part.inputs, *part.outputs}
        found.append(sorted(read - kept))
        kept |= read
    return found[::-1]
