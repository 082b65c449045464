"""The forward of a graph that goes on to its backward: what the order of layers is read from, as of a graph without one."""

from __future__ import annotations

import torch
import torch.fx as fx

from fxckpt.compat.dynamo import copied_graph_module


def forward_part(gm: fx.GraphModule) -> fx.GraphModule:
    """All that stands before the first backward in ``gm``, with its inputs, returning what that backward begins at; ``gm`` itself
    where there is none."""
    backward = next((node for node in gm.graph.nodes if node.target is torch.autograd.grad), None)
    if backward is None:
        return gm
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node is backward:
            break
        made[node] = graph.node_copy(node, made.__getitem__)
    for node in gm.graph.find_nodes(op="placeholder"):
        if node not in made:
            made[node] = graph.node_copy(node)
    begins = backward.args[0]
    outputs = begins if isinstance(begins, (list, tuple)) else [begins]
    graph.output(tuple(made[node] for node in outputs if isinstance(node, fx.Node)))
    return copied_graph_module(gm, graph)
