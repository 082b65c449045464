"""Runs the graph part of a step: the layers' updates, by calls that are made when other parameters take part than before."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch

from fxckpt.graph import sections, step_graph
from fxckpt.graph.model.layers import Layer, Place
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.calls import Call, Inputs, ScalarGroup, calls_for, shared
from fxckpt.optim.held import HeldWeakly

log: logging.Logger = logging.getLogger("fxckpt")

_version_of = operator.attrgetter("_version")


@dataclass(frozen=True)
class Arranged:
    """The parameters of one binding in their layers, and the StepGraph that was written for them."""

    graph: step_graph.StepGraph
    members: list[BoundParam]
    params: list[torch.Tensor]
    numbers: Sequence[int]  # the engine's, of the layers
    counts_number: int | None  # and of the counts
    owned: list[list[BoundParam]]  # by layer
    counts: list[torch.Tensor]
    handed_over: list[tuple[int, list[torch.Tensor]]]  # in each emit, by the engine's number
    spread: bool  # some are DTensors, whose updates are of this rank's parts


@dataclass(frozen=True)
class Prepared:
    """The calls that update certain parameters, and what those share."""

    made_for: object = None
    groups: list[ScalarGroup] = field(default_factory=list)
    branching: list[ScalarGroup] = field(default_factory=list)  # whose program is another one for other counts
    by_layer: list[list[Call]] = field(default_factory=list)
    at_once: list[Call] = field(default_factory=list)


class Executor:
    """The StepGraph of one optimizer, and the calls behind its update nodes."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt
        self._versions: list[int] = []  # of the counts, when they were advanced last
        self._gradients: Sequence[torch.Tensor | None] = ()  # while a step runs
        self.gradients: list[torch.Tensor | None] = []  # of a step that runs in sections, put here before each layer's turn
        self.standing: step_graph.Standing | None = None  # see StepGraph.standing
        self._refused = ""  # why the step is no op of a compiled function's graph
        self._sections: tuple[object, sections.Sections] | None = None  # and the graph that they were cut from
        self._spread: tuple[int | None, Inputs] | None = None  # the step that runs in sections: the run's number, its inputs
        self.journals: bool = False  # the StepGraph hands gradients over, too
        self.arrange([], (), (), (), None, {})

    def arrange(
        self,
        members: list[BoundParam],
        layers: Sequence[Layer],
        edges: Sequence[tuple[str, str]],
        numbers: Sequence[int],
        counts_number: int | None,
        places: Mapping[str, Place],
    ) -> None:
        """Write the StepGraph for these layers, by the engine's numbers of them and of the counts (None: there are none)."""
        by_name = {m.name: m for m in members}
        owned = [[by_name[n] for n in layer.params] for layer in layers]
        counts = [t for m in members for _, t in m.counts()]
        handed_over = [(number, [t for m in each for _, t in m.tensors()]) for number, each in zip(numbers, owned)]
        sizes = {layer.name: sum(t.nbytes for t in tensors) for layer, (_, tensors) in zip(layers, handed_over)}
        if counts_number is not None:
            handed_over.insert(0, (counts_number, counts))
        clocks = tuple(step_graph.UpdateTimer() for _ in layers)
        update, logged = (lambda i: self._layer_update(i, clocks[i])), self._layer_gradients if self.journals else None
        chosen = step_graph.step_passes(layers, numbers, counts_number, update, self._scalars, logged)
        module = step_graph.build(chosen)
        graph = step_graph.StepGraph(tuple(layers), tuple(edges), module, sizes, clocks, places, self._standing_of(layers))
        params, spread = [m.param for m in members], any(m.local is not m.param for m in members)
        self.arranged: Arranged = Arranged(graph, members, params, numbers, counts_number, owned, counts, handed_over, spread)
        self.prepared: Prepared = Prepared()  # the calls were another layer's
        log.debug("wrote the StepGraph: %d layers in the order %s", len(layers), [layer.name for layer in layers])

    def refuse_graph(self, why: str) -> None:
        """A compiled function calls the step outside of its graph: the layers stand where they do for this reason."""
        self._refused = why
        graph = replace(self.arranged.graph, standing=self._standing_of(self.arranged.graph.layers))
        self.arranged = replace(self.arranged, graph=graph)

    def _standing_of(self, layers: Sequence[Layer]) -> Mapping[str, str] | None:
        """See ``StepGraph.standing``."""
        if self.standing is None and self._refused:
            return dict.fromkeys((layer.name for layer in layers), self._refused)
        return self.standing

    def _layer_update(self, index: int, clock: step_graph.UpdateTimer) -> Callable[[list[torch.Tensor], Inputs], None]:
        """The callable of one update node. It changes ``tensors``, to which the calls behind it are bound already."""

        def run(tensors: list[torch.Tensor], step: Inputs) -> None:
            calls = self.prepared.by_layer[index]
            if not calls:
                return  # no gradient, or the own part updated this one
            start = perf_counter()
            for call in calls:
                call(step)
            clock.add(perf_counter() - start)

        return run

    def _layer_gradients(self, index: int) -> Callable[[Inputs], list[torch.Tensor | None]]:
        """The callable that takes the gradients of one layer out of a step's inputs."""

        def run(step: Inputs) -> list[torch.Tensor | None]:
            return [step.gradients[member.index] for member in self.arranged.owned[index]]

        return run

    def prepare(self, made_for: object, group_of: Mapping[int, ScalarGroup]) -> None:
        """Write the calls of all layers, for the parameters that have a group (by ``BoundParam.index``)."""
        owned, self._versions = self.arranged.owned, list(map(_version_of, self.arranged.counts))
        groups = list(dict.fromkeys(group_of.values()))
        by_layer = [calls_for(each, group_of) for each in owned]
        at_once = shared(calls_for([m for each in owned for m in each], group_of))
        self.prepared = Prepared(made_for, groups, [g for g in groups if g.program.outcomes], by_layer, at_once)
        calls = f"{sum(map(len, by_layer))} calls with checkpoint ops, {len(at_once)} without"
        log.debug("bucketed %d parameters (%d sets of scalars): %s", len(group_of), len(groups), calls)

    def untouched(self) -> bool:
        """Were the counts changed by nothing but our own steps since these were prepared?"""
        return list(map(_version_of, self.arranged.counts)) == self._versions

    def run(self, number: int | None, gradients: Sequence[torch.Tensor | None]) -> None:
        """Update what was prepared, given the gradient of each parameter; ``number`` as in ``Strategy.run``."""
        self._gradients = gradients
        try:
            if number is None:
                step = self._scalars()
                for call in self.prepared.at_once:
                    call(step)
            else:
                self.arranged.graph.module.forward(number, *(tensors for _, tensors in self.arranged.handed_over))
        finally:
            self._gradients = ()  # whoever drops them has their memory back
            if self.arranged.spread:  # autograd looks at the counter of a DTensor, and the part that was updated has its own
                torch.autograd.graph.increment_version(self.arranged.params)

    def begin(self, number: int | None, gradients: list[torch.Tensor | None]) -> None:
        """Begin a step whose layers are updated one by one: all counts advance, and ``gradients`` is read when a layer's turn
        comes. ``number`` as in ``Strategy.run``."""
        self._gradients = self.gradients = gradients
        step = self._scalars() if number is None else self._cut().begin.forward(number, *self._counts())
        self._spread = number, step

    def section(self, index: int) -> None:
        """One layer of the step that was begun: with its ops, if that has them."""
        assert self._spread is not None, "no step was begun"
        number, step = self._spread
        if number is None:
            for call in self.prepared.by_layer[index]:
                call(step)
        else:
            tensors = self.arranged.handed_over[index + len(self._counts())][1]
            self._cut().layers[index].forward(number, tensors, step)

    def use_up(self, place: int, gradients: list[torch.Tensor | None]) -> list[BoundParam]:
        """One layer of the step that was begun, in the middle of a backward: take its gradients out of these, by the indices of
        its parameters, and free their memory behind the update. Returns whose they were."""
        with torch.no_grad():
            self.section(place)
        used = []
        for member in self.arranged.owned[place]:
            gradient, gradients[member.index] = gradients[member.index], None
            if gradient is not None:
                gradient.untyped_storage().resize_(0)
                used.append(member)
        return used

    def end(self) -> None:
        """The step that was begun has come to its end, or was left."""
        self._gradients, self.gradients, self._spread = (), [], None

    def _counts(self) -> list[list[torch.Tensor]]:
        """What the StepGraph has in front of its layers."""
        return [] if self.arranged.counts_number is None else [self.arranged.handed_over[0][1]]

    def _cut(self) -> sections.Sections:
        """The StepGraph in pieces, cut when they are asked for first."""
        module = self.arranged.graph.module
        if self._sections is None or self._sections[0] is not module:
            self._sections = module, sections.cut(module)
        return self._sections[1]

    def _scalars(self, counts: Sequence[torch.Tensor] = ()) -> Inputs:
        """Advance the counts (the graph passes them to show what is changed) and compute every group's scalars."""
        groups = self.opt.param_groups
        values = [scalar_group.scalars(groups[scalar_group.group]) for scalar_group in self.prepared.groups]
        self._versions = list(map(_version_of, self.arranged.counts))
        return Inputs(values, self._gradients)
