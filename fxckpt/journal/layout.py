"""What lies where in a record of the journal: gradients, layers that changed outside their step, and the buffers.

Its layers have the numbers of the checkpoint's, so that one fence waits for the copies of both; each is emitted once, as the
gradients before its update, or whole behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from fxckpt.engine import Engine, Sources
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.stepper import Stepper
from fxckpt.saving import plan
from fxckpt.store.names import GRADIENTS, MODEL, OPTIMIZER, state_key


def gradient_key(name: str) -> str:
    """The key of a parameter's gradient in its file, as of a state: ``gradient/h.0.weight``, whichever optimizer has it."""
    return state_key(0, "gradient", name)


def layer_label(optimizer: int, layer: str) -> str:
    """What a digest calls a layer: two optimizers may have parameters of one module."""
    return layer if optimizer == 0 else f"optimizer{optimizer}:{layer}"


def record_layout(
    engine: Engine,
    full: plan.Layout,
    steppers: Sequence[Stepper],
    whole: Collection[int],
    present: Collection[str],
    make_sources: Callable[[Sequence[torch.Tensor]], Sources | None],
) -> plan.Layout:
    """The layout of a record beside that of a ``full`` checkpoint. ``whole``: the layers, by number, of which all is stored;
    ``present``: the names of parameters that have gradients."""
    arranged = [stepper.executor.arranged for stepper in steppers]
    owned = {number: members for each in arranged for number, members in zip(each.numbers, each.owned)}
    names = {member.name for number in whole for member in owned.get(number, ())}
    layers = []
    for number, layer in enumerate(full.layers):
        if layer.kind == "counts":
            layers.append(plan.EngineLayer(layer.name, "counts", [e for e in layer.entries if e.owner in names]))
        elif layer.kind == "update" and number in whole:
            layers.append(plan.EngineLayer(layer.name, "update", layer.entries, layer.parameters))
        elif layer.kind == "update":
            layers.append(plan.EngineLayer(layer.name, "gradients", gradients_of(owned[number], present), layer.parameters))
        elif layer.kind == "buffers":
            layers.append(plan.EngineLayer(layer.name, "buffers", layer.entries))
    used = {plan.FILES[e.file] for layer in layers if layer.kind != "gradients" for e in layer.entries}
    files = [*(name for name in (MODEL, OPTIMIZER) if name in used), GRADIENTS]
    for layer in layers:
        kinds = [GRADIENTS if layer.kind == "gradients" else plan.FILES[e.file] for e in layer.entries]
        layer.entries = [plan.Entry(files.index(kind), e.key, e.tensor, e.owner) for kind, e in zip(kinds, layer.entries)]
    layout = plan.make_layout(engine, layers, full.changed_outside, make_sources, files)
    layout.full, layout.frozen_token = full, None
    return layout


def gradients_of(members: Sequence[BoundParam], present: Collection[str]) -> list[plan.Entry]:
    """The gradients of a layer. Each stands there as its parameter, which has its type and shape: gradients are new ones at every
    step, and nothing here is to keep them."""
    return [plan.Entry(0, gradient_key(m.name), m.param, m.name) for m in members if m.name in present]
