"""Cuts Dynamo's graph of a whole step into what is compiled before and behind ``opt.step()``, and the step between.

An op that changes its inputs cannot stand inside what AOTAutograd compiles: it would be given temporaries, which are copied back
at the end, behind all fences. In Dynamo's graph the parameters are the live ones, and all that reads them after the step stands
behind it. So the step runs between two compiled pieces, on the tensors themselves, and every reader sees what it should.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx

from fxckpt.compat.dynamo import copied_graph_module
from fxckpt.graph import ops
from fxckpt.graph.backward.region import Region


class NotCut(Exception):
    """The graph cannot be cut at a step; says why."""


@dataclass(frozen=True)
class StepCall:
    """One ``opt.step()``: the names of the parameters and gradients that it is given (None: a parameter has none), and the run's
    number."""

    params: tuple[str, ...]
    gradients: tuple[str | None, ...]
    run: int


@dataclass(frozen=True)
class Piece:
    """What stands before, between or behind steps: ``module`` takes the values of ``inputs``, by name, and gives those of
    ``outputs``. ``computes``: there is something to compile in it."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: tuple[Any, ...]
    computes: bool


@dataclass(frozen=True)
class Cut:
    """The parts of a graph in the order in which they run, the names of its inputs, and of what it returns."""

    parts: tuple[Piece | StepCall, ...]
    inputs: tuple[str, ...]
    returns: tuple[Any, ...]


def steps_in(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of ``opt.step()`` in Dynamo's graph."""
    return gm.graph.find_nodes(op="call_function", target=ops.optimizer_step)


def cut(gm: fx.GraphModule, inputs: Sequence[Any]) -> Cut:
    """``gm`` in parts; ``inputs`` are the examples that it is compiled with. Raises NotCut, and changes nothing, where a backward
    or a context would reach over a step."""
    parts: list[list[fx.Node]] = [[]]
    steps: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is ops.optimizer_step:
            steps.append(node)
            parts.append([])
        elif node.op not in ("placeholder", "output", "get_attr"):
            parts[-1].append(node)
    placeholders = gm.graph.find_nodes(op="placeholder")
    [output] = gm.graph.find_nodes(op="output")
    where = {node: at for at, nodes in enumerate(parts) for node in nodes}
    _check_reach(steps, parts, where, output)
    example_of = dict(zip(placeholders, inputs))
    made: list[Piece | StepCall] = []
    for at, nodes in enumerate(parts):
        if at:
            made.append(_step_call(steps[at - 1]))
        mine = placeholders if not at else _taken(nodes, where, at)
        given = [node for node in nodes if any(where.get(user, at + 1) > at or user in steps for user in node.users)]
        crossing = {node for node in given if any(where.get(user, 0) > at for user in node.users)}
        if nodes:
            made.append(_piece(gm, nodes, mine, given, crossing, example_of))
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    return Cut(
        tuple(made),
        tuple(node.name for node in placeholders),
        tuple(Ref(value.name) if isinstance(value, fx.Node) else value for value in returned),
    )


def first_region(parts: Cut) -> tuple[int, Region]:
    """The run whose step comes first, and what the region of the piece before it is to know of gradients."""
    piece, step = parts.parts[0], next(part for part in parts.parts if isinstance(part, StepCall))
    if not isinstance(piece, Piece):
        return step.run, Region()
    taken = Counter(value.name for value in parts.returns if isinstance(value, Ref))
    for part in parts.parts[1:]:
        taken.update(part.inputs if isinstance(part, Piece) else [*part.params, *filter(None, part.gradients)])
    found = {name: piece.inputs.index(param) for param, name in zip(step.params, step.gradients) if name is not None}
    gradients = {at: found[name] for at, name in enumerate(piece.outputs) if name in found and taken[name] == 1}
    return step.run, Region(gradients=gradients, stepped=frozenset(found.values()))


@dataclass(frozen=True)
class Ref:
    """A value by its name."""

    name: str


def _check_reach(steps: list[fx.Node], parts: list[list[fx.Node]], where: dict[fx.Node, int], output: fx.Node) -> None:
    """Raises NotCut for what cannot be handed over a step."""
    for step in steps:
        if not all(isinstance(p, fx.Node) and p.op == "placeholder" for p in step.args[0]):  # type: ignore[union-attr]
            raise NotCut("opt.step() is given parameters that are no inputs of the graph")
    later = [node for nodes in parts[1:] for node in nodes]
    reached = [node for node in where if any(where.get(user, 0) > where[node] for user in node.users)]
    for node in reached:
        if not isinstance(node.meta.get("example_value"), (torch.Tensor, torch.SymInt, int)):
            raise NotCut(f"{node.name} reaches over opt.step() (a context that is open around it?)")
    users = {user for node in reached if _requires_grad(node) for user in node.users if where.get(user, 0) > where[node]}
    if not all(map(_ends_history, users)):
        backward = any(node.target is torch.autograd.grad for node in later)
        if backward or any(where.get(node, 0) and _requires_grad(node) for node in output.all_input_nodes):
            raise NotCut("a backward behind opt.step() goes through what was computed before it")


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _ends_history(node: fx.Node) -> bool:
    """Does no backward go through it, as through ``detach``?"""
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and not value.requires_grad


def _step_call(node: fx.Node) -> StepCall:
    params, gradients, run = cast(tuple[list[fx.Node], list[fx.Node | None], int], node.args)
    return StepCall(tuple(p.name for p in params), tuple(None if g is None else g.name for g in gradients), run)


def _taken(nodes: Iterable[fx.Node], where: dict[fx.Node, int], at: int) -> list[fx.Node]:
    """What these read that is made elsewhere."""
    read = dict.fromkeys(value for node in nodes for value in node.all_input_nodes)
    return [value for value in read if value.op != "get_attr" and where.get(value) != at]


def _piece(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    taken: Sequence[fx.Node],
    given: Sequence[fx.Node],
    crossing: set[fx.Node],
    example_of: dict[fx.Node, Any],
) -> Piece:
    """These nodes as a graph of their own. What another piece takes has no history in it: no backward goes over a step."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in taken:
        made[node] = graph.node_copy(node) if node.op == "placeholder" else graph.placeholder(node.name)
        made[node].meta.setdefault("example_value", node.meta.get("example_value"))
    for node in nodes:
        for value in node.all_input_nodes:
            if value.op == "get_attr" and value not in made:
                made[value] = graph.node_copy(value)
        made[node] = graph.node_copy(node, made.__getitem__)
    outputs, results = [], []
    for node in given:
        result, name = made[node], node.name
        if node in crossing and _requires_grad(node):
            result = graph.call_method("detach", (result,))
            result.meta["example_value"] = node.meta["example_value"].detach()
        outputs.append(name)
        results.append(result)
    graph.output(tuple(results))
    examples = tuple(example_of[node] if node in example_of else _example(node) for node in taken)
    computes = any(not _is_light(node) for node in nodes)
    return Piece(copied_graph_module(gm, graph), tuple(node.name for node in taken), tuple(outputs), examples, computes)


def _example(node: fx.Node) -> Any:
    value = node.meta["example_value"]
    return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _is_light(node: fx.Node) -> bool:
    """Not worth a compile."""
    return node.target in ("detach", operator.getitem)
