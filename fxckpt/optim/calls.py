"""The calls behind the update nodes of a StepGraph: what changes from step to step are scalars, which a group of parameters
shares, and gradients; all else is bound."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fxckpt.compat.threads import can_use_one_core, modes_active
from fxckpt.engine import _lib
from fxckpt.graph.update import foreach, inductor
from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.specialize import by_methods, over_lists
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.helper_thread import helper

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class ScalarGroup:
    """Parameters of one group that share their program and their step count, so one set of scalars serves them all."""

    def __init__(self, index: int, first: BoundParam, program: Program):
        self.index: int = index
        self.group: int = first.group
        self.program: Program = program
        self.representative: list[torch.Tensor] = self._counts(first)  # these stand for all
        self.others: list[list[torch.Tensor]] = [[] for _ in program.counts]
        self.spreads: list[Callable[[], None]] | None = None
        self.compiled = False
        dtype = _NUMPY[inductor.scalar_dtype(program.signature.dtype)]
        self.values: np.ndarray[Any, Any] = np.zeros(max(1, program.scalars), dtype)  # what compiled code reads
        addresses = [self.values.ctypes.data + i * self.values.itemsize for i in range(max(1, program.scalars))]
        self.addresses: np.ndarray[Any, Any] = np.array(addresses, np.int64)
        self._host = program.host.forward  # a module call costs more than the arithmetic

    def _counts(self, member: BoundParam) -> list[torch.Tensor]:
        return [member.state[key] for key in self.program.counts]

    def add(self, member: BoundParam) -> None:
        """Take one more parameter in."""
        for column, value in zip(self.others, self._counts(member)):
            column.append(value)

    def holds(self, group: dict[str, Any]) -> bool:
        """Does the next step take the branches that the program was made for?"""
        return self.program.asks(self.representative, self.program.values(group)) == self.program.outcomes

    def scalars(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Advance the counts of all members; returns the scalars as doubles, and puts them where compiled code looks."""
        values: tuple[Any, ...] = self._host(*self.representative, *self.program.values(group))
        if self.spreads is None:
            self.spreads = [_spread(source, column) for source, column in zip(self.representative, self.others) if column]
        for spread in self.spreads:
            spread()
        if self.compiled:  # a native update's may be tensors on a device; some of these are tensors too, of any dtype
            self.values[: len(values)] = list(map(float, values))
        return values


def _spread(source: torch.Tensor, column: list[torch.Tensor]) -> Callable[[], None]:
    """What gives all of ``column`` the value of ``source``, 0-dimensional as they are. Those that have their addresses checked at
    every step (counts on the CPU) are written without PyTorch: it takes half a microsecond for each."""
    if any(t.device.type != "cpu" or t.dtype != source.dtype for t in (source, *column)):
        return lambda: torch._foreach_copy_(column, [source] * len(column))
    ffi, lib = _lib.load()
    addresses = ffi.new("uint64_t[]", [t.data_ptr() for t in column])
    pointer = ffi.cast("void *", source.data_ptr())
    return lambda: lib.fx_spread(pointer, source.itemsize, addresses, len(column))


class Inputs(NamedTuple):
    """What differs from step to step: the scalars of each group, by its number, and the gradients by ``BoundParam.index``, None
    of those that take no part."""

    scalars: Sequence[tuple[Any, ...]]
    gradients: Sequence[Any]


Call = Callable[[Inputs], None]
"""Updates the parameters that it is bound to."""


def calls_for(members: Sequence[BoundParam], group_of: Mapping[int, ScalarGroup]) -> list[Call]:
    """The calls that update those of ``members`` that have a group (by ``BoundParam.index``): for each group one of compiled
    code, or of PyTorch's kernels over parts of it."""
    sharing: dict[int, list[BoundParam]] = {}
    for member in members:
        if member.index in group_of:
            sharing.setdefault(group_of[member.index].index, []).append(member)
    out: list[Call] = []
    for _, mine in sorted(sharing.items()):
        scalar_group = group_of[mine[0].index]
        flat = [m for m in mine if m.flat]
        native = [m for m in mine if not m.flat]
        if flat:
            scalar_group.compiled = True
            out.append(_CompiledCall(scalar_group, flat))
        if native:
            out += _native_calls(scalar_group, native)
    return out


def _native_calls(scalar_group: ScalarGroup, members: Sequence[BoundParam]) -> list[Call]:
    """PyTorch's own kernels: over small members in groups for two threads, over large ones in groups that fit the cache, or fused
    over all of them."""
    program = scalar_group.program
    on_cpu = all(m.local.device.type == "cpu" for m in members)
    listed = over_lists(program) if on_cpu or program.style == "columns" else None
    if listed is None:
        return [_EachCall(scalar_group, program, members)]
    if not on_cpu:
        return [_ColumnsCall(scalar_group, listed, [members])]
    tensors = [[m.bound(kind, key) for m in members] for kind, key in program.inputs]
    # What a rehearsal noted may be any operator, and some have other bits on one core: a product of matrices.
    known = program.signature.implementation != "rehearsed"
    small = [known and all(t.numel() < foreach.PARALLEL for t in row) for row in zip(*tensors)]
    calls: list[Call] = []
    for serial in (True, False):
        chosen = [m for m, is_small in zip(members, small) if is_small == serial]
        rows = [[t for t, is_small in zip(column, small) if is_small == serial] for column in tensors]
        if serial:
            parts = foreach.groups(rows, 2 if len(chosen) * _kernels(listed) >= WORTH_SHARING else 1)
            calls += [_ColumnsCall(scalar_group, listed, [chosen[part]], True) for part in parts]
        elif chosen:
            calls += _large_calls(scalar_group, listed, chosen, rows)
    return calls


def _large_calls(
    scalar_group: ScalarGroup, listed: Program, members: Sequence[BoundParam], rows: Sequence[Sequence[torch.Tensor]]
) -> list[Call]:
    """Calls on tensors of which PyTorch gives each to all cores; ``rows`` the members' tensors, by column."""
    if listed.signature.implementation == "fused":  # such a kernel goes over a tensor once, whatever is in the cache
        return [_ColumnsCall(scalar_group, listed, [members])]
    groups, each = [members[part] for part in foreach.groups(rows)], scalar_group.program.style == "each"
    alone = [group[0] for group in groups if each and len(group) == 1]
    together = [group for group in groups if not (each and len(group) == 1)]
    calls: list[Call] = [_EachCall(scalar_group, by_methods(scalar_group.program), alone)] if alone else []
    return [*calls, _ColumnsCall(scalar_group, listed, together)] if together else calls


def _kernels(program: Program) -> int:
    """How many kernels a parameter costs; a fused one counts as one for each tensor that it reads, and takes as long."""
    fused = program.signature.implementation == "fused"
    return len(program.inputs) if fused else sum(n.op == "call_function" for n in program.body.graph.nodes)


def shared(calls: Sequence[Call]) -> list[Call]:
    """The same calls, with those that use one core put together into one that uses two, if they are worth it."""
    serial = [c for c in calls if isinstance(c, _ColumnsCall) and c.serial]
    if sum(c.kernels for c in serial) < WORTH_SHARING:
        return list(calls)
    return [c for c in calls if c not in serial] + [_SharedCalls(serial)]


WORTH_SHARING = 256
"""Kernels on one tensor each: about half a millisecond together, several times what it takes to wake a thread."""


class _SharedCalls:
    """Calls for two threads, where PyTorch may use two and no mode of the caller's thread has to see the operators."""

    def __init__(self, calls: Sequence[_ColumnsCall]):
        self.calls = calls

    def __call__(self, step: Inputs) -> None:
        if torch.get_num_threads() > 1 and can_use_one_core() and not modes_active():
            helper.run(self.calls, step)
        else:
            for call in self.calls:
                call(step)


_dtype_of = operator.attrgetter("dtype")


class _CompiledCall:
    """All members in one call of Inductor's code."""

    def __init__(self, scalar_group: ScalarGroup, members: Sequence[BoundParam]):
        self.function, self.params = inductor.compile_body(scalar_group.program), [m.local for m in members]
        self.indices = [m.index for m in members]
        inputs, self.grad_at = scalar_group.program.inputs, scalar_group.program.grad_at
        self.keep = members, scalar_group  # the addresses below are of their memory
        rows = [[m.bound(kind, key).data_ptr() for kind, key in inputs] for m in members]
        self.rows = np.array(rows, np.int64)
        self.lengths = np.array([m.local.numel() for m in members], np.int64)
        self.args = len(members), self.rows.ctypes.data, self.lengths.ctypes.data, scalar_group.addresses.ctypes.data
        self.contiguous = all(p.is_contiguous() for p in self.params)
        self.changed = [m.bound(kind, key) for m in members for kind, key in inputs if kind != "grad"]

    def __call__(self, step: Inputs) -> None:
        gradients = list(map(step.gradients.__getitem__, self.indices))
        if not (
            self.contiguous
            and all(map(torch.Tensor.is_contiguous, gradients))
            and set(map(_dtype_of, gradients)) == {self.params[0].dtype}
        ):
            gradients = list(map(inductor.same_order, gradients, self.params))
        self.rows[:, self.grad_at] = list(map(torch.Tensor.data_ptr, gradients))
        self.function(*self.args)
        # Autograd must see the change, as it would see an operator's: a second backward through old weights is an error.
        torch.autograd.graph.increment_version(self.changed)


class _EachCall:
    """Single-tensor kernels, one parameter after the other."""

    def __init__(self, scalar_group: ScalarGroup, program: Program, members: Sequence[BoundParam]):
        self.index, self.function, self.grad_at = scalar_group.index, program.body.forward, program.grad_at
        self.rows = [(m.index, [m.bound(kind, key) for kind, key in program.inputs]) for m in members]

    def __call__(self, step: Inputs) -> None:
        scalars, function, grad_at = step.scalars[self.index], self.function, self.grad_at
        for index, row in self.rows:
            args = row.copy()
            args[grad_at] = step.gradients[index]
            function(*args, *scalars)


def _picker(members: Sequence[BoundParam]) -> Callable[[Sequence[Any]], Any]:
    """What takes the members' gradients out of those of a step: a slice of the list where they stand side by side."""
    indices = [m.index for m in members]
    if indices == list(range(indices[0], indices[-1] + 1)):
        return operator.itemgetter(slice(indices[0], indices[-1] + 1))
    return lambda gradients: list(map(gradients.__getitem__, indices))


class _ColumnsCall:
    """List kernels (foreach, fused) over groups of parameters. ``serial``: PyTorch uses one core for each."""

    def __init__(self, scalar_group: ScalarGroup, program: Program, groups: Sequence[Sequence[BoundParam]], serial: bool = False):
        self.serial = serial
        self.kernels = sum(map(len, groups)) * _kernels(program)
        self.index, self.function, self.grad_at = scalar_group.index, program.body.forward, program.grad_at
        self.groups = [
            (_picker(members), [[m.bound(kind, key) for m in members] for kind, key in program.inputs]) for members in groups
        ]

    def __call__(self, step: Inputs) -> None:
        scalars, function, grad_at = step.scalars[self.index], self.function, self.grad_at
        for pick, columns in self.groups:
            args = columns.copy()
            args[grad_at] = pick(step.gradients)
            function(*args, *scalars)
