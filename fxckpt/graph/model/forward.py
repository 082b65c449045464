"""What a forward graph says about its parameters: where each is used first, and how data flows between the
uses.

    linear = F.linear(x, w0, b0)       use 0: w0, b0         fed by: nothing
    relu   = torch.relu(linear)        (no parameter: only passes on what reaches it)
    wt     = w1.t()                    made of parameters alone: still "w1"
    y      = relu @ wt                 use 1: w1             fed by: use 0

The graph is Dynamo's: it exists at every compile, also when the AOTAutograd cache is warm and the joint graph
is never built. It is laid out flat in execution order, with the bodies that checkpointing, ``cond`` and
nested compile regions hide, and then read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

EARLIER = -1
"""The id that stands for all uses of earlier regions: an activation that came in as an input."""

_CALLS_ITS_BODIES = frozenset({
    "wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_activation_checkpoint",
    "tag_activation_checkpoint", "invoke_subgraph", "cond",
})  # fmt: skip
"""Higher-order ops whose last arguments are, one to one, the inputs of each body. The others are one op to
us.
"""


@dataclass(frozen=True)
class Use:
    """An op where parameters (placeholder indices) meet data; ``inputs`` are the earlier uses that the data
    comes from.
    """

    params: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Forward:
    """One forward graph, read. Positions count its ops in execution order; parameters are placeholder
    indices.
    """

    length: int
    reads: Mapping[int, tuple[int, int]]  # first and last op that reads the parameter
    first_use: Mapping[int, int]  # first op through which it gets a gradient
    uses: tuple[Use, ...]
    outputs: tuple[int, ...]  # the uses that reach the graph's outputs


def walk(gm: fx.GraphModule, params: Iterable[int]) -> Forward:
    """Read the graph of ``gm``; ``params``: the indices of the placeholders that are trainable parameters.

    Other placeholders that require grad are activations of an earlier region.
    """
    params, flat = frozenset(params), _flatten(gm)
    reads: dict[int, tuple[int, int]] = {}
    for at, op in enumerate(flat.ops):
        for index in op.inputs & params:
            reads[index] = (reads.get(index, (at, at))[0], at)
    return Forward(len(flat.ops), reads, _first_uses(flat, params), *_data_flow(flat, params))


# ---- laying the graph out flat ------------------------------------------------------------------------

_Ids = frozenset  # of values: i is placeholder i, and -1 - k is the result of op k


@dataclass(frozen=True)
class _Op:
    """One op of the flat graph: the values it reads."""

    inputs: _Ids
    differentiable: bool  # a gradient flows through its result


@dataclass(frozen=True)
class _Flat:
    """A forward graph without bodies inside: ops in the order in which they run."""

    activations: _Ids  # placeholders that require grad
    ops: list[_Op]
    outputs: _Ids
    differentiable_outputs: _Ids


def _flatten(gm: fx.GraphModule) -> _Flat:
    nodes = gm.graph.find_nodes(op="placeholder")
    activations = frozenset(i for i, node in enumerate(nodes) if _requires_grad(node, default=False))
    ops: list[_Op] = []
    env = _lay_out(gm, [frozenset({i}) for i in range(len(nodes))], ops)
    results = gm.graph.find_nodes(op="output")[0].all_input_nodes
    return _Flat(
        activations,
        ops,
        _union(_ids(env, n) for n in results),
        _union(_ids(env, n) for n in results if _requires_grad(n, default=True)),
    )


def _lay_out(gm: fx.GraphModule, inputs: Sequence[_Ids], ops: list[_Op]) -> dict[fx.Node, list[_Ids]]:
    """Append the ops of ``gm``, called on ``inputs``, to ``ops``; the values of each node, one per element of
    a body's several outputs.
    """
    env: dict[fx.Node, list[_Ids]] = {}
    feed = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            env[node] = [next(feed)]
        elif bodies := _bodies(gm, node):
            env[node] = _call_bodies(node, bodies, env, ops)
        elif node.op not in ("output", "get_attr"):
            env[node] = [_element(node, env) or _append(node, env, ops)]
            if _in_place(node):
                env[node.args[0]] = env[node]
    return env


def _call_bodies(
    node: fx.Node, bodies: Sequence[fx.GraphModule], env: Mapping[fx.Node, list[_Ids]], ops: list[_Op]
) -> list[_Ids]:
    operands = tree_leaves(node.args)
    results = []
    for body in bodies:
        inside = _lay_out(body, [_ids(env, arg) for arg in operands[-_inputs(body) :]], ops)
        results.append([_ids(inside, arg) for arg in tree_leaves(body.graph.find_nodes(op="output")[0].args)])
    return [_union(several) for several in zip(*results)]


def _element(node: fx.Node, env: Mapping[fx.Node, list[_Ids]]) -> _Ids | None:
    """The one output of a body that a ``getitem`` picks."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None
    whole = env.get(node.args[0], []) if isinstance(node.args[0], fx.Node) else []
    return whole[node.args[1]] if len(whole) > max(1, node.args[1]) else None


def _append(node: fx.Node, env: Mapping[fx.Node, list[_Ids]], ops: list[_Op]) -> _Ids:
    inputs = _union(_ids(env, arg) for arg in node.all_input_nodes)
    ops.append(_Op(inputs, _requires_grad(node, default=True)))
    return frozenset({-len(ops)})


def _ids(env: Mapping[fx.Node, list[_Ids]], arg: Any) -> _Ids:
    return _union(env.get(arg, ())) if isinstance(arg, fx.Node) else frozenset()


def _union(several: Iterable[_Ids]) -> _Ids:
    return frozenset().union(*several)


def _bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a higher-order op in ``gm`` runs on its last arguments; none for any other op."""
    if getattr(node.target, "__name__", None) not in _CALLS_ITS_BODIES:
        return []
    held = [getattr(gm, str(a.target), None) for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    found = [body for body in held if isinstance(body, fx.GraphModule)]
    enough = len(tree_leaves(node.args)) - len(found)
    return found if all(0 < _inputs(body) <= enough for body in found) else []


def _inputs(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="placeholder"))


def _requires_grad(node: fx.Node, default: bool) -> bool:
    """Whether a gradient flows through the node's value, as Dynamo saw it when it traced the node."""
    if "example_value" not in node.meta:
        return default
    values = tree_leaves(node.meta["example_value"])
    return any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)


def _in_place(node: fx.Node) -> bool:
    """Whether the op changes its first argument, so that later readers of it see the result."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    changes = node.target is operator.setitem or (name.endswith("_") and not name.endswith("__"))
    return changes and bool(node.args) and isinstance(node.args[0], fx.Node)


# ---- reading it -------------------------------------------------------------------------------------


def _first_uses(flat: _Flat, params: _Ids) -> dict[int, int]:
    """For each parameter the first op through which a gradient comes back to it; none for what gets no
    gradient.
    """
    wanted = set(flat.differentiable_outputs)
    first: dict[int, int] = {}
    for at in reversed(range(len(flat.ops))):
        op = flat.ops[at]
        if op.differentiable and -1 - at in wanted:
            wanted |= op.inputs
            first.update(dict.fromkeys(op.inputs & params, at))
    return first


def _data_flow(flat: _Flat, params: _Ids) -> tuple[tuple[Use, ...], tuple[int, ...]]:
    """The uses, and which reach the outputs. A value made of parameters alone is still those parameters."""
    made_of: dict[int, frozenset[int]] = {i: frozenset({i}) for i in params}
    came_from: dict[int, frozenset[int]] = {i: frozenset({EARLIER}) for i in flat.activations - params}
    uses: list[Use] = []
    above: list[int] = []  # for each use the bits of all uses before it on some path
    for at, op in enumerate(flat.ops):
        owners = _union(made_of.get(i, frozenset()) for i in op.inputs)
        if op.inputs and all(i in made_of for i in op.inputs):
            made_of[-1 - at] = owners
            continue
        flow = _nearest(_union(came_from.get(i, frozenset()) for i in op.inputs), above)
        if owners:
            uses.append(Use(tuple(sorted(owners)), tuple(sorted(flow))))
            above.append(_bits(flow) | _covered(flow, above))
            flow = frozenset({len(uses) - 1})
        came_from[-1 - at] = flow
    reached = _nearest(_union(came_from.get(i, frozenset()) for i in flat.outputs), above)
    return tuple(uses), tuple(sorted(reached - {EARLIER}))


def _nearest(flow: frozenset[int], above: Sequence[int]) -> frozenset[int]:
    """``flow`` less the uses that another of it implies: along a residual stream all earlier ones pile up."""
    covered = _covered(flow, above)
    return frozenset(use for use in flow if use == EARLIER or not covered >> use & 1)


def _covered(flow: frozenset[int], above: Sequence[int]) -> int:
    bits = 0
    for use in flow - {EARLIER}:
        bits |= above[use]
    return bits


def _bits(flow: frozenset[int]) -> int:
    return sum(1 << use for use in flow - {EARLIER})
