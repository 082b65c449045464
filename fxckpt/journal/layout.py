"""What lies where in a record of the journal: gradients, layers that changed outside their step, and the buffers.

Its layers have the numbers of the checkpoint's, so that one fence waits for the copies of both; each is emitted once, as the
gradients before its update, or whole behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from fxckpt.engine import Engine, Sources, crc32c
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.stepper import Stepper
from fxckpt.saving import plan
from fxckpt.store.boxes import Box
from fxckpt.store.names import GRADIENTS, MODEL, OPTIMIZER, state_key

KINDS = (MODEL, OPTIMIZER, GRADIENTS)
"""Files of a record, by their numbers; which of them there are is seen once it is known what lies in them."""


def gradient_key(name: str) -> str:
    """The key of a parameter's gradient in its file, as of a state: ``gradient/h.0.weight``, whichever optimizer has it."""
    return state_key(0, "gradient", name)


def layer_label(optimizer: int, layer: str, boxes: Mapping[str, Box]) -> str:
    """What a digest calls a layer: two optimizers may have parameters of one module. ``boxes``: by their keys, the parts of its
    parameters that this is of, where that is not all of each."""
    label = layer if optimizer == 0 else f"optimizer{optimizer}:{layer}"
    if not boxes:
        return label
    found = ([key, *(() if 0 in box[1] else map(list, box))] for key, box in sorted(boxes.items()))
    parts = json.dumps(list(found), separators=(",", ":"))
    return f"{label} of {crc32c(parts.encode()):08x}"


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
    for layer in layers:
        layer.entries = [e.in_file(KINDS.index(_kind(layer, e))) for e in layer.entries]
    files, checked, alike = list(KINDS), list[str](), ""
    if full.share is not None:  # as of a checkpoint: each of the ranks writes some, and checksums some of another one's
        share = replace(full.share, kinds=KINDS)
        alike, _ = share.take(layers, full.own)
        files, checked = share.files, share.checked_files
    files, checked = _used(layers, files, checked)
    layout = plan.make_layout(engine, layers, full.changed_outside, make_sources, files, checked)
    layout.full, layout.share, layout.own, layout.alike, layout.frozen_token = full, full.share, full.own, alike, None
    return layout


def _kind(layer: plan.EngineLayer, entry: plan.Entry) -> str:
    """The kind of file that a tensor goes to."""
    if layer.kind == "gradients":
        return GRADIENTS
    return OPTIMIZER if entry.owner and entry.key != entry.owner else MODEL


def _used(layers: Sequence[plan.EngineLayer], files: list[str], checked: list[str]) -> tuple[list[str], list[str]]:
    """Of these files, by their numbers one behind the other, those that something lies in, and that of the gradients; the entries
    get their new numbers."""
    kept = sorted({KINDS.index(GRADIENTS), *(e.file for layer in layers for e in layer.mine(layer.entries))})
    number = {old: new for new, old in enumerate(kept)}
    for layer in layers:
        layer.entries = [e.in_file(number.get(e.file, e.file)) for e in layer.entries]
    return [files[i] for i in kept if i < len(files)], [checked[i - len(files)] for i in kept if i >= len(files)]


def gradients_of(members: Sequence[BoundParam], present: Collection[str]) -> list[plan.Entry]:
    """The gradients of a layer. Each stands there as its parameter, which has its type and shape: gradients are new ones at every
    step, and nothing here is to keep them."""
    return [plan.Entry(0, gradient_key(m.name), m.param, m.name) for m in members if m.name in present]
