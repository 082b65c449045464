"""The passes that write a StepGraph: updates in the order of layers, then a fence before and an emit after each of them.

    scalars -> [fence 0, update 0, emit 0] -> [fence 1, update 1, emit 1] -> ...
    with a journal: [fence 0, gradients 0, log 0, update 0, emit 0] -> ...

Every update node carries ``meta["layer"]``, the engine's number and the name of what it changes, by which the later passes go.
"""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.fx as fx

from fxckpt.graph import ops
from fxckpt.graph.contract import ContractError, finished
from fxckpt.graph.model.layers import Layer

COUNTS = "counts"
"""Name of the pseudo-layer of all 0-dimensional states (step counts): they advance first, for all layers at once."""


class SideEffectModule(torch.nn.Module):
    """A callable node of a StepGraph. Note [no dead code elimination]: updates return nothing, so to FX they look unused.
    ``_is_impure`` is what ``Node.is_impure`` asks of a called module; a plain function in its place would be deleted silently by
    ``eliminate_dead_code``."""

    _is_impure = True

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def __call__(self, *args: Any) -> Any:  # a module's own call looks for hooks, at every step
        return self.function(*args)


def identifier(name: str) -> str:
    """A layer's name as a Python identifier: ``h.0.attn`` -> ``h_0_attn``."""
    out = re.sub(r"\W", "_", name) or "root"
    return f"_{out}" if out[0].isdigit() or keyword.iskeyword(out) else out


def _labels(layers: Sequence[Layer]) -> list[str]:
    """An identifier for each layer, none of them twice, and none that the graph's own code needs."""
    used = {"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "run", "scalars", COUNTS}
    labels: list[str] = []
    for base in (identifier(layer.name) for layer in layers):
        labels.append(next(label for n in itertools.count(1) if (label := base if n == 1 else f"{base}__{n}") not in used))
        used.add(labels[-1])
    return labels


def write_updates_pass(
    gm: fx.GraphModule,
    layers: Sequence[Layer],
    numbers: Sequence[int],
    counts_number: int | None,
    update: Callable[[int], Callable[..., Any]],
    scalars: Callable[..., Any],
) -> fx.GraphModule:
    """Write the bare step into an empty graph: the scalars, then each layer's update; see step_graph.step_passes."""
    graph, labels = gm.graph, _labels(layers)
    graph.placeholder("run", type_expr=int)
    counts = [] if counts_number is None else [graph.placeholder(COUNTS)]
    owned = [graph.placeholder(label) for label in labels]
    values = _call(gm, "scalars", scalars, *counts)
    if counts_number is not None:
        values.meta["layer"] = counts_number, COUNTS
    for i, (layer, number) in enumerate(zip(layers, numbers)):
        node = _call(gm, f"update_{labels[i]}", update(i), owned[i], values)
        node.meta["layer"] = number, layer.name
    graph.output(None)
    return finished(gm)


def _call(gm: fx.GraphModule, name: str, function: Callable[..., Any], *args: fx.Node) -> fx.Node:
    """A ``call_module`` node; see Note [no dead code elimination]."""
    gm.add_module(name, SideEffectModule(function))
    return gm.graph.create_node("call_module", name, args, name=name)


def place_fences_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """Before each update: wait until the last checkpoint has copied what it changes."""
    for node in _updates(gm):
        with gm.graph.inserting_before(node):
            _place(gm, ops.ckpt_fence, node)
    return finished(gm)


def place_logs_pass(gm: fx.GraphModule, gradients: Callable[[int], Callable[..., Any]]) -> fx.GraphModule:
    """Before each layer's update, behind its fence: hand the gradients that it is about to be made with to the engine.
    ``gradients(i)`` is the callable that takes those of layer i out of the step's inputs."""
    updates = [node for node in _updates(gm) if len(node.args) > 1]  # not the scalars
    for i, node in enumerate(updates):
        with gm.graph.inserting_before(node):
            scalars, name = cast(fx.Node, node.args[1]), str(node.target).replace("update_", "gradients_", 1)
            found = _call(gm, name, gradients(i), scalars)
            gm.graph.call_function(ops.ckpt_log, (found, next(iter(gm.graph.nodes)), *node.meta["layer"]))
    return finished(gm)


def place_emits_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """After each update: hand what it changed to the engine."""
    for node in _updates(gm):
        with gm.graph.inserting_after(node):
            _place(gm, ops.ckpt_emit, node)
    return finished(gm)


def _updates(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if "layer" in node.meta]


def _place(gm: fx.GraphModule, op: Callable[..., Any], update: fx.Node) -> None:
    """One op on the tensors of ``update``; the run is the graph's first input."""
    gm.graph.call_function(op, (update.args[0], next(iter(gm.graph.nodes)), *update.meta["layer"]))


def verify_schedule_pass(gm: fx.GraphModule, layers: Sequence[tuple[int, str]], logged: bool = False) -> fx.GraphModule:
    """Change nothing; raise ContractError unless each of ``layers`` (number and name, in update order) is fenced, updated and
    emitted once, in this order, with the same tensors; and, but for the counts, ``logged`` before its update if it is to be."""
    found: dict[tuple[Any, Any], list[tuple[str, Any]]] = {}
    kinds = {ops.ckpt_fence: "fence", ops.ckpt_emit: "emit"}
    for node in gm.graph.nodes:
        if node.target is ops.ckpt_log:
            found.setdefault(node.args[2:], []).append(("log", None))
        elif node.target in kinds:
            tensors, _, *layer = node.args
            found.setdefault((layer[0], layer[1]), []).append((kinds[node.target], tensors))
        elif "layer" in node.meta:
            found.setdefault(node.meta["layer"], []).append(("update", node.args[0]))
    if list(found) != list(layers):
        raise ContractError(f"the StepGraph has the layers {list(found)}, and should have {list(layers)}, in this order")
    for (number, name), steps in found.items():
        told = [what for what, _ in steps]
        wanted = ["fence", "log", "update", "emit"] if logged and name != COUNTS else ["fence", "update", "emit"]
        if told != wanted:
            some = ", ".join(wanted[:-1])
            raise ContractError(f"layer {name!r} (number {number}) has {told}, and not one {some} and emit, in this order")
        if len({id(tensors) for what, tensors in steps if what != "log"}) != 1:
            raise ContractError(f"layer {name!r} (number {number}) is not fenced and emitted with the tensors that are updated")
    return gm
