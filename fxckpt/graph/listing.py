"""The whole step as one listing: forward and backward collapsed, and between their pieces what runs of the StepGraph there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxckpt.graph.model.layers import Layer, Place


def listing(
    code: str, layers: Sequence[Layer], standing: Mapping[str, str], places: Mapping[str, Place], whole: bool = False
) -> str:
    """``code`` is that of the StepGraph; ``standing`` as there, with the armed layers in the order in which they are updated.
    ``whole``: they are updated in the graph of a whole step."""
    head, *body, end = code.splitlines()
    begin, each = body[: len(body) - 3 * len(layers)], body[len(body) - 3 * len(layers) :]
    lines = {layer.name: each[3 * at : 3 * at + 3] for at, layer in enumerate(layers)}
    inside = [name for name, why in standing.items() if not why and name in lines]
    late = [layer.name for layer in layers if layer.name not in inside]
    where = {layer.name: _graph(places.get(layer.params[-1])) for layer in layers}
    out = [head]
    if inside and not whole:
        out += [f"    ...  # forward of {where}" for where in dict.fromkeys(where[name] for name in inside[::-1])]
        out += begin
    for at, name in enumerate(inside):
        part = "the whole step" if whole else "backward"
        out.append(f"    ...  # {part} of {where[name]}, until the gradients of {name!r} are final")
        out += [*(begin if whole and not at else []), *lines[name]]
    if inside:
        out.append(
            f"    ...  # the rest of {where[inside[-1]]} before the step" if whole else "    ...  # the rest of the backward"
        )
    else:
        out += ["    ...  # forward and backward"]
    out.append("    # opt.step()")
    if not inside:
        out += begin
    said = None
    for name in late:
        why = standing.get(name, "")
        if why and why != said:
            out.append(f"    # after the backward: {why}")
            said = why
        out += lines[name]
    return "\n".join([*out, end])


def _graph(place: Place | None) -> str:
    """Which compiled region a layer is in."""
    return "the model" if place is None or place.region is None else f"graph {place.region}"
