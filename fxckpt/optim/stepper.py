"""Run one optimizer's steps through its StepGraph.

Which code updates a parameter depends only on its state and on the step's inputs, never on how the process came there;
so a step after a restart is the same step:

* no state yet, and the stock step would make some: the stock step runs, on those parameters alone;
* state, and a traced update: the StepGraph;
* an optimizer that cannot be split: its stock step, whole, every time;
* an optimizer that is not of ``torch.optim``: see rehearsal.py.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from fxckpt.compat import cuda
from fxckpt.compat.optimizers import default_implementation, is_stock, plain_class, settings_of, stock_step
from fxckpt.errors import SetupError
from fxckpt.graph import step_graph
from fxckpt.graph.model.layers import Layer, Place
from fxckpt.graph.update import inductor
from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.specialize import specialize
from fxckpt.graph.update.trace import (
    MakesState,
    NotTraceable,
    Signature,
    is_count,
    numeric_items,
    signature_of,
    tensor_items,
)
from fxckpt.optim.calls import Inputs, ScalarGroup, calls_for, gradient_of, shared
from fxckpt.optim.rehearsal import Rehearsal

log = logging.getLogger("fxckpt")

_shared_programs: dict[Signature, list[Program]] = {}
"""Traced updates of torch.optim's classes, for all runs of the process."""

_END = object()
"""Behind the last tensor, so that one more or one less is another sequence."""

_version_of, _params_of = operator.attrgetter("_version"), operator.itemgetter("params")


def _is_dense(value: Any) -> bool:
    """Is it a tensor with memory of its own? Sparse gradients make sparse momentum."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _fixed(value: Any) -> Any:
    """Of an entry of a group what is part of the traced update: an integer, a flag; of anything else its type."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_fixed, value))
    return value if value is None or isinstance(value, (bool, int, str)) else type(value)


class BoundParam:
    """One parameter of the optimizer, with the tensors that were bound to it."""

    __slots__ = (
        "address",
        "compile",
        "entries",
        "flat",
        "group",
        "implementation",
        "index",
        "items",
        "name",
        "param",
        "program",
        "state",
    )

    def __init__(self, name: str, param: torch.Tensor, group: int, index: int, state: dict[str, Any] | None):
        self.name, self.param, self.group, self.state = name, param, group, state
        self.index = index  # among all of its optimizer
        self.address = param.data_ptr()
        self.entries = len(state or ())
        tensors = ((k, v) for k, v in sorted((state or {}).items()) if _is_dense(v))
        self.items = [(key, value, value.data_ptr()) for key, value in tensors]
        self.program: Program | None = None
        self.implementation = "single"
        self.compile = False
        self.flat = False  # its update is compiled, over its elements in the order of memory

    def stale(self) -> bool:
        """Was a tensor of it replaced or moved since it was bound? Whether ``state`` is the optimizer's is asked there."""
        if self.param.data_ptr() != self.address:
            return True
        if self.state is None:
            return False
        if len(self.state) != self.entries:
            return True
        get = self.state.get
        return any(get(key) is not value or value.data_ptr() != address for key, value, address in self.items)

    def bound(self, kind: str, key: Any) -> torch.Tensor | None:
        """The tensor behind one input of a program; None for the gradient, another one at every step."""
        return self.param if kind == "param" else self.state[key] if kind == "state" else None

    @property
    def plain(self) -> bool:
        """Does it have state that is no tensor, or a sparse one, which may change without a new binding?"""
        return self.state is not None and len(self.items) != len(self.state)

    def twin(self) -> BoundParam:
        """A member with copies of its tensors."""
        with torch.no_grad():
            param = self.param.detach().clone()
            param.grad = None if self.param.grad is None else self.param.grad.detach().clone()
            state = (
                None
                if self.state is None
                else {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in self.state.items()}
            )
        return BoundParam(self.name, param, self.group, self.index, state)

    def describe(self) -> dict[str, Any]:
        """Its state for the record: what it takes, with the files' tensors, to make it anew just as it is."""
        return {
            "keys": list(self.state),
            "strides": {k: tuple(t.stride()) for k, t, _ in self.items if not t.is_contiguous()},
            "complex": [k for k, t, _ in self.items if t.is_complex()],
            "plain": {k: v for k, v in self.state.items() if not _is_dense(v)},
            "host": [k for k, t, _ in self.items if t.device.type == "cpu" and self.param.device.type != "cpu"],
        }

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What the layer owns of this parameter: ``("", parameter)`` and its state by key, less the counts."""
        return [("", self.param)] + [(k, v) for k, v, _ in self.items if not is_count(k, v, self.param)]

    def counts(self) -> list[tuple[str, torch.Tensor]]:
        """The 0-dimensional states, which advance before all updates."""
        return [(k, v) for k, v, _ in self.items if is_count(k, v, self.param)]


class Stepper:
    """The step of one optimizer: its members, their programs, and the StepGraph that runs.

    ``update``: ``None`` (kept as flagged, compiled where the choice was left to PyTorch), ``"native"``, ``"inductor"``.
    """

    def __init__(self, opt: torch.optim.Optimizer, update_mode: str | None, name_of: Callable[[torch.Tensor], str]):
        self.opt, self.mode, self.name_of = opt, update_mode, name_of
        self.whole: str | None = None
        self.rehearsal = None if is_stock(opt) else Rehearsal(opt)
        self.members: list[BoundParam] = []
        self.layers: tuple[Layer, ...] = ()
        self.edges: tuple[tuple[str, str], ...] = ()
        self.first_layer = 0
        self.graph: step_graph.StepGraph | None = None
        self.stepped = False  # in this process
        self.accumulated = True  # gradients may have arrived since its last step
        self.halfway = False  # a step is under way, or was left by an exception: some layers may be updated and some not
        self.bound = 0  # how often tensors were bound: a plan made for another binding is void
        self._programs: dict[Signature, list[Program] | NotTraceable] = {}  # one for each way to branch
        self._warned = False  # of state that belongs to no parameter
        self._refused = False  # Inductor could not take an update, which was said
        self._state: Any = None
        self._states: list[dict[str, Any]] = []
        self._structure: list[tuple] = []
        self._names: list[str] = []  # of the entries of the groups, when they were compared last, ...
        self._values: list[Any] = []  # ... and their values
        self._params: list[torch.Tensor] = []  # those of the groups
        self._gradients: list[torch.Tensor | None] = []  # theirs, while a step runs
        self._complete = False  # none of those is missing, as far as is known
        self._everyone: list[bool] = []  # the mask of such a step
        self._mixed: list[BoundParam] = []  # with state that is no tensor, or a sparse one
        self._simple: list[dict[str, Any]] = []  # the states of the others, ...
        self._held: list[Any] = []  # ... the tensors in them, and _END, ...
        self._tensors: list[torch.Tensor] = []  # ... those and their parameters, ...
        self._addresses: list[int] = []  # ... and where they were when they were bound
        self._fixed: list[torch.Tensor] = []  # those of them whose place matters between copies, too
        self._fixed_addresses: list[int] = []
        self._unready = True  # some member has no program
        self._mask: list[bool] = []
        self._done: set[int] = set()
        self._scalar_groups: list[ScalarGroup] = []
        self._branching: list[ScalarGroup] = []  # those whose program is another one for other counts
        self._calls: list[list[Callable]] = []
        self._all_calls: list[Callable] = []
        self._versions: list[int] = []
        self._count_tensors: list[torch.Tensor] = []

    # -- binding ----------------------------------------------------------------------------------------------------

    def invalidate(self) -> None:
        """Forget the bindings: tensors were replaced, or a parameter group was added."""
        self._state = None

    def stale(self, copies: bool = True) -> bool:
        """Must ``bind`` run before the next step? (fence everything first: copies read the old tensors)

        Where the tensors of the state lie is asked only for ``copies``, for rehearsals, and where compiled code updates them:
        PyTorch's own kernels find them wherever they are.
        """
        state = self.opt.state
        return (
            self._state is not state
            or len(state) != len(self._states)
            or not all(map(operator.is_, state.values(), self._states))  # C speed: this runs at every step
            or self._restructured()
            or self._regrouped()
            or self._moved(copies or self.rehearsal is not None)
        )

    def _restructured(self) -> bool:
        """Did anything of a group change that is structure? Most steps find the very objects of the step before."""
        groups = self.opt.param_groups
        names = list(itertools.chain.from_iterable(groups))
        values = list(itertools.chain.from_iterable(map(dict.values, groups)))
        if names == self._names and all(map(operator.is_, values, self._values)):
            return False
        changed = self._structure != self._structure_now()
        # A list may change and stay the same object; the parameters, which are one, are compared one by one elsewhere.
        lists = any(isinstance(value, list) for name, value in zip(names, values) if name != "params")
        self._names, self._values = ([], []) if changed or lists else (names, values)
        return changed

    def _regrouped(self) -> bool:
        """Are the parameters of the groups other ones, or more or fewer?"""
        count = sum(map(len, map(_params_of, self.opt.param_groups)))
        return count != len(self._params) or not all(map(operator.is_, self._grouped(), self._params))

    def _moved(self, copies: bool) -> bool:
        """Was a tensor of a member replaced or given other memory? ``BoundParam.stale`` for all of them, at C speed."""
        held = itertools.chain(itertools.chain.from_iterable(map(dict.values, self._simple)), (_END,))
        tensors, addresses = (self._tensors, self._addresses) if copies else (self._fixed, self._fixed_addresses)
        return (
            not all(map(operator.is_, held, self._held))
            or list(map(torch.Tensor.data_ptr, tensors)) != addresses
            or (bool(self._mixed) and any(m.stale() for m in self._mixed))
        )

    def _grouped(self) -> Iterator[torch.Tensor]:
        """The parameters of all groups."""
        return itertools.chain.from_iterable(map(_params_of, self.opt.param_groups))

    def replaced(self) -> list[str]:
        """Names of the members whose tensors are not those that were bound."""
        state = self.opt.state
        given = list(self._grouped())
        if len(given) != len(self.members):
            return [self.members[-1].name if self.members else "the first parameter"]
        if others := [m.name for m, param in zip(self.members, given) if m.param is not param]:
            return others
        # Whoever looks at opt.state[p] of a parameter without state makes an empty one: nothing was replaced.
        return [m.name for m in self.members if m.stale() or (state.get(m.param) or None) is not (m.state or None)]

    def _structure_now(self) -> list[Any]:
        """What of the groups decides a binding; a rehearsal sees all but the parameters for itself, at each step."""
        groups = self.opt.param_groups
        return [self._shape_of(g) for g in groups] if self.rehearsal is None else [len(g["params"]) for g in groups]

    def _shape_of(self, group: dict[str, Any]) -> tuple:
        """What of a parameter group is structure: how many parameters, its flags and integers, which of its other numbers are
        zero or negative, and the types and shapes of its tensors."""
        numbers = tuple((key, (value > 0) - (value < 0)) for key, value in numeric_items(group) if key[0] != "lr")
        read = settings_of(self.opt) - {"lr"}
        fixed = tuple((name, _fixed(value)) for name, value in group.items() if name in read)
        tensors = tuple((key, value.dtype, tuple(value.shape)) for key, value in tensor_items(group))
        return len(group["params"]), numbers, fixed, tensors

    def bind(self, sharing: Mapping[int, str]) -> None:
        """Read the optimizer anew: members, their state, the program of each. ``sharing``: see inventory.shared_memory."""
        opt = self.opt
        self.members, self.whole = [], None if self.rehearsal is None else self.rehearsal.refused
        for index, group in enumerate(opt.param_groups):
            for param in group["params"]:
                member = BoundParam(self.name_of(param), param, index, len(self.members), opt.state.get(param))
                if self.rehearsal is None:
                    self._choose(member, group)
                self.members.append(member)
        if (strange := [k for k in opt.state if not isinstance(k, torch.Tensor)]) and not self._warned:
            self._warned = True
            log.warning(
                "fxckpt: %s keeps state %s that belongs to no parameter; no checkpoint holds it. Give it as extra=, or a "
                "resumed run starts without it",
                type(opt).__name__,
                ", ".join(map(repr, strange)),
            )
        if shared := next((sharing[id(m.param)] for m in self.members if id(m.param) in sharing), None):
            self.whole = shared  # updated twice a step, in PyTorch's order, and nothing may copy it in between
            if self.rehearsal is not None:
                self.rehearsal.refused = shared
        programs = {id(m.program): m.flat for m in self.members if m.program is not None}
        log.debug(
            "bound %d parameters of %s; they share %d traced updates (%d compiled)",
            len(self.members),
            type(opt).__name__,
            len(programs),
            sum(programs.values()),
        )
        self._state, self._states = opt.state, list(opt.state.values())
        self._structure, self._names, self._values = self._structure_now(), [], []
        self._params, self._gradients = list(self._grouped()), []
        self._everyone = [True] * len(self._params)
        self._mask = []
        self._mixed = [m for m in self.members if m.plain]
        simple = [m for m in self.members if not m.plain]
        self._simple = [m.state for m in simple if m.state is not None]
        held = [value for state in self._simple for value in state.values()]
        self._held, self._tensors = [*held, _END], [m.param for m in simple] + held
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._fixed = [
            t for m in simple for t in (m.param, *([v for _, v, _ in m.items] if m.flat else [v for _, v in m.counts()]))
        ]
        self._fixed_addresses = [t.data_ptr() for t in self._fixed]
        self._unready = any(m.program is None for m in self.members)
        self.bound += 1

    def _choose(self, member: BoundParam, group: dict[str, Any]) -> None:
        """Find the member's program; none if the stock step has to make its state first, or made a sparse one."""
        if any(isinstance(v, torch.Tensor) and not _is_dense(v) for v in (member.state or {}).values()):
            return
        flag = "fused" if group.get("fused") else "foreach" if group.get("foreach") else None
        explicit = flag is not None or group.get("foreach") is False or group.get("fused") is False
        on_host = member.param.device.type == "cpu"
        if self.mode == "inductor" and not on_host:
            raise SetupError(
                f'update="inductor" compiles updates on the CPU; {member.name} is on {member.param.device}: use '
                'update="native", or leave it out'
            )
        native = self.mode == "native" or (self.mode is None and (explicit or not on_host))
        member.implementation = flag or (default_implementation(member.param) if native and not explicit else "single")
        if not native:
            member.implementation = "single"
        try:
            member.program = self._program(member, group)
        except MakesState as reason:
            if member.state:
                self.whole = str(reason)
        except NotTraceable as reason:
            self.whole = str(reason)
        member.compile = not native
        if member.program is not None and member.compile:
            self._compile(member)

    def _program(self, member: BoundParam, group: dict[str, Any]) -> Program:
        """The traced and hoisted update of this member's signature, for the branches it takes now; each made once."""
        state = member.state or {}
        signature = signature_of(self.opt, group, member.param, state, member.implementation)
        known = self._programs.setdefault(signature, _shared_programs.setdefault(signature, []))
        if isinstance(known, NotTraceable):
            raise known
        for found in known:
            if not found.outcomes or found.asks([state[key] for key in found.counts], found.values(group)) == found.outcomes:
                return found
        try:
            found = specialize(self.opt, group, member.param, state, signature)
        except NotTraceable as reason:
            log.debug("%s (%s, %s) is not traced: %s", type(self.opt).__name__, signature.implementation, signature.dtype, reason)
            self._programs[signature] = reason
            raise
        log.debug(
            "traced %s (%s, %s): %d scalars, inputs %s, branches %s",
            type(self.opt).__name__,
            signature.implementation,
            signature.dtype,
            found.scalars,
            found.inputs,
            found.outcomes,
        )
        known.append(found)
        return found

    def _compile(self, member: BoundParam) -> None:
        """Have the member's program compiled, if its tensors are laid out alike; what Inductor cannot take stays native."""
        member.flat = False
        try:
            inductor.compile_body(member.program)
        except NotTraceable as reason:
            if not self._refused:
                log.warning("fxckpt: %s is updated by PyTorch's own kernels: %s", type(self.opt).__name__, reason)
            self._refused = True
            return
        tensors = [member.bound(kind, key) for kind, key in member.program.inputs if kind != "grad"]
        member.flat = all(inductor.same_layout(t, member.param) for t in tensors) and inductor.is_dense(member.param)
        if not member.flat:
            log.debug("%s keeps PyTorch's kernels: its tensors are not dense in one order", member.name)

    # -- the graph --------------------------------------------------------------------------------------------------

    def arrange(self, layers: Sequence[Layer], edges: Sequence[tuple[str, str]], first: int, places: Mapping[str, Place]) -> None:
        """Write the StepGraph for these layers; ``first`` is the engine's number of the first of them."""
        self.layers, self.edges, self.first_layer = tuple(layers), tuple(edges), first
        by_name = {m.name: m for m in self.members}
        self._owned = [[by_name[n] for n in layer.params] for layer in self.layers]
        counts = [t for m in self.members for _, t in m.counts()]
        clocks = self._clocks = tuple(step_graph.UpdateTimer() for _ in self.layers)
        module = step_graph.build(self.layers, self.numbers(), first - 1 if counts else None, self._layer_update, self._scalars)
        sizes = {
            layer.name: sum(t.nbytes for m in owned for _, t in m.tensors()) for layer, owned in zip(self.layers, self._owned)
        }
        self.graph = step_graph.StepGraph(self.layers, self.edges, module, sizes, clocks, places)
        log.debug("wrote the StepGraph: %d layers in the order %s", len(self.layers), [layer.name for layer in self.layers])
        self._inputs = ([counts] if counts else []) + [[t for m in owned for _, t in m.tensors()] for owned in self._owned]
        self._count_tensors = counts
        self._mask, self._scalar_groups = [], []  # the calls are another layer's

    def numbers(self) -> range:
        """The engine's numbers of the layers."""
        return range(self.first_layer, self.first_layer + len(self.layers))

    def layer_members(self) -> list[list[BoundParam]]:
        """The members of each layer, in layer order."""
        return self._owned

    def layer_tensors(self) -> list[list[torch.Tensor]]:
        """What the graph hands to each emit: the counts first, when there are any."""
        return self._inputs

    def _layer_update(self, index: int) -> Callable:
        """The callable of one update node. It changes ``tensors``, to which the calls behind it are bound already; the
        calls are others when other parameters have gradients."""
        clock = self._clocks[index]

        def run(tensors: list[torch.Tensor], step: Inputs) -> None:
            calls = self._calls[index]
            if not calls:
                return  # no gradient, or the stock step made this one
            start = perf_counter()
            for call in calls:
                call(step)
            clock.add(perf_counter() - start)

        return run

    def _scalars(self, counts: Sequence[torch.Tensor] = ()) -> Inputs:
        """Advance the counts (the graph passes them to show what is changed) and compute every scalar_group's scalars."""
        groups = self.opt.param_groups
        values = [scalar_group.scalars(groups[scalar_group.group]) for scalar_group in self._scalar_groups]
        self._versions = self._versions_now()
        return Inputs(values, self._gradients)

    def _versions_now(self) -> list[int]:
        """How often each count was changed so far, by whomever."""
        return list(map(_version_of, self._count_tensors))

    # -- stepping ---------------------------------------------------------------------------------------------------

    def needs_stock(self) -> list[BoundParam]:
        """Members whose state the stock step must make (or whose gradient is sparse), of those with a gradient."""
        if self.rehearsal is not None:
            return []  # such steps run whole
        self._gradients = list(map(gradient_of, self._params))
        layouts = set(map(getattr, self._gradients, itertools.repeat("layout"), itertools.repeat(None)))
        self._complete = None not in layouts
        if not self._unready and layouts <= {torch.strided, None}:
            return []
        return [
            m for m in self.members if (grad := m.param.grad) is not None and (m.program is None or grad.layout != torch.strided)
        ]

    def run_stock(self, members: Iterable[BoundParam]) -> None:
        """The stock step on these parameters alone; they are left out of this step's graph. Fence them first."""
        members = list(members)
        log.debug(
            "the stock step updates %d parameters, which have no state yet or no dense gradient: %s ...",
            len(members),
            members[0].name,
        )
        chosen = {id(m.param) for m in members}
        groups = self.opt.param_groups
        saved = [g["params"] for g in groups]
        try:
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) in chosen]
            stock_step(self.opt)(self.opt)
        finally:
            for group, params in zip(groups, saved):
                group["params"] = params
        self._done = chosen

    def rehearse(self, closure: bool) -> bool:
        """Rehearse the coming step of a class that is not of ``torch.optim``; False if it must run whole."""
        scalar_groups = self.rehearsal.prepare(self.members, self._versions == self._versions_now(), closure)
        self.whole = self.rehearsal.refused
        if scalar_groups is None:
            self._scalar_groups = []
            return False
        if scalar_groups is not self._scalar_groups:
            self._scalar_groups = scalar_groups
            of = {m.name: c.index for c in scalar_groups for m in c.part.members}
            self._call_for(of)
            if self.mode == "inductor" and not self._refused:
                self._refused = True
                log.warning(
                    "fxckpt: %s is updated by PyTorch's own kernels: only classes of torch.optim are compiled",
                    plain_class(self.opt).__name__,
                )
        return True

    @contextlib.contextmanager
    def compared(self) -> Iterator[None]:
        """Around a whole step: compare it with its rehearsal, if there was one that is not proven yet."""
        if self.rehearsal is None:
            yield
            return
        with self.rehearsal.compared(self.members):
            yield
        self.whole = self.rehearsal.refused

    def abandon(self) -> None:
        """The step was left by an exception: the next one updates everything again."""
        self._done, self._gradients = set(), []

    def run(self, number: int | None) -> None:
        """One step of all that has a gradient: through the graph, with the ops of run ``number``; or, when it is None, in as
        few calls as update all layers at once."""
        if not self._gradients:  # else they were read since the last binding
            self._gradients, self._complete = list(map(gradient_of, self._params)), False
        if self.rehearsal is None:
            self._classify()
        if number is None:
            step = self._scalars()
            for call in self._all_calls:
                call(step)
        else:
            self.graph.module.forward(number, *self._inputs)
        self._done, self._gradients = set(), []  # whoever drops them has their memory back

    def _classify(self) -> None:
        """Which members take part, and which of them share their scalars; kept while the answer stays the same."""
        done = self._done
        mask = self._everyone if self._complete else [g is not None for g in self._gradients]
        if done:
            mask = [present and id(p) not in done for present, p in zip(mask, self._params)]
        if (
            mask == self._mask
            and self._versions == self._versions_now()
            and not (
                self._branching
                and any(not scalar_group.holds(self.opt.param_groups[scalar_group.group]) for scalar_group in self._branching)
            )
        ):
            return
        self._mask = mask
        self._versions = self._versions_now()
        scalar_groups: dict[Any, ScalarGroup] = {}
        of: dict[str, int] = {}
        taking_part = [m for m, present in zip(self.members, mask) if present]
        for member in taking_part:
            if member.program.outcomes:
                self._follow(member)
        values = cuda.count_values([[m.state[k] for k in m.program.counts] for m in taking_part])
        for member, counts in zip(taking_part, values):
            key = (member.group, member.program.key, counts)
            if key not in scalar_groups:
                scalar_groups[key] = ScalarGroup(len(scalar_groups), member.group, member.program)
            scalar_groups[key].add(member)
            of[member.name] = scalar_groups[key].index
        self._scalar_groups = list(scalar_groups.values())
        self._branching = [c for c in self._scalar_groups if c.program.outcomes]
        self._call_for(of)

    def _call_for(self, of: dict[str, int]) -> None:
        """Write the calls of all layers; ``of``: the number of each member's scalar_group, of those that take part."""
        self._calls = [calls_for([m for m in owned if m.name in of], of, self._scalar_groups) for owned in self._owned]
        self._all_calls = shared(calls_for([m for owned in self._owned for m in owned if m.name in of], of, self._scalar_groups))
        log.debug(
            "bucketed %d parameters (%d sets of scalars): %d calls with checkpoint ops, %d without",
            len(of),
            len(self._scalar_groups),
            sum(map(len, self._calls)),
            len(self._all_calls),
        )

    def _follow(self, member: BoundParam) -> None:
        """Give the member the program of the branches that its counts take now (RAdam rectifies from some step on)."""
        before = member.program
        member.program = self._program(member, self.opt.param_groups[member.group])
        if member.program is not before and member.compile:
            self._compile(member)

    def describe(self) -> str:
        """One line: what runs a step; empty while no state exists yet to tell."""
        name = plain_class(self.opt).__name__
        if self.whole:
            return f"{name}: its own step, whole ({self.whole}), then every layer is handed over"
        if self.rehearsal is not None:
            kind = "its own step, rehearsed on stand-ins, native" if self.rehearsal.proven else ""
            return f"{name}: {kind}, {len(self.layers)} layers" if kind else ""
        kinds = sorted({"Inductor" if m.flat else f"native {m.implementation}" for m in self.members if m.program is not None})
        return f"{name}: {' and '.join(kinds)}, {len(self.layers)} layers" if kinds else ""
