"""Layers: which parameters are updated and checkpointed together, in the order in which their gradients become final.

It must never be able to fail training: whatever was or was not seen, each parameter appears exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxckpt.errors import SetupError
from fxckpt.graph.model.book import TraceBook
from fxckpt.graph.model.forward import EARLIER
from fxckpt.graph.model.joint import JointTrace

ROOT = "(root)"
"""The layer of parameters that the model owns directly."""


@dataclass(frozen=True)
class Layer:
    """Parameters (FQNs, in update order) whose update is one step of the StepGraph."""

    name: str
    params: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Why a parameter stands where it does in the update order: what was seen of it, and where. ``origin``: "joint" and "dynamo":
    its region's forward graph, where ``position`` is the op that uses it first (for "joint" AOTAutograd's joint graph was seen
    too, and its gradient is final at node ``final``); "arrival": its gradient came as number ``position`` of those of the first
    backward; "registration": it was never seen, and is number ``position`` of its optimizer. ``unarmed``, of a layer with
    ``updates="in_backward"``: why it is not updated inside the backward; empty if it is, None where nobody asked for it."""

    origin: str
    position: int
    region: int | None = None
    final: int | None = None
    unarmed: str | None = None

    def __str__(self) -> str:
        armed = "" if self.unarmed is None else f", after the backward: {self.unarmed}" if self.unarmed else ", in the backward"
        return self._origin() + armed

    def _origin(self) -> str:
        if self.region is not None:
            return f"graph {self.region} op {self.position}" + (f" (joint {self.final})" if self.origin == "joint" else "")
        return f"{'arrived' if self.origin == 'arrival' else 'never seen'} #{self.position}"


def gradient_order(named: Sequence[tuple[str, Tensor]], book: TraceBook) -> dict[str, Place]:
    """The names, ordered by when their gradients become final, and why each stands where it does: the one rule of the order.

    1. What compiled regions use. Regions come in the order of their backwards: as gradients arrived, else the later in the
       forward the earlier. Within a region, whose gradients arrive all at once, the later a parameter is used first, the earlier
       its gradient is final. The joint graph says the same, where it is seen; on a warm cache it is not, so it decides nothing.
    2. Parameters outside all regions, among the regions, as their gradients arrived.
    3. Those of which nothing is known, last.

    Ties (weight and bias of one op) are in reverse registration order. A tensor that ``named`` holds twice counts once, under its
    first name.
    """
    regions = book.places()
    ranks: dict[int, tuple[tuple[bool, tuple[int, int], int, int], str, Place]] = {}
    for at, (name, tensor) in enumerate(named):
        if id(tensor) in ranks:
            continue
        trace, arrival = book.lookup(tensor), book.arrival(tensor)
        if trace is not None:
            place = Place(trace.origin, trace.first_use, trace.region, trace.grad_final if trace.origin == "joint" else None)
            rank = False, regions[trace.region], -trace.first_use, -at
        elif arrival is not None:
            place, rank = Place("arrival", arrival), (False, (arrival, 0), 0, -at)
        else:
            place, rank = Place("registration", at), (True, (0, 0), 0, -at)
        ranks[id(tensor)] = rank, name, place
    return {name: place for _, name, place in sorted(ranks.values(), key=lambda found: found[0])}


def group_layers(order: Iterable[str], layer: str | Callable[[str], str] = "module") -> tuple[Layer, ...]:
    """Split ``order`` into layers, sorted by when the last gradient of each becomes final. "module": the parameters one module
    owns directly. "block": those under the outermost list element (``h.0``); what is in no list, by module. Or a function from a
    parameter's FQN to the name of its layer."""
    groups: dict[str, list[str]] = {}
    for name in order:
        group = layer_name(name, layer)
        groups[group] = [*groups.pop(group, ()), name]  # re-inserted: the dict is sorted by last parameter
    return tuple(Layer(name, tuple(params)) for name, params in groups.items())


def layer_name(name: str, layer: str | Callable[[str], str]) -> str:
    """The name of the layer that the parameter ``name`` is in; ``layer`` as for ``group_layers``."""
    if callable(layer):
        return layer(name)
    if layer not in _GROUPINGS:
        raise SetupError(f"layer={layer!r}: expected 'module', 'block' or a function of a parameter's name")
    return _GROUPINGS[layer](name)


def module_of(name: str) -> str:
    """The FQN of the module that owns the parameter ``name``."""
    return name.rpartition(".")[0] or ROOT


def block_of(name: str) -> str:
    """The FQN of the outermost list element that the parameter ``name`` is in, else of its module."""
    parts = name.split(".")[:-1]
    for at, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: at + 1])
    return module_of(name)


_GROUPINGS: Mapping[str, Callable[[str], str]] = {"module": module_of, "block": block_of}


def layer_edges(
    layers: Sequence[Layer], book: TraceBook, named: Iterable[tuple[str, Tensor]] | None = None
) -> tuple[tuple[str, str], ...]:
    """Which layer's output reaches which layer's ops in the forward, through ops that have no parameters. Only the edges that no
    longer path implies, from the layer that is used first to the one used later (a shared layer called again makes no circle).
    ``named`` says what the names in ``layers`` stand for, if they are not the book's own. Sorted in forward order."""
    layer_of = {name: layer.name for layer in layers for name in layer.params}
    owner = {id(tensor): layer_of[name] for name, tensor in (named or book.models.names()) if name in layer_of}
    first_use: dict[str, int] = {}
    edges: set[tuple[str, str]] = set()
    for at, (users, feeders) in enumerate(_flow(book.traces(), owner)):
        for user in users:
            first_use.setdefault(user, at)
        edges |= {(a, b) for a in feeders for b in users if first_use[a] < first_use[b]}
    forward = sorted(first_use, key=first_use.__getitem__)
    return _reduced(forward, edges)


def _flow(traces: Sequence[JointTrace], owner: Mapping[int, str]) -> Iterable[tuple[set[str], set[str]]]:
    """For each use, in forward order: the layers whose parameters it reads, and those whose output it reads. A use without a
    layer (its parameters are not the optimizer's) passes on what reached it. What reaches a region from an earlier one is taken
    to come from the outputs of the one before."""
    came: set[str] = set()
    for trace in traces:
        layer = [owner.get(id(ref())) for ref, _ in trace.params]
        carries: list[set[str]] = []
        for use in trace.uses:
            users = {name for p in use.params if (name := layer[p]) is not None}
            feeders = set().union(*(came if i == EARLIER else carries[i] for i in use.inputs))
            carries.append(users or feeders)
            if users:
                yield users, feeders
        came = set().union(*(carries[i] for i in trace.outputs))


def _reduced(order: Sequence[str], edges: set[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The transitive reduction of ``edges``, all of which go forward in ``order``."""
    below: dict[str, set[str]] = {}
    kept = []
    rank = {name: at for at, name in enumerate(order)}
    for name in reversed(order):
        below[name] = set()
        for other in sorted((b for a, b in edges if a == name), key=rank.__getitem__):
            if other not in below[name]:
                kept.append((name, other))
                below[name] |= {other} | below[other]
    return tuple(sorted(kept, key=lambda edge: (rank[edge[0]], rank[edge[1]])))
