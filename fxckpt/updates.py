"""The calls behind the update nodes of a StepGraph, with everything that does not change from step to step bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxckpt.graph import inductor
from fxckpt.graph.hoist import Program

if TYPE_CHECKING:
    from fxckpt.stepper import Member


class Cohort:
    """Parameters of one group that share their program and their step count, so one set of scalars serves them all."""

    def __init__(self, index: int, group: int, program: Program):
        self.index, self.group, self.program = index, group, program
        self.count_keys = program.counts
        self.representative: list[torch.Tensor] = []
        self.others: list[list[torch.Tensor]] = [[] for _ in program.counts]
        self.compiled = False
        self.native = False
        self.dtype = inductor.scalar_dtype(program.signature.dtype)

    def add(self, member: Member, compiled: bool) -> None:
        """Take a parameter in; the first one's counts stand for all."""
        counts = [member.state[key] for key in self.count_keys]
        if not self.compiled and not self.native:
            self.representative = counts
        else:
            for column, value in zip(self.others, counts):
                column.append(value)
        self.compiled |= compiled
        self.native |= not compiled

    def scalars(self, group: dict[str, Any]) -> tuple[tuple, list[torch.Tensor]]:
        """Advance the counts of all members; the scalars as doubles and, for compiled bodies, as 0-dim tensors."""
        hypers = [group[name] if i is None else group[name][i] for name, i in self.program.hyperparameters]
        values = self.program.host.forward(*self.representative, *hypers)
        for source, column in zip(self.representative, self.others):
            if column:
                torch._foreach_copy_(column, [source] * len(column))
        tensors = list(torch.tensor(values, dtype=self.dtype).unbind()) if self.compiled and values else []
        return values, tensors


def calls_for(members: Sequence[Member], of: dict[str, int], cohorts: Sequence[Cohort],
              compiled: dict[Any, Callable]) -> list[Callable]:
    """The calls that update ``members``: per cohort one, or one for every ``SLOTS`` of them when compiled."""
    out: list[Callable] = []
    for cohort in cohorts:
        mine = [m for m in members if of[m.name] == cohort.index]
        flat = [m for m in mine if m.flat is not None]
        for chunk in inductor.pack(flat):
            out.append(_CompiledCall(cohort, compiled[cohort.program.signature], chunk))
        native = [m for m in mine if m.flat is None]
        if native:
            out.append((_EachCall if cohort.program.style == "each" else _ColumnsCall)(cohort, native))
    return out


class _CompiledCall:
    """Up to ``SLOTS`` parameters in one call of Inductor's code; empty slots get tensors of length zero."""

    def __init__(self, cohort: Cohort, function: Callable, members: Sequence[Member]):
        self.index, self.function = cohort.index, function
        inputs = cohort.program.inputs
        grad_at = next(i for i, (kind, _) in enumerate(inputs) if kind == "grad")
        empty = torch.empty(0, dtype=cohort.program.signature.dtype)
        self.args: list[torch.Tensor] = []
        self.grads: list[tuple[int, torch.Tensor]] = []
        for member in members:
            self.grads.append((len(self.args) + grad_at, member.param))
            self.args += [*member.flat[:grad_at], empty, *member.flat[grad_at:]]
        self.args += [empty] * ((inductor.SLOTS - len(members)) * len(inputs))

    def __call__(self, values: Sequence[tuple]) -> None:
        args = self.args.copy()
        for position, param in self.grads:
            args[position] = inductor.flat_gradient(param.grad, param)
        self.function(*args, *values[self.index][1])


class _EachCall:
    """Single-tensor kernels, one parameter after the other."""

    def __init__(self, cohort: Cohort, members: Sequence[Member]):
        self.index, self.function = cohort.index, cohort.program.body.forward
        kinds = cohort.program.inputs
        self.grad_at = next(i for i, (kind, _) in enumerate(kinds) if kind == "grad")
        self.rows = [(m.param, [m.bound(kind, key) for kind, key in kinds]) for m in members]

    def __call__(self, values: Sequence[tuple]) -> None:
        scalars, function, grad_at = values[self.index][0], self.function, self.grad_at
        for param, row in self.rows:
            args = row.copy()
            args[grad_at] = param.grad
            function(*args, *scalars)


class _ColumnsCall:
    """List kernels (foreach, fused) over all of these parameters at once."""

    def __init__(self, cohort: Cohort, members: Sequence[Member]):
        self.index, self.function = cohort.index, cohort.program.body.forward
        kinds = cohort.program.inputs
        self.params = [m.param for m in members]
        self.grad_at = next(i for i, (kind, _) in enumerate(kinds) if kind == "grad")
        self.columns = [[m.bound(kind, key) for m in members] for kind, key in kinds]

    def __call__(self, values: Sequence[tuple]) -> None:
        columns = self.columns.copy()
        columns[self.grad_at] = [p.grad for p in self.params]
        self.function(*columns, *values[self.index][0])
