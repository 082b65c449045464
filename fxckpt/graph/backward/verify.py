"""Checks Inductor's schedule of a backward: whoever reads what an op's update changes or takes has run before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """One kernel or call of a schedule: its ``names`` in it, those of all kernels that must have run ``before`` it, and the
    inputs of the graph (by number) and gradients (by name) that it ``reads``. ``layer``: an op's; None for all others."""

    names: frozenset[str]
    before: Collection[str]
    reads: frozenset[int | str]
    layer: int | None = None
    changes: frozenset[int | str] = frozenset()


def verify_backward(schedule: Sequence[Kernel], layers: Sequence[str]) -> Mapping[int, str]:
    """The layers whose op may run before somebody who reads what its update changes, each with the reason; all others are right,
    however the schedule is put into an order that its dependencies allow."""
    wrong: dict[int, str] = {}
    for op in (kernel for kernel in schedule if kernel.layer is not None):
        for kernel in schedule:
            if kernel is op or not kernel.reads & op.changes or kernel.names & set(op.before):
                continue
            if kernel.layer is None:
                who = f"{min(kernel.names)}, which reads {layers[op.layer or 0]!r},"
                wrong[op.layer or 0] = f"Inductor may run {who} behind its update"
    return wrong
