"""The StepGraph in pieces: how a step begins, and one section for each layer, which may run at any time after it.

    begin       ckpt_fence(counts) -> scalars -> ckpt_emit(counts)
    section 0   ckpt_fence -> update -> ckpt_emit
    section 1   ...

All together they are the StepGraph: the same nodes, calling the same modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.fx as fx

from fxckpt.graph.contract import ContractError, finished


@dataclass(frozen=True)
class Sections:
    """``begin(run, counts)``, or without counts ``begin(run)``, gives the scalars; each of ``layers`` takes
    ``(run, tensors, scalars)``."""

    begin: fx.GraphModule
    layers: tuple[fx.GraphModule, ...]


def cut(gm: fx.GraphModule) -> Sections:
    """The pieces of a StepGraph, in its order. Raises ContractError if a node is in none of them."""
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    run, *_ = inputs = gm.graph.find_nodes(op="placeholder")
    scalars = next(node for node in nodes if node.target == "scalars")
    layers = {node.args[0]: node for node in nodes if "layer" in node.meta and node is not scalars}
    counts = [node for node in inputs[1:] if node not in layers]
    begins = [node for node in nodes if node is scalars or (node.args and node.args[0] in counts)]
    pieces = [[node for node in nodes if node.args and node.args[0] is tensors] for tensors in layers]
    if sum(map(len, pieces), len(begins)) != len(nodes):
        raise ContractError("the StepGraph has nodes that belong to no layer")
    begin = _piece(gm, [run, *counts], begins, scalars)
    return Sections(begin, tuple(_piece(gm, [run, piece[0].args[0], scalars], piece, None) for piece in pieces))  # type: ignore[list-item]


def _piece(gm: fx.GraphModule, inputs: Iterable[fx.Node], nodes: Iterable[fx.Node], gives: fx.Node | None) -> fx.GraphModule:
    """These nodes as a graph of their own."""
    graph = fx.Graph()
    made = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(None if gives is None else made[gives])
    return finished(fx.GraphModule(gm, graph, "Section"))
