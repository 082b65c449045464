"""One parameter of an optimizer, with the tensors that were bound to it."""

from __future__ import annotations

from typing import Any

import torch

from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.trace import is_count


def is_dense(value: object) -> bool:
    """Is it a tensor with memory of its own? Sparse gradients make sparse momentum."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


class BoundParam:
    """A parameter, the tensors of its state as they were when they were bound, and the program that updates them."""

    def __init__(self, name: str, param: torch.Tensor, group: int, index: int, state: dict[str, Any] | None):
        self.name: str = name
        self.param: torch.Tensor = param
        self.group: int = group
        self.state: dict[str, Any] = {} if state is None else state  # the optimizer's own dict, where it has one
        self.index = index  # among all of its optimizer
        self.address: int = param.data_ptr()
        self.entries: int = len(self.state)
        tensors = ((k, v) for k, v in sorted(self.state.items()) if is_dense(v))
        self.items: list[tuple[str, torch.Tensor, int]] = [(key, value, value.data_ptr()) for key, value in tensors]
        self.program: Program | None = None
        self.implementation = "single"
        self.compile = False
        self.flat = False  # its update is compiled, over its elements in the order of memory

    def stale(self) -> bool:
        """Was a tensor of it replaced or moved since it was bound? Whether ``state`` is the optimizer's is asked there."""
        if self.param.data_ptr() != self.address or len(self.state) != self.entries:
            return True
        get = self.state.get
        return any(value is not get(key) or value.data_ptr() != address for key, value, address in self.items)

    def bound(self, kind: str, key: str) -> torch.Tensor:
        """The tensor behind one input of a program; the parameter in place of its gradient, another one at every step."""
        return self.state[key] if kind == "state" else self.param

    @property
    def plain(self) -> bool:
        """Does it have state that is no tensor, or a sparse one, which may change without a new binding?"""
        return len(self.items) != len(self.state)

    def describe(self) -> dict[str, Any]:
        """Its state for the record: what it takes, with the files' tensors, to make it anew just as it is."""
        return {
            "keys": list(self.state),
            "strides": {k: tuple(t.stride()) for k, t, _ in self.items if not t.is_contiguous()},
            "complex": [k for k, t, _ in self.items if t.is_complex()],
            "plain": {k: v for k, v in self.state.items() if not is_dense(v)},
            "host": [k for k, t, _ in self.items if t.device.type == "cpu" and self.param.device.type != "cpu"],
        }

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What the layer owns of this parameter: ``("", parameter)`` and its state by key, less the counts."""
        return [("", self.param)] + [(k, v) for k, v, _ in self.items if not is_count(k, v, self.param)]

    def counts(self) -> list[tuple[str, torch.Tensor]]:
        """The 0-dimensional states, which advance before all updates."""
        return [(k, v) for k, v, _ in self.items if is_count(k, v, self.param)]
