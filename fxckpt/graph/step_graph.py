"""The step as an FX graph that runs: per-layer updates in gradient order, with checkpoint ops in between (see schedule.py).

Its inputs are the run's number and, for each layer, the list of tensors the layer owns (parameters, then optimizer state), so the
data flow between the nodes is explicit. Where nothing is pending and nothing starts, the same updates run without a graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from fxckpt.graph import draw, passes
from fxckpt.graph.listing import listing
from fxckpt.graph.model.layers import Layer, Place
from fxckpt.graph.schedule import (
    COUNTS,
    place_emits_pass,
    place_fences_pass,
    place_logs_pass,
    verify_schedule_pass,
    write_updates_pass,
)


class UpdateTimer:
    """How long the calls of one update node took on the host: their number, and the shortest in seconds, which is least disturbed
    by whatever else ran. For a CUDA device: to launch, not to run."""

    __slots__ = ("calls", "shortest")

    def __init__(self) -> None:
        self.calls: int = 0
        self.shortest: float = float("inf")

    def add(self, seconds: float) -> None:
        """One more call."""
        self.calls += 1
        if seconds < self.shortest:
            self.shortest = seconds


class Standing(dict[str, str]):
    """See ``StepGraph.standing``. ``whole``: the layers are updated in the graph of a whole step, and not in a backward."""

    whole: bool = False


UNSEEN = "no backward has shown its gradients yet"
"""Why a layer is not updated inside the backward, before anything is known."""


@dataclass(frozen=True)
class StepGraph:
    """The optimizer step of a run, as it runs and as a user looks at it (``opt.ckpt.graph``).

    ``layers`` in update order; ``order`` the parameter names in the order in which their gradients become final; ``edges`` pairs
    of layer names, from producer to consumer in the forward pass; ``sizes`` bytes of each layer's tensors, parameters and
    optimizer state; ``clocks`` one for each layer; ``places`` where each parameter's place in the order came from; ``standing``
    by layer, with ``updates="in_backward"``, why it is not updated inside the backward (empty: it is), else None.
    """

    layers: tuple[Layer, ...]
    edges: tuple[tuple[str, str], ...]
    module: fx.GraphModule
    sizes: dict[str, int] = field(default_factory=dict)
    clocks: tuple[UpdateTimer, ...] = ()
    places: Mapping[str, Place] = field(default_factory=dict)
    standing: Mapping[str, str] | None = None

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
    def why(self) -> dict[str, Place]:
        """Where each layer's place in the order came from, which is its last parameter's, and then each parameter's own. With
        ``updates="in_backward"`` a layer's says why it is not armed, too."""
        layers = {layer.name: self.places[layer.params[-1]] for layer in self.layers if self.places}
        if self.standing is not None:
            layers = {name: replace(place, unarmed=self.standing.get(name, UNSEEN)) for name, place in layers.items()}
        return layers | {**self.places}

    @property
    def graph(self) -> fx.Graph:
        """The FX graph with checkpoint ops."""
        return self.module.graph

    def dot(self) -> str:
        """The layer dependency graph in Graphviz's language."""
        return draw.to_dot(self.layers, self.edges, self.sizes, self.times)

    def table(self) -> str:
        """One line a layer, in update order: size, update time, number of parameters, why it stands there, and what its output
        reaches."""
        return draw.to_text(self.layers, self.edges, self.sizes, self.times, self.why)

    def draw(self, path: str) -> None:
        """Write the layer dependency graph to ``path`` as SVG."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(draw.to_svg(self.layers, self.edges, self.sizes, self.times))

    def __str__(self) -> str:
        code = readable(self.module)
        if self.standing is None:
            return code
        return listing(code, self.layers, self.standing, self.places, isinstance(self.standing, Standing) and self.standing.whole)


def step_passes(
    layers: Sequence[Layer],
    numbers: Sequence[int],
    counts_number: int | None,
    update: Callable[[int], Callable[..., Any]],
    scalars: Callable[..., Any],
    gradients: Callable[[int], Callable[..., Any]] | None = None,
) -> passes.Chosen:
    """The passes that make an empty graph a StepGraph.

    ``update(i)`` is the callable of layer i: it changes the layer's tensors in place, given them and the scalars. ``numbers`` are
    the engine's numbers of these layers, ``counts_number`` that of the counts, None when there are none. ``gradients(i)``, with a
    journal, takes those of layer i out of what ``scalars`` gave.
    """
    given = {"layers": layers, "numbers": numbers, "counts_number": counts_number, "update": update, "scalars": scalars}
    schedule = [] if counts_number is None else [(counts_number, COUNTS)]
    schedule += [(number, layer.name) for number, layer in zip(numbers, layers)]
    logs: passes.Chosen = {} if gradients is None else {place_logs_pass: {"gradients": gradients}}
    verified = {"layers": schedule, "logged": gradients is not None}
    return {write_updates_pass: given, place_fences_pass: {}, **logs, place_emits_pass: {}, verify_schedule_pass: verified}


def build(chosen: passes.Chosen) -> fx.GraphModule:
    """The graph that these ``step_passes`` write: ``(run, counts, *layers) -> None``, or without ``counts``."""
    empty = fx.GraphModule(torch.nn.Module(), fx.Graph(), "StepGraph")
    return passes.run(empty, chosen, wanted=("updates", "fences", "emits"))


def readable(module: fx.GraphModule) -> str:
    """The graph's own code, less FX's bookkeeping: what a person reads."""
    lines = [re.sub(r";  \w+( = \w+)* = None$", "", line) for line in module.code.strip().splitlines()]
    lines = [re.sub(r"^(\s*)ckpt_(fence|emit|log)\w* = ", r"\1", line) for line in lines]
    return "\n".join(line.replace(".default(", "(") for line in lines if line.strip())
