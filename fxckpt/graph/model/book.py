"""The book of all that the compiler has shown in this process: regions, their order, and the parameters in them."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from fxckpt.compat.modules import every_module
from fxckpt.graph.backward.region import Region
from fxckpt.graph.model import names
from fxckpt.graph.model.joint import JointRead, JointTrace, ParamTrace, is_frozen

log: logging.Logger = logging.getLogger("fxckpt")


def _of_the_same_class(owner: nn.Module, roots: Sequence[nn.Module]) -> list[nn.Module]:
    """The other modules of this one's class, each once."""
    found = {id(m): m for root in roots for _, m in every_module(root) if type(m) is type(owner) and m is not owner}
    return list(found.values())


class KnownModels:
    """The models that were seen, held weakly, and by reference what belongs to no model that could be found. ``of`` in a method:
    only of models that own one of these parameters."""

    def __init__(self, lock: threading.RLock):
        self._lock = lock  # the book's
        self._models: list[weakref.ref[nn.Module]] = []
        self._loose: dict[str, list[tuple[TensorWeakRef, str]]] = defaultdict(list)

    def add(self, trace: JointTrace) -> None:
        """Take in the models of a new trace; one that is part of another is not kept."""
        for root in (found for ref in trace.roots if (found := ref()) is not None):
            parts = {id(m) for m in root.modules()}
            others = [other for other in self.alive() if id(other) not in parts]
            inside = any(root is m for other in others for m in other.modules())
            self._models = [weakref.ref(m) for m in (others if inside else [*others, root])]
        if not trace.roots:
            self._loose["params"] += [(ref, param.name) for ref, param in trace.params]
            self._loose["buffers"] += trace.buffers
            self._loose["frozen"] += trace.frozen

    def alive(self) -> list[nn.Module]:
        """The models, less those that died."""
        return [model for ref in self._models if (model := ref()) is not None]

    def names(self) -> list[tuple[str, nn.Parameter]]:
        """Each parameter of the models that were seen, with its FQN; with two models, a name may be there twice."""
        return self._all(names.named_parameters, "params", None)

    def name_of(self, param: Tensor) -> str | None:
        """The FQN of ``param``, also where no graph has used it (an ``nn.LSTM`` is never compiled)."""
        return self.names_by_id().get(id(param))

    def names_by_id(self) -> dict[int, str]:
        """``name_of`` for all parameters at once: finding them takes a walk through the models, however many are asked for."""
        return {id(param): name for name, param in self.names()}

    def buffers(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, Tensor]]:
        """The buffers ``state_dict`` would hold, as they are now."""
        return self._all(names.named_buffers, "buffers", of)

    def transient(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, Tensor]]:
        """The buffers ``state_dict`` would leave out."""
        return self._all(partial(names.named_buffers, persistent=False), "transient", of)

    def frozen(self, of: Iterable[Tensor] | None = None) -> list[tuple[str, nn.Parameter]]:
        """The parameters that do not require grad."""
        return [(name, p) for name, p in self._all(names.named_parameters, "frozen", of) if is_frozen(p)]

    def _all(self, read: Callable[[nn.Module], list[Any]], loose: str, of: Iterable[Tensor] | None) -> list[Any]:
        wanted = None if of is None else {id(t) for t in of}
        with self._lock:
            models = [m for m in self.alive() if wanted is None or any(id(p) in wanted for p in m.parameters())]
            found = {id(t): (name, t) for ref, name in self._loose[loose] if (t := ref()) is not None}
            found |= {id(t): (name, t) for model in models for name, t in read(model)}
        return list(found.values())


class Placer(Protocol):
    """A run that wants updates placed in the backwards that are compiled from now on; ``number`` is the run's."""

    number: int

    def layer_of(self, names: dict[int, str], tensor: Tensor) -> tuple[str, str] | None:
        """The name of a parameter and that of its layer, if the run trains it; ``names``: what is known, by identity."""

    def watched(self, region: Region, inner: Callable[..., Any]) -> Callable[..., Any]:
        """What is to be called in place of the compiled region."""

    def around(self, region: Region, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The same, of the compiled piece that stands before the step in the graph of a whole step."""


class TraceBook:
    """All that the compiler has shown, merged by parameter identity over graph breaks, splits, recompiles. ``listeners`` (those
    that are weak references are dropped when they die) are called with each new trace inside the backend call, before the graph
    runs for the first time; their exceptions go up to the user. ``version`` grows with each record."""

    def __init__(self) -> None:
        self.version: int = 0
        self.listeners: list[Callable[[JointTrace], None] | weakref.ref[Any]] = []
        self._lock = threading.RLock()
        self.models: KnownModels = KnownModels(self._lock)
        self._regions: dict[int, JointTrace] = {}
        self._next = 0
        self._params: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> {region: ParamTrace}
        self._arrivals: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> when its gradient arrived, an ordinal
        self._warned = False
        self.placers: weakref.WeakSet[Placer] = weakref.WeakSet()  # the runs with updates="in_backward"

    def forget_who_waits(self) -> None:
        """In a forked child: a thread of the parent may have had the lock."""
        self._lock = self.models._lock = threading.RLock()

    def record(self, trace: JointTrace) -> JointTrace:
        """Take in a new trace and tell the listeners; returns it with its region. A recompile of the same frame takes the place
        of what it recompiles: same frame, another compile of it, and a parameter in common. (Blocks with the same code share a
        frame, DDP's splits even a compile: they stay apart.)"""
        with self._lock:
            self.models.add(trace)
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

    def _tell(self, trace: JointTrace) -> None:
        for listener in list(self.listeners):
            call = listener() if isinstance(listener, weakref.ref) else listener
            if call is None:
                self.listeners.remove(listener)
            else:
                call(trace)

    def annotate(self, trace: JointTrace, reads: Mapping[int, JointRead]) -> None:
        """Keep the joint graph's positions, by placeholder index, in place of the mirrored ones. No new version."""
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
        exact = f"{len(reads)} of {len(trace.params)} parameters"
        log.debug("region %d: the joint graph gave exact positions of %s", trace.region, exact)

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
        """A sort key for each region: the order in which their backwards ran. That is when a region's last gradient arrived, as
        far as arrivals are known; a region without any comes right after the region that follows it in the forward."""
        places, time = {}, -1
        named = set(self._regions).union(*self._params.values())  # parameters name regions whose models died since, too
        for region in sorted(named, reverse=True):
            trace = self._regions.get(region)
            live = [p for ref, _ in (trace.params if trace else ()) if (p := ref()) is not None and p in self._arrivals]
            alone = [p for p in live if len(self._params[p]) == 1]  # one that others share is final in only one of them
            time = max((self._arrivals[p] for p in alone or live), default=time)
            places[region] = (time, -region)
        return places

    def arrived(self, params: Sequence[Tensor], model: nn.Module | None = None) -> None:
        """Take in the order in which the gradients of ``params`` arrived in a backward. It places what no graph shows: parameters
        of modules that are not compiled, and regions among each other. Blocks of one class that are compiled one by one share the
        first one's code, which alone is shown: each gets a copy of its trace. ``model`` is searched for them, too."""
        with self._lock:
            start = 1 + max(self._arrivals.values(), default=-1)
            self._arrivals.update({p: start + at for at, p in enumerate(params)})
            roots = [*self.models.alive(), *([] if model is None else [model])]
            called = self.models.names_by_id()
            for trace in list(self._regions.values()):
                if trace.owner is not None and (owner := trace.owner()) is not None:
                    for block in _of_the_same_class(owner, roots):
                        self._reuse(trace, owner, block, called)
            self.version += 1

    def _reuse(self, trace: JointTrace, owner: nn.Module, block: nn.Module, called: Mapping[int, str]) -> None:
        """Record that ``owner``'s code also ran for ``block``, if its gradients arrived together and unexplained."""
        mine = dict(names.named_parameters(block))
        twins = {id(p): mine[name] for name, p in names.named_parameters(owner) if name in mine}
        pairs = [(p, twins.get(id(p), p), param) for ref, param in trace.params if (p := ref()) is not None]
        new = [p for _, p, _ in pairs if p not in self._params]
        times = sorted(self._arrivals.get(p, -1) for p in new)
        together = bool(new) and times[0] >= 0 and times[-1] - times[0] == len(new) - 1
        if not together or any(p.shape != old.shape for old, p, _ in pairs):
            return
        region, self._next = self._next, self._next + 1
        copies = (replace(param, region=region, name=called.get(id(p), param.name)) for _, p, param in pairs)
        params = tuple((TensorWeakRef(p), copied) for (_, p, _), copied in zip(pairs, copies))
        self._regions[region] = replace(trace, region=region, params=params, owner=weakref.ref(block))
        for ref, param in params:
            self._params.setdefault(ref(), {})[region] = param
        code, like = f"the code of region {trace.region}, compiled once", params[0][1].name
        log.debug("region %d: %s, also serves %d parameters like %s", region, code, len(params), like)

    def could_not_read(self, what: str, error: Exception) -> None:
        """Say once that a graph could not be read. Training goes on; the order falls back to reverse registration."""
        level, self._warned = logging.DEBUG if self._warned else logging.WARNING, True
        rest = "Training is not affected; parameters that were not seen are checkpointed last."
        log.log(level, "could not read %s (%s: %s). %s", what, type(error).__name__, error, rest)
        log.debug("the traceback:", exc_info=error)


traces: TraceBook = TraceBook()
"""What the compiler has shown in this process, for all runs."""

os.register_at_fork(after_in_child=traces.forget_who_waits)
