"""The calls behind the update nodes of a StepGraph, with everything that does not change from step to step bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxckpt.graph import inductor, lists
from fxckpt.graph.hoist import Program

if TYPE_CHECKING:
    from fxckpt.stepper import Member

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Cohort:
    """Parameters of one group that share their program and their step count, so one set of scalars serves them all."""

    def __init__(self, index: int, group: int, program: Program):
        self.index, self.group, self.program = index, group, program
        self.representative: list[torch.Tensor] = []
        self.others: list[list[torch.Tensor]] = [[] for _ in program.counts]
        self.members = 0
        self.compiled = False
        dtype = _NUMPY[inductor.scalar_dtype(program.signature.dtype)]
        self.values = np.zeros(max(1, program.scalars), dtype)  # what compiled code reads
        self.addresses = _addresses(self.values.ctypes.data + i * self.values.itemsize for i in range(program.scalars))
        self._host = program.host.forward  # a module call costs more than the arithmetic

    def add(self, member: Member) -> None:
        """Take a parameter in; the first one's counts stand for all."""
        counts = [member.state[key] for key in self.program.counts]
        if not self.members:
            self.representative = counts
        else:
            for column, value in zip(self.others, counts):
                column.append(value)
        self.members += 1

    def holds(self, group: dict[str, Any]) -> bool:
        """Does the next step take the branches that the program was made for?"""
        return self.program.asks(self.representative, self.program.values(group)) == self.program.outcomes

    def scalars(self, group: dict[str, Any]) -> tuple:
        """Advance the counts of all members; returns the scalars as doubles, and puts them where compiled code looks."""
        values = self._host(*self.representative, *self.program.values(group))
        for source, column in zip(self.representative, self.others):
            if column:
                torch._foreach_copy_(column, [source] * len(column))
        if self.compiled:  # a native update's may be tensors, on a device too
            self.values[:len(values)] = values
        return values


def _addresses(values: Any) -> np.ndarray:
    """Addresses as a C array; never empty, so that it has an address itself."""
    return np.array([*values, 0], np.int64)


def calls_for(members: Sequence[Member], of: dict[str, int], cohorts: Sequence[Cohort]) -> list[Callable]:
    """The calls that update ``members``: for each cohort one of compiled code, or of PyTorch's kernels in groups."""
    out: list[Callable] = []
    for cohort in cohorts:
        mine = [m for m in members if of[m.name] == cohort.index]
        flat = [m for m in mine if m.flat]
        native = [m for m in mine if not m.flat]
        if flat:
            cohort.compiled = True
            out.append(_CompiledCall(cohort, flat))
        if native:
            out += _native_calls(cohort, native)
    return out


def _native_calls(cohort: Cohort, members: Sequence[Member]) -> list[Callable]:
    """PyTorch's own kernels: a fused one over all members, others over groups that fit the cache."""
    program = cohort.program
    if program.signature.implementation == "fused":
        return [_ColumnsCall(cohort, program, members)]
    on_cpu = all(m.param.device.type == "cpu" for m in members)
    listed = lists.over_lists(program) if on_cpu and program.style == "each" else None
    if listed is None and program.style == "each":
        return [_EachCall(cohort, members)]
    if not on_cpu:
        return [_ColumnsCall(cohort, program, members)]
    tensors = [[m.param if kind == "grad" else m.bound(kind, key) for m in members] for kind, key in program.inputs]
    return [_ColumnsCall(cohort, listed or program, members[part]) for part in lists.groups(tensors)]


class _CompiledCall:
    """All members in one call of Inductor's code."""

    def __init__(self, cohort: Cohort, members: Sequence[Member]):
        self.function, self.params = inductor.compile_body(cohort.program), [m.param for m in members]
        inputs = cohort.program.inputs
        self.grad_at = next(i for i, (kind, _) in enumerate(inputs) if kind == "grad")
        self.keep = members, cohort  # the addresses below are of their memory
        rows = [[0 if kind == "grad" else m.bound(kind, key).data_ptr() for kind, key in inputs] for m in members]
        self.rows = np.array(rows, np.int64)
        self.lengths = np.array([m.param.numel() for m in members], np.int64)
        self.args = len(members), self.rows.ctypes.data, self.lengths.ctypes.data, cohort.addresses.ctypes.data
        self.changed = [m.bound(kind, key) for m in members for kind, key in inputs if kind != "grad"]

    def __call__(self, values: Sequence[tuple]) -> None:
        gradients = [inductor.same_order(p.grad, p) for p in self.params]
        self.rows[:, self.grad_at] = [g.data_ptr() for g in gradients]
        self.function(*self.args)
        # Autograd must see the change, as it would see an operator's: a second backward through old weights is an error.
        torch.autograd.graph.increment_version(self.changed)


class _EachCall:
    """Single-tensor kernels, one parameter after the other."""

    def __init__(self, cohort: Cohort, members: Sequence[Member]):
        self.index, self.function = cohort.index, cohort.program.body.forward
        kinds = cohort.program.inputs
        self.grad_at = next(i for i, (kind, _) in enumerate(kinds) if kind == "grad")
        self.rows = [(m.param, [m.bound(kind, key) for kind, key in kinds]) for m in members]

    def __call__(self, values: Sequence[tuple]) -> None:
        scalars, function, grad_at = values[self.index], self.function, self.grad_at
        for param, row in self.rows:
            args = row.copy()
            args[grad_at] = param.grad
            function(*args, *scalars)


class _ColumnsCall:
    """List kernels (foreach, fused) over all of these parameters at once."""

    def __init__(self, cohort: Cohort, program: Program, members: Sequence[Member]):
        self.index, self.function = cohort.index, program.body.forward
        kinds = program.inputs
        self.params = [m.param for m in members]
        self.grad_at = next(i for i, (kind, _) in enumerate(kinds) if kind == "grad")
        self.columns = [[m.bound(kind, key) for m in members] for kind, key in kinds]

    def __call__(self, values: Sequence[tuple]) -> None:
        columns = self.columns.copy()
        columns[self.grad_at] = [p.grad for p in self.params]
        self.function(*columns, *values[self.index])
