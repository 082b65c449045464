"""Trace a stock optimizer's own ``step()`` into an FX graph: one graph per signature, not one per parameter.

A shallow clone of the optimizer runs under ``make_fx`` with fake tensors. There are two ways in, since there are two kinds of
kernels:

* ``single`` and ``foreach`` take Python scalars through code that FX can follow: hyperparameters and step counts are symbolic
  doubles, so what eager computes in Python stays Python arithmetic in the graph, and nothing of it is baked in.
* ``fused`` hands them to one native operator whose schema takes plain floats. It is traced twice with different
  sentinel values; a constant that differs between the traces is a hyperparameter, one that does not is a constant.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxckpt.compat.optimizers import GROUP_BOOKKEEPING, plain_class, settings_of, unhooked_step
from fxckpt.compat.tracing import FakeTrace, branch_node, symbolic_float, symbolic_numbers, trace_fake

Key = tuple[str, int | None]
"""A hyperparameter: its name in the parameter group, and its index when the entry is a tuple (``betas``)."""


class NotTraceable(Exception):
    """This optimizer's step cannot be split; the message says why. The caller runs the stock step instead."""

    def anew(self) -> NotTraceable:
        """The same, without the frames that it was raised in: they hold the optimizer."""
        return type(self)(*self.args)


class MakesState(NotTraceable):
    """The traced step makes optimizer state: a first step, which is the stock one's to run."""


ELEMENTWISE = frozenset({"ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"})
"""Classes of ``torch.optim`` whose step treats every element alike and keeps all that changes in tensors of its state. Only then
is one trace, made on stand-ins of another shape, right for every parameter."""

BY_SHAPE = frozenset({"Adafactor", "Muon"})
"""Classes of ``torch.optim`` that treat every parameter apart from the others but not every element alike: traced once for each
shape, and never compiled."""

COUNTS = frozenset({"step", "mu", "eta", "mu_product"})
"""States that are 0-dimensional for every parameter, also for one that is itself 0-dimensional."""

WHOLE = {"LBFGS": "its closure and line search look at all parameters at once", "SparseAdam": "its gradients are sparse"}
"""Classes of ``torch.optim`` that run their own step, and why."""


@dataclass(frozen=True)
class Signature:
    """All that decides which code an update runs. Numeric values are not part of it, their structure is."""

    optimizer: type
    implementation: str  # "single", "foreach" or "fused"; "rehearsed" where it was not traced (optim/rehearsal)
    constants: tuple[tuple[str, Any], ...]  # baked in: flags, strings, None, and numbers that are zero
    numeric: tuple[tuple[Key, bool | None], ...]  # inputs; True: positive, False: negative, None: nothing assumed
    state: tuple[tuple[str, bool], ...]  # key, and whether it is 0-dimensional (a step count)
    dtype: torch.dtype
    device: str  # with its number: list kernels take tensors of one device
    tensors: tuple[tuple[Key, torch.dtype, tuple[int, ...]], ...] = ()  # hyperparameters that are tensors (lr=tensor(...))
    shape: tuple[Any, ...] | None = None  # where elements are not all treated alike: shapes and strides of parameter and state

    @functools.cached_property
    def hyperparameters(self) -> tuple[Key, ...]:
        """The inputs that come from the parameter group, numbers first, in the order in which a program takes them."""
        return tuple(key for key, _ in self.numeric) + tuple(key for key, _, _ in self.tensors)


@dataclass(frozen=True)
class Role:
    """What a placeholder of a traced update stands for; the placeholder carries it as ``meta["role"]``."""

    kind: str  # "param", "grad", "state" or "hyper"
    index: int = 0  # which of the traced parameters
    key: Any = None  # the state's name, or the hyperparameter's key


def _entries(group: dict[str, Any]) -> Iterator[tuple[Key, Any]]:
    """What a parameter group holds for the arithmetic, by key, tuples taken apart."""
    for name in sorted(group.keys() - GROUP_BOOKKEEPING):
        value = group[name]
        if isinstance(value, (tuple, list)):
            yield from (((name, i), each) for i, each in enumerate(value))
        else:
            yield (name, None), value


def numeric_items(group: dict[str, Any]) -> list[tuple[Key, float]]:
    """The numbers of a parameter group, by key. ``lr`` may be an int; other ints are structure, and flags are no numbers."""
    numbers = ((key, v) for key, v in _entries(group) if isinstance(v, float) or (key == ("lr", None) and type(v) is int))
    return [(key, float(value)) for key, value in numbers]


def tensor_items(group: dict[str, Any]) -> list[tuple[Key, torch.Tensor]]:
    """The tensors of a parameter group (``lr=torch.tensor(0.1)``), by key."""
    return [(key, value) for key, value in _entries(group) if isinstance(value, torch.Tensor)]


def signature_of(
    opt: torch.optim.Optimizer, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any], implementation: str
) -> Signature:
    """The signature of one parameter's update. Raises NotTraceable for what runs whole: classes not listed above, ``capturable``,
    ``differentiable``, sparse parameters, and state that is not shaped like its parameter where elements are treated alike."""
    cls = plain_class(opt)
    if cls is not getattr(torch.optim, cls.__name__, None):
        raise NotTraceable(f"{cls.__module__}.{cls.__qualname__} is not known to treat parameters apart")
    if cls.__name__ not in ELEMENTWISE | BY_SHAPE:
        raise NotTraceable(WHOLE.get(cls.__name__, f"{cls.__name__} is not known to treat parameters apart"))
    for flag in ("capturable", "differentiable"):
        if group.get(flag):
            raise NotTraceable(f"{flag}=True")
    if param.layout != torch.strided:
        raise NotTraceable(f"a {param.layout} parameter")
    if cls.__name__ == "Rprop" and param.dim() == 0 and not param.is_complex():
        raise NotTraceable("a mask of a 0-dimensional parameter, which Rprop makes, is read on the host")
    by_shape = cls.__name__ in BY_SHAPE
    # Warm-up starts at 0, and no optimizer branches on lr: it is never structure.
    numbers = [(key, value) for key, value in numeric_items(group) if value != 0 or key[0] == "lr"]
    numeric = tuple((key, None if key[0] == "lr" else value > 0) for key, value in numbers)
    if implementation == "fused" and (held := [key for key, _ in tensor_items(group) if key[0] != "lr"]):
        raise NotTraceable(f"a fused kernel reads {held[0][0]}, a tensor, by its value")
    tensors = [(key, value.dtype, tuple(value.shape)) for key, value in tensor_items(group)]
    moving = {key for key, _ in numeric} | {key for key, _, _ in tensors}
    names = sorted(name for name in group.keys() & settings_of(opt) if (name, None) not in moving)
    constants = tuple((name, _constant(group[name], name, moving)) for name in names)
    kept = [(key, value) for key, value in sorted(state.items()) if value is not None]
    kinds = tuple((key, _state_kind(key, value, param, by_shape)) for key, value in kept)
    shape = tuple((tuple(t.shape), t.stride()) for t in (param, *(v for _, v in kept))) if by_shape else None
    return Signature(cls, implementation, constants, numeric, kinds, param.dtype, str(param.device), tuple(tensors), shape)


def _constant(value: Any, name: str, moving: set[Key]) -> Any:
    """The part of a group entry that is structure, hashable; moving elements of a tuple are left out of it."""
    if isinstance(value, (tuple, list)):
        return tuple(None if (name, i) in moving else v for i, v in enumerate(value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise NotTraceable(f"{name} is a {type(value).__name__}")


def is_count(key: str, value: torch.Tensor, param: torch.Tensor) -> bool:
    """Is this state a 0-dimensional count, advanced on the host, and not the state of a 0-dimensional parameter?"""
    return value.dim() == 0 and (param.dim() > 0 or key in COUNTS or value.dtype != param.dtype)


def _state_kind(key: str, value: Any, param: torch.Tensor, by_shape: bool) -> bool:
    """True for a 0-dimensional state (a count), False for a tensor: one shaped like its parameter unless ``by_shape``."""
    if not isinstance(value, torch.Tensor):
        raise NotTraceable(f"state {key!r} is a {type(value).__name__}")
    if is_count(key, value, param):
        return True
    if value.shape != param.shape and not by_shape:
        raise NotTraceable(f"state {key!r} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}")
    return False


def trace(
    opt: torch.optim.Optimizer,
    group: dict[str, Any],
    param: torch.Tensor,
    state: dict[str, Any],
    signature: Signature,
    *,
    count: int | None = None,
    script: Sequence[bool] = (),
) -> fx.GraphModule:
    """Trace ``opt.step()`` for parameters like ``param``; raises NotTraceable with the reason where FX cannot follow.

    ``count`` parameters are traced, two of them for list kernels, to tell what differs per parameter from what is common to the
    list. ``script`` says how branches on step counts and hyperparameters go. The result changes its inputs in place, and returns
    how its branches go; ``meta["outcomes"]`` is how they were taken to go.
    """
    if count is None:
        count = 1 if signature.implementation == "single" else 2
    # Two sizes that no constant would equal by chance: a shape baked into the graph then shows as a failure.
    sizes = [7 + 4 * i if signature.shape is None else None for i in range(count)]
    params = [_like(param, size) for size in sizes]
    states = [
        {k: torch.empty((), dtype=state[k].dtype) if scalar else _like(state[k], sizes[i]) for k, scalar in signature.state}
        for i in range(count)
    ]
    case = _Case(opt, group, signature, params, states)
    return _trace_with_sentinels(case) if signature.implementation == "fused" else _trace_with_symbols(case, script)


def _like(tensor: torch.Tensor, size: int | None) -> torch.Tensor:
    """A stand-in of the same type: one-dimensional where the shape is not seen, else of the same shape and strides."""
    if size is not None:
        return torch.empty(size, dtype=tensor.dtype)
    return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype)


def _settings(group: dict[str, Any], values: dict[Key, Any], signature: Signature) -> dict[str, Any]:
    """The parameter group the clone runs with: ``values`` for the numeric hyperparameters, the implementation fixed."""
    out = {}
    for name, value in group.items():
        if name in GROUP_BOOKKEEPING:
            continue
        if isinstance(value, (tuple, list)):
            value = type(value)(values.get((name, i), v) for i, v in enumerate(value))
        out[name] = values.get((name, None), value)
    for flag in ("foreach", "fused"):
        if flag in out:
            out[flag] = signature.implementation == flag
    return out


@dataclass(frozen=True)
class _Case:
    """A step to trace: the optimizer, and the parameters and states that stand for all of their signature."""

    opt: torch.optim.Optimizer
    group: dict[str, Any]
    signature: Signature
    params: Sequence[torch.Tensor]
    states: Sequence[dict[str, torch.Tensor]]

    def roles(self) -> list[Role]:
        """What ``run`` takes: parameters, gradients, states, and the hyperparameters that are tensors."""
        count = range(len(self.params))
        roles = [Role("param", i) for i in count] + [Role("grad", i) for i in count]
        roles += [Role("state", i, key) for i in count for key in self.states[i]]
        return roles + [Role("hyper", 0, key) for key, _, _ in self.signature.tensors]

    def tensors(self) -> list[torch.Tensor]:
        """A tensor for each of ``roles``."""
        held = [torch.empty(shape, dtype=dtype) for _, dtype, shape in self.signature.tensors]
        return [*self.params, *map(torch.empty_like, self.params), *(t for s in self.states for t in s.values()), *held]

    def run(self, flat: Sequence[torch.Tensor], values: dict[Key, Any]) -> None:
        """Run the stock step of a shallow clone on ``flat`` and numeric hyperparameters; raises MakesState if it makes or drops
        state (a first step)."""
        given = dict(zip(self.roles(), flat))
        params = [given[Role("param", i)] for i in range(len(self.params))]
        states = [{key: given[Role("state", i, key)] for key in state} for i, state in enumerate(self.states)]
        held = {key: given[Role("hyper", 0, key)] for key, _, _ in self.signature.tensors}
        for i, param in enumerate(params):
            param.grad = given[Role("grad", i)]
        clone: Any = copy.copy(self.opt)
        clone.param_groups = [{**_settings(self.group, {**values, **held}, self.signature), "params": params}]
        clone.state = {param: dict(state) for param, state in zip(params, states)}
        unhooked_step(self.opt)(clone)
        for param, before in zip(params, states):
            after = {k for k, v in clone.state[param].items() if v is not None}
            if after != set(before):
                raise MakesState(f"its step makes state {sorted(after ^ set(before))}")


def _make_fx(
    fn: Callable[..., None], args: Sequence[torch.Tensor], roles: Sequence[Role], script: Sequence[bool] = ()
) -> FakeTrace:
    """Trace ``fn(*args)`` on fake tensors and give each placeholder its role."""
    try:
        found = trace_fake(fn, args, script)
    except NotTraceable:
        raise
    except Exception as error:  # whatever the optimizer's own code does with a symbol
        raise NotTraceable(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}") from error
    placeholders = found.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(roles):
        raise NotTraceable(f"{len(placeholders)} traced inputs for {len(roles)} given ones")
    for node, role in zip(placeholders, roles):
        node.meta["role"] = role
    return found


def _traced(graph: fx.Graph, branches: Sequence[fx.Node], outcomes: Sequence[bool]) -> fx.GraphModule:
    """The result of ``trace``."""
    graph.output_node().args = (tuple(branches),)
    gm = fx.GraphModule(graph.owning_module or torch.nn.Module(), graph, "TracedUpdate")
    gm.meta["outcomes"] = tuple(outcomes)
    return gm


def _trace_with_symbols(case: _Case, script: Sequence[bool]) -> fx.GraphModule:
    """Hyperparameters as symbolic doubles: ``t.item()`` of a fake 0-dim tensor."""
    roles, numeric = case.roles(), case.signature.numeric

    def fn(*flat: torch.Tensor) -> None:
        values = {key: symbolic_float(tensor, positive) for (key, positive), tensor in zip(numeric, flat[len(roles) :])}
        with symbolic_numbers(case.opt):
            case.run(flat, values)

    hypers = [torch.empty((), dtype=torch.float64) for _ in numeric]
    found = _make_fx(fn, [*case.tensors(), *hypers], [*roles, *(Role("hyper", 0, key) for key, _ in numeric)], script)
    _hypers_as_floats(found, {key for key, _ in numeric})
    try:
        branches = [branch_node(found.graph, expression, found.symbols) for expression, _ in found.branches]
    except KeyError:  # a number that only the branch used
        raise NotTraceable("it branches on the value of a tensor") from None
    return _traced(found.graph, branches, [outcome for _, outcome in found.branches])


def _hypers_as_floats(found: FakeTrace, numeric: set[Key]) -> None:
    """Each hyperparameter is read by ``item()`` once; let its placeholder be that float."""
    roles = ((node, node.meta["role"]) for node in found.graph.find_nodes(op="placeholder"))
    for node in [n for n, role in roles if role.kind == "hyper" and role.key in numeric]:
        for read in list(node.users):
            for symbol, reader in found.symbols.items():
                if reader is read:
                    found.symbols[symbol] = node
            read.replace_all_uses_with(node)
            found.graph.erase_node(read)


def _trace_with_sentinels(case: _Case) -> fx.GraphModule:
    """Hyperparameters as two sets of made-up values; where the two traces differ, a hyperparameter stands."""

    def traced(values: dict[Key, float]) -> fx.Graph:
        found = _make_fx(lambda *flat: case.run(flat, values), case.tensors(), case.roles())
        if found.branches:
            raise NotTraceable("a fused step branches on a step count")
        return found.graph

    signs = {key: -1.0 if positive is False else 1.0 for key, positive in case.signature.numeric}
    one = {key: sign * (0.1037 + 0.0291 * i) for i, (key, sign) in enumerate(signs.items())}
    two = {key: sign * (0.2113 + 0.0173 * i) for i, (key, sign) in enumerate(signs.items())}
    graph = traced(one)
    replace_sentinels(graph, traced(two), one, two)
    return _traced(graph, (), ())


def replace_sentinels(graph: fx.Graph, other: fx.Graph, one: dict[Key, float], two: dict[Key, float]) -> None:
    """Put a float placeholder wherever the two traces hold a hyperparameter's two values."""
    first = next(n for n in graph.nodes if n.op != "placeholder")
    names = {}
    for key in one:
        with graph.inserting_before(first):
            names[key] = graph.placeholder("_".join(str(k) for k in key if k is not None))
        names[key].meta["role"] = Role("hyper", 0, key)
    if len(graph.nodes) - len(one) != len(other.nodes):
        raise NotTraceable("its graph depends on the values of hyperparameters")
    back_one, back_two = ({v: k for k, v in values.items()} for values in (one, two))

    def swap(a: Any, b: Any) -> Any:
        """Walk two argument structures side by side; a float that differs must be the same hyperparameter in both."""
        if isinstance(a, (list, tuple)):
            return type(a)(map(swap, a, b))
        if isinstance(a, dict):
            return {k: swap(a[k], b[k]) for k in a}
        if not isinstance(a, float) or a == b:
            return a
        key = back_one.get(a)
        if key is None or back_two.get(b) != key:
            raise NotTraceable(f"a constant of its graph, {a}, is computed from hyperparameters")
        return names[key]

    for node, twin in zip([n for n in graph.nodes if n not in names.values()], other.nodes):
        if node.target != twin.target and node.op != "placeholder":
            raise NotTraceable("its graph depends on the values of hyperparameters")
        node.args, node.kwargs = swap(node.args, twin.args), swap(node.kwargs, twin.kwargs)
