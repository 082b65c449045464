"""Tracing a step on fake tensors, with numbers that stay symbols."""

from __future__ import annotations

import builtins
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxckpt.compat.optimizers import unhooked_step


@dataclass(frozen=True)
class FakeTrace:
    """What ``trace_fake`` found: the graph, the branches taken on symbolic numbers, and who those symbols are."""

    graph: fx.Graph
    branches: list[tuple[Any, bool]]  # sympy expression, and how it was decided
    symbols: dict[Any, fx.Node]  # sympy symbol -> the node that reads it (``item()``)


def trace_fake(fn: Callable, args: Sequence[torch.Tensor], script: Sequence[bool] = ()) -> FakeTrace:
    """``make_fx`` of ``fn`` on fake copies of ``args``; ``item()`` gives symbolic doubles. A branch on such a number cannot be
    decided while tracing: ``script`` says how, first branch first, and what it does not say is taken as true. ``make_fx`` itself
    would raise GuardOnDataDependentSymNode, and knows no way to be told."""
    import sympy  # type: ignore[import-untyped]
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

    branches: dict[Any, bool] = {}

    class Scripted(ShapeEnv):
        def evaluate_expr(self, orig_expr, *args, **kwargs):
            if orig_expr in branches:
                return sympy.true if branches[orig_expr] else sympy.false
            try:
                return super().evaluate_expr(orig_expr, *args, **kwargs)
            except GuardOnDataDependentSymNode:
                if not isinstance(orig_expr, (sympy.core.relational.Relational, sympy.logic.boolalg.BooleanFunction)):
                    raise
                branches[orig_expr] = script[len(branches)] if len(branches) < len(script) else True
                return sympy.true if branches[orig_expr] else sympy.false

    mode = FakeTensorMode(shape_env=Scripted(allow_scalar_outputs=True), static_shapes=True)
    fakes = [mode.from_tensor(t.detach()) for t in args]
    with mode, torch.no_grad():
        graph = make_fx(fn)(*fakes).graph
    symbols = {
        value.node.expr: node
        for node in graph.nodes
        if isinstance(value := node.meta.get("val"), (torch.SymFloat, torch.SymInt, torch.SymBool))
        and node.op == "call_function"
        and isinstance(value.node.expr, sympy.Symbol)
    }
    return FakeTrace(graph, list(branches.items()), symbols)


def branch_node(graph: fx.Graph, expression: Any, symbols: dict[Any, fx.Node]) -> fx.Node:
    """Compute a sympy ``expression`` at the end of ``graph``, in Python numbers; raises KeyError for an unknown symbol. torch
    writes its own deferred asserts into graphs this way; nothing public turns such an expression into nodes."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    tracer = fx.proxy.GraphAppendingTracer(graph)
    known = {symbol: fx.Proxy(symbols[symbol], tracer) for symbol in expression.free_symbols}
    with graph.inserting_before(output):
        return sympy_interp(PythonReferenceAnalysis, known, expression).node


class _NumbersIntoTensors(TorchFunctionMode):
    """``torch.as_tensor`` of a symbol: it would ask for the symbol's value, ``scalar_tensor`` takes it as it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, value = kwargs or {}, args[0] if args else None
        if func is torch.as_tensor and isinstance(value, (torch.SymFloat, torch.SymInt)):
            number: Any = value
            return torch.scalar_tensor(number, **{"dtype": torch.get_default_dtype(), **kwargs})
        return func(*args, **kwargs)


@contextlib.contextmanager
def symbolic_numbers(opt: torch.optim.Optimizer):
    """While this lasts, the step of ``opt``'s class can compute with symbols where Python would want their values. ``max`` and
    ``min`` branch, ``torch.sym_max`` is one node of a graph; they are replaced in the class's own module, and only in modules of
    ``torch.optim``."""
    names = unhooked_step(opt).__globals__
    if not names["__name__"].startswith("torch.optim."):
        yield
        return
    assert "max" not in names and "min" not in names

    def either(symbolic, builtin):
        def extreme(*values, **options):
            plain = len(values) == 2 and all(isinstance(v, (int, float, torch.SymInt, torch.SymFloat)) for v in values)
            if not plain or options:
                return builtin(*values, **options)
            first, second = values
            if isinstance(first, float) and isinstance(second, torch.SymFloat):
                first = torch.SymFloat(second.node.wrap_float(first))  # or they change places, and max(1.0, nan) is 1.0
            return symbolic(first, second)

        return extreme

    names["max"], names["min"] = either(torch.sym_max, builtins.max), either(torch.sym_min, builtins.min)
    try:
        with _NumbersIntoTensors():
            yield
    finally:
        del names["max"], names["min"]


@functools.cache
def fake_mode() -> Any:
    """The mode in which stand-ins live: tensors with type, shape, strides and device, and no memory. ``FakeTensorMode`` is
    private, and the only thing that computes what an operator would return without running it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that looks like ``tensor`` and has no memory."""
    with fake_mode():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def is_stand_in(value: Any) -> bool:
    """Was it made by ``stand_in``, or by an operator from such a one?"""
    return isinstance(value, FakeTensor)


class _Calls(TorchFunctionMode):
    """Hands calls of PyTorch's Python functions on."""

    def __init__(self, called: Callable):
        super().__init__()
        self.called = called

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.called(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    """Hands operators on; the mode has no public name."""

    def __init__(self, dispatched: Callable):
        super().__init__()
        self.dispatched = dispatched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.dispatched(func, args, kwargs or {})


@contextlib.contextmanager
def watched(called: Callable, dispatched: Callable):
    """While this lasts, calls of PyTorch's Python functions, attributes of tensors among them, go to
    ``called(func, args, kwargs)`` and operators that run to ``dispatched(func, args, kwargs)``; they return what the caller gets.
    A function that ``torch.compile`` made raises RuntimeError meanwhile: it asks FX's own mark of a trace under way. Dynamo would
    find the modes, give up, and run that function eagerly ever after."""
    mark = fx._symbolic_trace
    before, mark._is_fx_tracing_flag = mark._is_fx_tracing_flag, True
    try:
        with _Calls(called), _Operators(dispatched):
            yield
    finally:
        mark._is_fx_tracing_flag = before


def symbolic_float(tensor: torch.Tensor, positive: bool | None) -> Any:
    """``tensor.item()`` as a symbol; its sign, when given, is asserted so that ``if momentum != 0`` can be decided."""
    value = tensor.item()
    if positive is not None:
        torch._check(value != 0)
        torch._check(value > 0 if positive else value < 0)
    return value
