"""What a compiled region holds of a run: its trained parameters by the inputs of its graph, in layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx
from torch import Tensor

from fxckpt.compat.dynamo import graph_input


@dataclass(frozen=True)
class Bound:
    """One trained parameter of a region: the number of its input, its name, and the layer of the run that it is in."""

    index: int
    name: str
    layer: str


@dataclass
class Region:
    """A compiled graph, as the backward's passes and the run see it: ``bound`` are the parameters that the run trains, ``ids``
    theirs, in that order; ``layers`` the names of their layers, by the numbers that the ops carry. ``token`` says which region
    an op was placed for: a hash of all this, so it is the same in a process that finds the code in Inductor's cache.
    ``gradients``, where the graph holds its backward itself: which of its outputs is the gradient of which input, where only the
    step takes it; ``stepped``: the inputs that the step is given a gradient of."""

    bound: list[Bound] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    token: str = ""
    gradients: dict[int, int] = field(default_factory=dict)
    stepped: frozenset[int] = frozenset()

    @property
    def plan(self) -> list[list[Any]]:
        """All that decides what the passes do, in plain values: it is part of the key of Inductor's caches."""
        return [*([each.index, each.name, each.layer] for each in self.bound), sorted(self.gradients.items())]


LayerOf = Callable[[Tensor], tuple[str, str] | None]
"""The name of a parameter and of its layer, if the run trains it."""


def bind_inputs_pass(gm: fx.GraphModule, inputs: Sequence[Any], layer_of: LayerOf, region: Region) -> fx.GraphModule:
    """Fill ``region`` from Dynamo's graph, which stays as it is. It runs in every process, on a warm cache too."""
    for index, (node, given) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs)):
        tensor, _ = graph_input(node, given)
        found = layer_of(tensor) if isinstance(tensor, Tensor) else None
        if found is not None:
            region.bound.append(Bound(index, *found))
            region.ids.append(id(tensor))
    region.layers = list(dict.fromkeys(each.layer for each in region.bound))
    region.token = hashlib.sha256(json.dumps(region.plan).encode()).hexdigest()[:16]
    return gm
