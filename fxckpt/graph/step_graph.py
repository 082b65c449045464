"""Write the step as an FX graph: per-layer updates in gradient order, with checkpoint ops in between.

    scalars -> [fence 0, update 0, emit 0] -> [fence 1, update 1, emit 1] -> ...

The graph is what runs. Its inputs are the run's number and, for each layer, the list of tensors the layer owns
(parameters, then optimizer state), so the data flow between the nodes is explicit. On a step on which nothing is pending
and nothing starts, the same updates run over all layers at once, without a graph (optim/executor.py).
"""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from fxckpt.graph import ops
from fxckpt.graph.model.layers import Layer

COUNTS = "counts"
"""Name of the pseudo-layer of all 0-dimensional states (step counts): they advance first, for all layers at once."""


class SideEffectModule(torch.nn.Module):
    """A callable node of a StepGraph.

    Note [no dead code elimination]: updates return nothing, so to FX they look unused. ``_is_impure`` is what
    ``Node.is_impure`` asks of a called module; a plain function in its place would be deleted silently by
    ``eliminate_dead_code``.
    """

    _is_impure = True

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def __call__(self, *args: Any) -> Any:  # a module's own call looks for hooks, at every step
        return self.function(*args)


class UpdateTimer:
    """How long the calls of one update node took on the host: their number, and the shortest in seconds, which is least
    disturbed by whatever else ran. For a CUDA device: to launch, not to run."""

    __slots__ = ("calls", "shortest")

    def __init__(self) -> None:
        self.calls, self.shortest = 0, float("inf")

    def add(self, seconds: float) -> None:
        """One more call."""
        self.calls += 1
        if seconds < self.shortest:
            self.shortest = seconds


@dataclass(frozen=True)
class StepGraph:
    """The optimizer step of a run, as it runs and as a user looks at it (``opt.ckpt.graph``).

    ``layers`` in update order; ``order`` the parameter names in the order in which their gradients become final;
    ``edges`` pairs of layer names, from producer to consumer in the forward pass; ``sizes`` bytes of each layer's
    tensors, parameters and optimizer state; ``clocks`` one for each layer.
    """

    layers: tuple[Layer, ...]
    edges: tuple[tuple[str, str], ...]
    module: fx.GraphModule
    sizes: dict[str, int] = field(default_factory=dict)
    clocks: tuple[UpdateTimer, ...] = ()

    @property
    def times(self) -> dict[str, float]:
        """The shortest time that each layer's update took, in seconds, of the steps that ran with checkpoint ops (two clock
        readings a layer: too cheap to switch off). Bare steps update all layers at once and tell nothing of one layer."""
        return {layer.name: clock.shortest for layer, clock in zip(self.layers, self.clocks) if clock.calls}

    @property
    def order(self) -> tuple[str, ...]:
        """Every parameter exactly once, in update order."""
        return tuple(name for layer in self.layers for name in layer.params)

    @property
    def graph(self) -> fx.Graph:
        """The FX graph with checkpoint ops."""
        return self.module.graph

    def dot(self) -> str:
        """The layer dependency graph in Graphviz's language."""
        from fxckpt.graph import draw

        return draw.to_dot(self.layers, self.edges, self.sizes, self.times)

    def table(self) -> str:
        """One line a layer, in update order: size, update time, number of parameters, what its output reaches."""
        from fxckpt.graph import draw

        return draw.to_text(self.layers, self.edges, self.sizes, self.times)

    def draw(self, path: str) -> None:
        """Write the layer dependency graph to ``path`` as SVG."""
        from fxckpt.graph import draw

        with open(path, "w", encoding="utf-8") as file:
            file.write(draw.to_svg(self.layers, self.edges, self.sizes, self.times))

    def __str__(self) -> str:
        return readable(self.module)


def identifier(name: str) -> str:
    """A layer's name as a Python identifier: ``h.0.attn`` -> ``h_0_attn``."""
    out = re.sub(r"\W", "_", name) or "root"
    return f"_{out}" if out[0].isdigit() or keyword.iskeyword(out) else out


class _Names:
    """Identifiers for layers, each used once, and none that the graph's own code needs."""

    def __init__(self) -> None:
        self.used = {"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "run", "scalars", COUNTS}

    def __call__(self, name: str) -> str:
        base = identifier(name)
        found = next(label for n in itertools.count(1) if (label := base if n == 1 else f"{base}__{n}") not in self.used)
        self.used.add(found)
        return found


def build(
    layers: Sequence[Layer], first: int, update: Callable[[int], Callable], scalars: Callable, counts: bool
) -> fx.GraphModule:
    """The variant with checkpoint ops.

    ``update(i)`` is the callable of layer i: it changes the layer's tensors in place, given them and the scalars.
    ``first`` is the engine's number of the first of these layers; the counts, when there are any, come before it.
    Signature of the result: ``(run, counts, *layers) -> None``, or without ``counts``.
    """
    graph, root, names = fx.Graph(), torch.nn.Module(), _Names()
    run = graph.placeholder("run", type_expr=int)
    counted = graph.placeholder(COUNTS) if counts else None
    labels = [names(layer.name) for layer in layers]
    owned = [graph.placeholder(label) for label in labels]
    if counted is not None:
        graph.call_function(ops.ckpt_fence, (counted, run, first - 1, COUNTS))
    values = _call(graph, root, "scalars", scalars, () if counted is None else (counted,))
    if counted is not None:
        graph.call_function(ops.ckpt_emit, (counted, run, first - 1, COUNTS))
    for i, (layer, label, tensors) in enumerate(zip(layers, labels, owned)):
        graph.call_function(ops.ckpt_fence, (tensors, run, first + i, layer.name))
        _call(graph, root, f"update_{label}", update(i), (tensors, values))
        graph.call_function(ops.ckpt_emit, (tensors, run, first + i, layer.name))
    return _finish(graph, root, "StepGraph")


def _call(graph: fx.Graph, root: torch.nn.Module, name: str, function: Callable, args: tuple) -> fx.Node:
    """A ``call_module`` node; see Note [no dead code elimination]."""
    root.add_module(name, SideEffectModule(function))
    return graph.create_node("call_module", name, args, name=name)


def _finish(graph: fx.Graph, root: torch.nn.Module, name: str) -> fx.GraphModule:
    graph.output(None)
    graph.lint()
    return fx.GraphModule(root, graph, name)


def readable(module: fx.GraphModule) -> str:
    """The graph's own code, less FX's bookkeeping: what a person reads."""
    lines = [re.sub(r";  \w+( = \w+)* = None$", "", line) for line in module.code.strip().splitlines()]
    lines = [re.sub(r"^(\s*)ckpt_(fence|emit)\w* = ", r"\1", line) for line in lines]
    return "\n".join(line.replace(".default(", "(") for line in lines if line.strip())
