"""What one backend call shows of a training graph.

Dynamo's forward graph comes with every compile, so the *order* of layers is taken from it alone: autograd runs the backward in
the reverse order of the forward, so a gradient is final once the backward has passed its parameter's first use. AOTAutograd's
joint graph says it exactly (``tests/graph/test_joint.py`` checks that both agree), but on a warm cache it is never built: where
it is seen, its positions are kept beside the order, which is the same in a cold and a warm process.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from fxckpt.compat.dynamo import compile_under_way, compiled_module, gradient_of, graph_input, input_index, is_view, source_name
from fxckpt.compat.spread import sharded_of
from fxckpt.graph.model import names
from fxckpt.graph.model.forward import Forward, Use, walk


@dataclass(frozen=True)
class ParamTrace:
    """What one graph says of one parameter. ``first_use`` is its first use in the region's forward graph, and decides the order.
    The other positions count nodes of the joint graph where ``origin`` is "joint"; where it is "dynamo", those of a forward of N
    ops followed by its mirror image. A partitioner that recomputes may read the parameter once more, later than ``last_read``."""

    name: str
    region: int
    first_use: int
    first_read: int
    last_read: int
    grad_final: int
    origin: str = "dynamo"


@dataclass(frozen=True)
class JointTrace:
    """One backend call: its trainable parameters and buffers, held weakly, and how data flows between their uses. ``inputs`` are
    Dynamo's placeholder indices of ``params``; ``uses`` count parameters as ``params`` does. An inference graph has neither.
    ``region`` is the graph's place in the order in which forwards run, -1 before the book has given one."""

    region: int
    compiled: tuple[int | None, weakref.ref[Any] | None]  # see compile_under_way
    params: tuple[tuple[TensorWeakRef, ParamTrace], ...]
    inputs: tuple[int, ...]
    buffers: tuple[tuple[TensorWeakRef, str], ...]
    frozen: tuple[tuple[TensorWeakRef, str], ...]
    roots: tuple[weakref.ref[Any], ...]
    uses: tuple[Use, ...]
    outputs: tuple[int, ...]
    owner: weakref.ref[Any] | None = None

    def __str__(self) -> str:
        lines = [f"region {self.region}: {len(self.params)} parameters, {len(self.buffers)} buffers"]
        lines += ["  first use  first read  last read  gradient final  from    parameter"]
        for t in sorted((trace for _, trace in self.params), key=lambda t: (-t.first_use, t.grad_final)):
            positions = f"{t.first_use:9d}  {t.first_read:10d}  {t.last_read:9d}  {t.grad_final:14d}"
            lines.append(f"  {positions}  {t.origin:6s}  {t.name}")
        return "\n".join(lines)


@dataclass(frozen=True)
class JointRead:
    """Positions in a joint graph: the parameter's first and last reader, and where its gradient is final."""

    first_read: int
    last_read: int
    grad_final: int


def read_joint(graph: fx.Graph | fx.GraphModule) -> dict[int, JointRead]:
    """What AOTAutograd's joint graph says, by Dynamo placeholder index; nothing for inference and subgraphs. A view of a
    parameter shares its memory, so whoever reads the view reads the parameter."""
    if isinstance(graph, fx.GraphModule):
        graph = graph.graph
    position = {node: at for at, node in enumerate(graph.nodes)}
    final = _gradients(graph, position)
    found = {}
    for node in graph.nodes:
        index = input_index(node.meta.get("desc")) if node.op == "placeholder" else None
        if index in final and (readers := [position[n] for n in _readers(node)]):
            found[index] = JointRead(min(readers), max(readers), final[index])
    return found


def _gradients(graph: fx.Graph, position: Mapping[fx.Node, int]) -> dict[int, int]:
    output = next(iter(graph.find_nodes(op="output")))
    final: dict[int, int] = {}
    for node, desc in zip(tree_leaves(output.args), output.meta.get("desc") or ()):
        index = gradient_of(desc)
        if index is None or not isinstance(node, fx.Node):
            continue
        while node.target is operator.getitem:  # one of several results: they are all there at once
            node = node.args[0]
        final[index] = max(position[node], final.get(index, 0))
    return final


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the memory of ``node``, through views too."""
    found = [user for user in node.users if user.op != "output"]
    for user in found:
        found += [reader for reader in user.users if is_view(user) and reader.op != "output"]
    return found


def read_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> JointTrace:
    """What Dynamo's graph says. To be called inside the backend call: there its inputs are live."""
    pairs = map(graph_input, gm.graph.find_nodes(op="placeholder"), example_inputs)
    # Its tensor inputs that Dynamo can name, with their sources, by placeholder index.
    live = {i: (t, source) for i, (t, source) in enumerate(pairs) if isinstance(t, Tensor) and source is not None}
    buffered = {i: source for i, (_, source) in live.items() if "._buffers[" in source_name(source)}
    roots = names.find_roots([source for i, (t, source) in live.items() if isinstance(t, nn.Parameter) or i in buffered])
    # A tensor that is in several roots has the name that the first gives it.
    params = {id(t): name for root in reversed(roots) for name, t in names.named_parameters(root)}
    buffers = {id(t): name for root in reversed(roots) for name, t in names.named_buffers(root)}
    if not roots:
        buffers = {id(live[i][0]): _spelled(source) for i, source in buffered.items()}

    sharded = sharded_of(roots)

    def held(indices: Iterable[int], known: Mapping[int, str]) -> tuple[tuple[TensorWeakRef, str], ...]:
        wanted = [(sharded.get(id(t), t), source) for t, source in (live[i] for i in indices)]
        return tuple((TensorWeakRef(t), known.get(id(t)) or _spelled(s)) for t, s in wanted)

    forward = walk(gm, [i for i, (t, _) in live.items() if t.requires_grad and t.is_leaf])
    seen = tuple(i for i in live if i in forward.first_use)
    place = {index: at for at, index in enumerate(seen)}
    return JointTrace(
        region=-1,
        compiled=compile_under_way(),
        params=tuple((ref, _mirrored(name, forward, i)) for (ref, name), i in zip(held(seen, params), seen)),
        inputs=seen,
        buffers=held([i for i, (t, _) in live.items() if id(t) in buffers], buffers),
        frozen=held([i for i, (t, _) in live.items() if is_frozen(t)], params),
        roots=tuple(weakref.ref(root) for root in roots),
        uses=tuple(Use(tuple(place[p] for p in u.params if p in place), u.inputs) for u in forward.uses),
        outputs=forward.outputs,
        owner=compiled_module(),
    )


def is_frozen(tensor: Tensor) -> bool:
    """A parameter that does not require grad."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _spelled(source: Any) -> str:
    return names.name_from_source(source_name(source))


def _mirrored(name: str, forward: Forward, index: int) -> ParamTrace:
    """Positions in the forward followed by its mirror image, where each op stands for its backward."""
    first_use = forward.first_use[index]
    back = 2 * forward.length - 1 - first_use
    return ParamTrace(name, -1, first_use, forward.reads[index][0], back, back)
