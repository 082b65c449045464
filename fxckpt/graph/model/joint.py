"""What the compiler shows of one training graph, and the book that keeps it for the run.

Two graphs are read. Dynamo's forward graph comes with every compile, so the *order* of layers is taken from
it alone: autograd runs the backward in the reverse order of the forward, so a gradient is final once the
backward has passed its parameter's first use. AOTAutograd's joint graph says it exactly
(``tests/graph/test_joint.py`` checks that both agree), but on a warm cache it is never built; where it is seen, its
positions are kept beside the order, which stays the same in a cold and a warm process.
"""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from fxckpt.compat.dynamo import compile_under_way, compiled_module, gradient_of, graph_input, input_index, is_view, source_name
from fxckpt.graph.model import names
from fxckpt.graph.model.forward import Forward, Use, walk

log = logging.getLogger("fxckpt")


@dataclass(frozen=True)
class ParamTrace:
    """What one graph says of one parameter.

    ``first_use`` is its first use in the region's forward graph, and decides the order. The other positions
    count nodes of the joint graph where ``origin`` is "joint"; where it is "dynamo", those of a forward of N
    ops followed by its mirror image. A partitioner that recomputes may read the parameter once more, later
    than ``last_read``.
    """

    name: str
    region: int
    first_use: int
    first_read: int
    last_read: int
    grad_final: int
    origin: str = "dynamo"


@dataclass(frozen=True)
class JointTrace:
    """One backend call: its trainable parameters and buffers, held weakly, and how data flows between their
    uses.

    ``inputs`` are Dynamo's placeholder indices of ``params``; ``uses`` count parameters as ``params`` does.
    An inference graph has neither. ``region`` is the graph's place in the order in which forwards run, -1
    before the book has given one.
    """

    region: int
    compiled: tuple[int | None, weakref.ref | None]  # see compile_under_way
    params: tuple[tuple[TensorWeakRef, ParamTrace], ...]
    inputs: tuple[int, ...]
    buffers: tuple[tuple[TensorWeakRef, str], ...]
    frozen: tuple[tuple[TensorWeakRef, str], ...]
    roots: tuple[weakref.ref, ...]
    uses: tuple[Use, ...]
    outputs: tuple[int, ...]
    owner: weakref.ref | None = None

    def __str__(self) -> str:
        rows = sorted((trace for _, trace in self.params), key=lambda t: (-t.first_use, t.grad_final))
        lines = [
            f"region {self.region}: {len(rows)} parameters, {len(self.buffers)} buffers",
            "  first use  first read  last read  gradient final  from    parameter",
        ]
        return "\n".join([*lines, *map(_row, rows)])


def _row(t: ParamTrace) -> str:
    positions = f"{t.first_use:9d}  {t.first_read:10d}  {t.last_read:9d}  {t.grad_final:14d}"
    return f"  {positions}  {t.origin:6s}  {t.name}"


@dataclass(frozen=True)
class JointRead:
    """Positions in a joint graph: the parameter's first and last reader, and where its gradient is final."""

    first_read: int
    last_read: int
    grad_final: int


def read_joint(graph: fx.Graph | fx.GraphModule) -> dict[int, JointRead]:
    """What AOTAutograd's joint graph says, by Dynamo placeholder index; nothing for inference and subgraphs.

    A view of a parameter shares its memory, so whoever reads the view reads the parameter.
    """
    graph = getattr(graph, "graph", graph)
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
    found, stack = [], [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                continue
            found.append(user)
            if is_view(user):
                stack.append(user)
    return found


def read_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> JointTrace:
    """What Dynamo's graph says. To be called inside the backend call: there its inputs are live."""
    live = _live_inputs(gm, example_inputs)
    roots = names.find_roots([source for tensor, source in live.values() if _of_a_module(tensor, source)])
    # A tensor that is in several roots has the name that the first gives it.
    params = {id(t): name for root in reversed(roots) for name, t in names.named_parameters(root)}
    buffers = {id(t): name for root in reversed(roots) for name, t in names.named_buffers(root)}
    if not roots:
        buffers = {id(t): _spelled(s) for t, s in live.values() if "._buffers[" in source_name(s)}

    def held(indices: Iterable[int], known: Mapping[int, str]) -> tuple[tuple[TensorWeakRef, str], ...]:
        wanted = [live[i] for i in indices]
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
        frozen=held([i for i, (t, _) in live.items() if _is_frozen(t)], params),
        roots=tuple(weakref.ref(root) for root in roots),
        uses=tuple(Use(tuple(place[p] for p in u.params if p in place), u.inputs) for u in forward.uses),
        outputs=forward.outputs,
        owner=compiled_module(),
    )


def _live_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, tuple[Tensor, Any]]:
    """The graph's tensor inputs that Dynamo can name, with their sources, by placeholder index."""
    nodes = gm.graph.find_nodes(op="placeholder")
    pairs = enumerate(graph_input(node, example) for node, example in zip(nodes, example_inputs))
    return {i: (t, source) for i, (t, source) in pairs if isinstance(t, Tensor) and source is not None}


def _of_the_same_class(trace: JointTrace, roots: Sequence[nn.Module]) -> list[nn.Module]:
    """The other modules of the class whose code was compiled, each once."""
    owner = None if trace.owner is None else trace.owner()
    if owner is None:
        return []
    found = {id(m): m for root in roots for _, m in names.named_modules(root) if type(m) is type(owner) and m is not owner}
    return list(found.values())


def _of_a_module(tensor: Tensor, source: Any) -> bool:
    return isinstance(tensor, nn.Parameter) or "._buffers[" in source_name(source)


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _spelled(source: Any) -> str:
    return names.name_from_source(source_name(source))


def _mirrored(name: str, forward: Forward, index: int) -> ParamTrace:
    """Positions in the forward followed by its mirror image, where each op stands for its backward."""
    first_use = forward.first_use[index]
    back = 2 * forward.length - 1 - first_use
    return ParamTrace(name, -1, first_use, forward.reads[index][0], back, back)


class TraceBook:
    """All that the compiler has shown, merged by parameter identity over graph breaks, splits, recompiles.

    ``listeners`` are called with each new trace inside the backend call, before the graph runs for the first
    time; an exception of theirs goes up to the user. An entry that is a weak reference
    (``weakref.WeakMethod``) is dropped when it dies. ``version`` grows with each record.
    """

    def __init__(self) -> None:
        self.version = 0
        self.listeners: list[Callable[[JointTrace], None] | weakref.ref] = []
        self._lock = threading.RLock()
        self._regions: dict[int, JointTrace] = {}
        self._next = 0
        self._params: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> {region: ParamTrace}
        self._arrivals: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> when its gradient arrived, an ordinal
        self._roots: list[weakref.ref] = []
        self._loose: dict[str, list[tuple[TensorWeakRef, str]]] = defaultdict(list)
        self._warned = False

    def record(self, trace: JointTrace) -> JointTrace:
        """Take in a new trace and tell the listeners; returns it with its region.

        A recompile of the same frame takes the place of what it recompiles: same frame, another compile of
        it, and a parameter in common. (Blocks with the same code share a frame, DDP's splits even a compile:
        they stay apart.)
        """
        with self._lock:
            self._know(trace)
            if trace.params:
                trace = self._place(trace)
            self.version += 1
        log.debug("traced a graph with %s", trace)
        self._tell(trace)
        return trace

    def _place(self, trace: JointTrace) -> JointTrace:
        alive = {r: t for r, t in self._regions.items() if any(ref() is not None for ref, _ in t.params)}
        self._regions = alive
        region = self._recompiled(trace)
        if region is None:
            region, self._next = self._next, self._next + 1
        else:
            log.debug("region %d was recompiled: the new graph takes the place of the old one", region)
        params = tuple((ref, replace(param, region=region)) for ref, param in trace.params)
        trace = replace(trace, region=region, params=params)
        self._regions[region] = trace
        for ref, param in trace.params:
            self._params.setdefault(ref(), {})[region] = param
        return trace

    def _recompiled(self, trace: JointTrace) -> int | None:
        frame, compiling = trace.compiled
        mine = {id(ref()) for ref, _ in trace.params}
        for region, old in self._regions.items():
            if frame is None or old.compiled[0] != frame:
                continue
            another = old.compiled[1] is None or compiling is None or old.compiled[1]() is not compiling()
            if another and any(id(ref()) in mine for ref, _ in old.params):
                return region
        return None

    def _know(self, trace: JointTrace) -> None:
        """Remember the models, and by reference what belongs to no model that could be found."""
        for root in trace.roots:
            parts = {id(m) for m in root().modules()}
            others = [other for other in self._roots if other() is not None and id(other()) not in parts]
            inside = any(id(root()) in {id(m) for m in other().modules()} for other in others)
            self._roots = others if inside else [*others, root]
        if not trace.roots:
            self._loose["params"] += [(ref, param.name) for ref, param in trace.params]
            self._loose["buffers"] += trace.buffers
            self._loose["frozen"] += trace.frozen

    def _tell(self, trace: JointTrace) -> None:
        for listener in list(self.listeners):
            call = listener() if isinstance(listener, weakref.ref) else listener
            if call is None:
                self.listeners.remove(listener)
            else:
                call(trace)

    def annotate(self, trace: JointTrace, reads: Mapping[int, JointRead]) -> None:
        """Keep the joint graph's positions, by placeholder index, in place of the mirrored ones. No new
        version.
        """
        with self._lock:
            if trace.region not in self._regions:
                return
            params = []
            for index, (ref, param) in zip(trace.inputs, trace.params):
                if index in reads:
                    param = replace(param, **vars(reads[index]), origin="joint")
                params.append((ref, param))
                if (tensor := ref()) is not None:
                    self._params.setdefault(tensor, {})[trace.region] = param
            self._regions[trace.region] = replace(trace, params=tuple(params))
        log.debug(
            "region %d: the joint graph gave exact positions of %d of %d parameters", trace.region, len(reads), len(trace.params)
        )

    def lookup(self, param: Tensor) -> ParamTrace | None:
        """What is known of ``param``, from the first region that uses it: there its gradient becomes final."""
        found = self._params.get(param)
        if not found:
            return None
        return found[next(iter(found)) if len(found) == 1 else max(found, key=self.places().__getitem__)]

    def traces(self) -> tuple[JointTrace, ...]:
        """The training graphs, in the order in which their forwards run."""
        places = self.places()
        return tuple(self._regions[region] for region in sorted(self._regions, key=places.__getitem__, reverse=True))

    def arrival(self, param: Tensor) -> int | None:
        """The place of ``param`` in the order in which gradients arrived, or None."""
        return self._arrivals.get(param)

    def places(self) -> dict[int, tuple[int, int]]:
        """A sort key for each region: the order in which their backwards ran.

        That is when a region's last gradient arrived, as far as arrivals are known; a region without any comes right after
        the region that follows it in the forward.
        """
        places, time = {}, -1
        for region in sorted(self._params_regions(), reverse=True):
            trace = self._regions.get(region)
            live = [p for ref, _ in (trace.params if trace else ()) if (p := ref()) is not None and p in self._arrivals]
            alone = [p for p in live if len(self._params[p]) == 1]  # one that others share is final in only one of them
            time = max((self._arrivals[p] for p in alone or live), default=time)
            places[region] = (time, -region)
        return places

    def _params_regions(self) -> set[int]:
        """All regions that a parameter may name, those whose models died since included."""
        return set(self._regions).union(*self._params.values())

    def arrived(self, params: Sequence[Tensor], model: nn.Module | None = None) -> None:
        """Take in the order in which the gradients of ``params`` arrived in a backward.

        It places what no graph shows: parameters of modules that are not compiled, and regions among each other. Blocks of
        one class that are compiled one by one (``block.compile()``) share the first one's code, so the compiler never shows
        the others: each gets a copy of the first one's trace. ``model`` is searched for them as the known models are.
        """
        with self._lock:
            start = 1 + max(self._arrivals.values(), default=-1)
            self._arrivals.update({p: start + at for at, p in enumerate(params)})
            roots = [root for ref in self._roots if (root := ref()) is not None]
            called = self.names_by_id()
            for trace in list(self._regions.values()):
                for block in _of_the_same_class(trace, [*roots, *([] if model is None else [model])]):
                    self._reuse(trace, block, called)
            self.version += 1

    def _reuse(self, trace: JointTrace, block: nn.Module, called: Mapping[int, str]) -> None:
        """Record that the code of ``trace`` also ran for ``block``, if its gradients arrived together and unexplained."""
        theirs = {id(p): name for name, p in names.named_parameters(trace.owner())}
        mine = dict(names.named_parameters(block))
        pairs = [(p, mine.get(theirs.get(id(p)), p), param) for ref, param in trace.params if (p := ref()) is not None]
        new = [p for _, p, _ in pairs if p not in self._params]
        times = sorted(self._arrivals.get(p, -1) for p in new)
        together = bool(new) and times[0] >= 0 and times[-1] - times[0] == len(new) - 1
        if not together or any(p.shape != old.shape for old, p, _ in pairs):
            return
        region, self._next = self._next, self._next + 1
        params = tuple(
            (TensorWeakRef(p), replace(param, region=region, name=called.get(id(p), param.name))) for _, p, param in pairs
        )
        self._regions[region] = replace(trace, region=region, params=params, owner=weakref.ref(block))
        for ref, param in params:
            self._params.setdefault(ref(), {})[region] = param
        log.debug(
            "region %d: the code of region %d, compiled once, also serves %d parameters like %s",
            region,
            trace.region,
            len(params),
            params[0][1].name,
        )

    def names(self) -> list[tuple[str, nn.Parameter]]:
        """Each parameter of the models that were seen, with its FQN; with two models, a name may be there
        twice.
        """
        return self._all(names.named_parameters, "params", None)

    def name_of(self, param: Tensor) -> str | None:
        """The FQN of ``param``, also where no graph has used it (an ``nn.LSTM`` is never compiled)."""
        return self.names_by_id().get(id(param))

    def names_by_id(self) -> dict[int, str]:
        """``name_of`` for all parameters at once: finding them takes a walk through the models, however many are asked for."""
        return {id(param): name for name, param in self.names()}

    def buffers(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, Tensor]]:
        """The buffers ``state_dict`` would hold, as they are now; ``of``: only of models that own one of
        these.
        """
        return self._all(names.named_buffers, "buffers", of)

    def transient(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, Tensor]]:
        """The buffers ``state_dict`` would leave out; ``of`` as for ``buffers``."""
        return self._all(partial(names.named_buffers, persistent=False), "transient", of)

    def frozen(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, nn.Parameter]]:
        """The parameters that do not require grad; ``of`` as for ``buffers``."""
        return [(name, p) for name, p in self._all(names.named_parameters, "frozen", of) if _is_frozen(p)]

    def _all(self, read: Callable[[nn.Module], list], loose: str, of: Iterable[Tensor] | None) -> list:
        wanted = None if of is None else {id(t) for t in of}
        with self._lock:
            roots = [root() for root in self._roots if root() is not None]
            if wanted is not None:
                roots = [root for root in roots if any(id(p) in wanted for p in root.parameters())]
            found = {id(t): (name, t) for ref, name in self._loose[loose] if (t := ref()) is not None}
            found |= {id(t): (name, t) for root in roots for name, t in read(root)}
        return list(found.values())

    def could_not_read(self, what: str, error: Exception) -> None:
        """Say once that a graph could not be read. Training goes on; the order falls back to reverse
        registration.
        """
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        log.log(
            level,
            "could not read %s (%s: %s). Training is not affected; parameters that were not seen are checkpointed last.",
            what,
            type(error).__name__,
            error,
        )
        log.debug("the traceback:", exc_info=error)


traces = TraceBook()
"""What the compiler has shown in this process, for all runs."""
