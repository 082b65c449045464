"""Parameters that share one set of scalars: their counts advance together, and their scalars are computed once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from fxckpt.engine import _lib
from fxckpt.graph.update import inductor
from fxckpt.graph.update.hoist import Program
from fxckpt.optim.bound_param import BoundParam

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
        self.addresses: np.ndarray[Any, Any] = _addresses(
            self.values.ctypes.data + i * self.values.itemsize for i in range(program.scalars)
        )
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
    """What gives all of ``column`` the value of ``source``, 0-dimensional as they are. Those that have their addresses
    checked at every step (counts on the CPU) are written without PyTorch: it takes half a microsecond for each."""
    if any(t.device.type != "cpu" or t.dtype != source.dtype for t in (source, *column)):
        return lambda: torch._foreach_copy_(column, [source] * len(column))
    ffi, lib = _lib.load()
    addresses = ffi.new("uint64_t[]", [t.data_ptr() for t in column])
    pointer = ffi.cast("void *", source.data_ptr())
    return lambda: lib.fx_spread(pointer, source.itemsize, addresses, len(column))


def _addresses(values: Iterable[int]) -> np.ndarray:
    """Addresses as a C array; never empty, so that it has an address itself."""
    return np.array([*values, 0], np.int64)
