"""Where in a backward graph a layer may be updated: its gradients are final, and nobody reads what the update changes or takes.

An update changes the layer's parameters and takes the memory of its gradients. So it stands behind every node that reads one of
either, through views too. A layer of which a gradient shares its memory with something else that the backward returns, or that
came into it, has no such place.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_leaves

from fxckpt.compat.dynamo import gradient_of, input_index, is_view, output_index
from fxckpt.graph.backward.region import Region


@dataclass(frozen=True)
class LegalPoint:
    """The earliest place of one layer's update: behind ``last``. ``layer`` is its number in the region, ``inputs`` the numbers of
    the parameters' inputs, ``gradients`` theirs, ``readers`` all nodes that must have run before."""

    layer: int
    inputs: tuple[int, ...]
    gradients: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    last: fx.Node


LEGAL = "fxckpt_legal_points"
"""The key of ``gm.meta`` under which the points are kept, in the order of the graph."""

_LIKE_VIEWS = (torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)
"""Inductor makes no copy for them."""


def shares_memory(node: fx.Node) -> bool:
    """May the node's result be the memory of its first argument?"""
    return is_view(node) or node.target in _LIKE_VIEWS


def find_legal_points_pass(gm: fx.GraphModule, region: Region) -> fx.GraphModule:
    """Note in ``gm.meta[LEGAL]`` the points of all layers that have one. The graph stays as it is; a forward has none."""
    place = {node: at for at, node in enumerate(gm.graph.nodes)}
    gradients, returned = _gradients(gm.graph, region)
    inputs = _inputs(gm.graph)
    points = []
    for number, layer in enumerate(region.layers):
        mine = [each.index for each in region.bound if each.layer == layer]
        trained = [index for index in mine if index in gradients]
        roots = {_root(gradients[index]) for index in trained}
        alone = Counter(_root(gradients[index]) for index in trained)
        if not trained or any(root.op == "placeholder" or returned[root] != alone[root] for root in roots):
            continue
        readers = _readers(root for index in mine for root in inputs.get(index, ())) + _readers(roots)
        if not all(outputs_of(reader) and not _writes(reader) for reader in readers):
            continue  # it gives nothing that an op could wait for, or changes a parameter at an instant that Inductor chooses
        last = max([*(gradients[index] for index in trained), *readers], key=place.__getitem__)
        found = tuple(gradients[index] for index in trained)
        points.append(LegalPoint(number, tuple(trained), found, tuple(dict.fromkeys(readers)), last))
    gm.meta[LEGAL] = sorted(points, key=lambda point: place[point.last])
    return gm


def _gradients(graph: fx.Graph, region: Region) -> tuple[dict[int, fx.Node], Counter[fx.Node]]:
    """The gradients by the numbers of the inputs that they are of, and how often each memory is returned."""
    output = next(iter(graph.find_nodes(op="output")))
    leaves = tree_leaves(output.args)
    described = zip(leaves, output.meta.get("desc") or ())
    found = {_gradient_of(desc, region): node for node, desc in described if isinstance(node, fx.Node)}
    return (
        {index: node for index, node in found.items() if index is not None},
        Counter(_root(node) for node in leaves if isinstance(node, fx.Node)),
    )


def _gradient_of(desc: Any, region: Region) -> int | None:
    """Which input an output is the gradient of: AOTAutograd says it of a backward that it made, the region of others."""
    index = gradient_of(desc)
    return region.gradients.get(output_index(desc)) if index is None else index  # type: ignore[arg-type]


def _inputs(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The placeholders by input: a parameter, and what the forward saved of it that is its memory (a view)."""
    found: dict[int, list[fx.Node]] = {}
    memory: dict[int, int] = {}
    placeholders = graph.find_nodes(op="placeholder")
    for node in placeholders:
        index = input_index(node.meta.get("desc"))
        if index is not None:
            found.setdefault(index, []).append(node)
            memory.setdefault(_memory(node), index)
    for node in placeholders:
        index = memory.get(_memory(node))
        if index is not None and node not in found[index]:
            found[index].append(node)
    return found


def placeholders_of(graph: fx.Graph) -> dict[str, int]:
    """The numbers of the inputs by the names of the placeholders that are their memory."""
    return {node.name: index for index, nodes in _inputs(graph).items() for node in nodes}


def _memory(node: fx.Node) -> int:
    """Which fake memory its example has; its own where there is none."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else id(node)


def _root(node: fx.Node) -> fx.Node:
    """Whose memory it is."""
    while shares_memory(node) and node.args and isinstance(node.args[0], fx.Node) and not _is_one_of_several(node):
        node = node.args[0]
    return node


def _is_one_of_several(node: fx.Node) -> bool:
    """Is it one result of an op that makes several, each of them new?"""
    made = node.args[0]
    assert isinstance(made, fx.Node)
    return node.target is operator.getitem and isinstance(made.meta.get("val"), (tuple, list)) and not is_view(made)


def _readers(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Who reads the memory of these, through views too; the views themselves read nothing."""
    found, stack = [], list(nodes)
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                continue
            if shares_memory(user):
                stack.append(user)
            else:
                found.append(user)
    return found


def _writes(node: fx.Node) -> bool:
    """Does it change one of its inputs?"""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def outputs_of(node: fx.Node) -> list[fx.Node]:
    """The node, or those of its results that are used, as far as they are tensors."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return [node]
    return [user for user in node.users if shares_memory(user) and isinstance(user.meta.get("val"), torch.Tensor)]
