"""A parameter without memory, and the *tape* of what a step asked of it: operators, in which numbers are holes.

A tape becomes the body of a ``Program``; the numbers that stood there this time are the scalars of this one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fxckpt.compat.tracing import stand_in
from fxckpt.graph.update.foreach import data_of
from fxckpt.graph.update.trace import NotTraceable

Name = tuple[Any, Any]
"""Of a tensor on a tape: ``("param", None)``, ``("grad", None)``, ``("state", key)``, or ``(operator's index, output's)``."""


class Ref(NamedTuple):
    """A tensor of the tape, as an argument."""

    name: Name


class Hole(NamedTuple):
    """A number as an argument; ``dtype`` where it is a 0-dimensional tensor on the host."""

    dtype: torch.dtype | None


class Op(NamedTuple):
    """One operator of a tape; an argument is a Ref, a Hole, a tuple of them in place of a list, or a constant."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[Any, ...]


Tape = tuple[Op, ...]


class StandIn:
    """The stand-ins of one parameter, its gradient and its state, with the tape that was noted on them last. As long as the step
    asks for the same operators as last time, last time's results are handed out and nothing is computed."""

    def __init__(self, param: torch.Tensor, grad: torch.Tensor | None, state: dict[str, torch.Tensor]):
        self.param: torch.nn.Parameter = torch.nn.Parameter(stand_in(param), requires_grad=param.requires_grad)
        self.param.grad = None if grad is None else stand_in(grad)
        self.tensors: dict[str, torch.Tensor] = {key: stand_in(value) for key, value in state.items()}
        self.names: dict[int, Name] = {id(t): ("state", key) for key, t in self.tensors.items()}
        self.names |= {id(self.param): ("param", None), id(self.param.grad): ("grad", None)}
        self.noted: list[tuple[Op, Any, list[int]]] = []  # operator, what it returned, ids of its new tensors
        self.at: int = 0
        self.scalars: list[Any] = []
        self._tape: Tape | None = None

    def begin(self) -> None:
        """A step begins."""
        self.at, self.scalars = 0, []

    def next(self, op: Op, compute: Callable[[], Any]) -> Any:
        """What ``op`` returns: as last time if the tape goes on as it did, else ``compute()``, which is named and noted."""
        if self.at < len(self.noted) and self.noted[self.at][0] == op:
            self.at += 1
            return self._again(compute()) if _is_view(op.target) else self.noted[self.at - 1][1]
        self._forget()
        out = compute()
        new = []
        for index, tensor in _outputs(out, op.target):
            if id(tensor) not in self.names:  # in-place operators return what they were given
                self.names[id(tensor)] = (self.at, index)
                new.append(id(tensor))
        self.noted.append((op, out, new))
        self.at += 1
        return out

    def _again(self, out: Any) -> Any:
        """Another view in the place of last time's: autograd, above this, takes no tensor for a view twice."""
        op, _, old = self.noted[self.at - 1]
        names = {index: self.names.pop(each) for index, each in enumerate(old)}
        new = [id(t) for _, t in _outputs(out, op.target)]
        self.names.update(zip(new, names.values()))
        self.noted[self.at - 1] = op, out, new
        return out

    def _forget(self) -> None:
        """The tape goes another way from here on."""
        for _, _, new in self.noted[self.at :]:
            for each in new:
                del self.names[each]
        del self.noted[self.at :]
        self._tape = None

    def tape(self) -> Tape:
        """What this step asked for."""
        if self.at < len(self.noted):
            self._forget()
        if self._tape is None:
            self._tape = tuple(op for op, _, _ in self.noted)
        return self._tape


def _outputs(out: Any, target: Any) -> list[tuple[int | None, torch.Tensor]]:
    """The tensors that an operator returned, with their index if it returns several. Raises NotTraceable for others."""
    if isinstance(out, torch.Tensor):
        return [(None, out)]
    found = [] if out is None else list(out) if isinstance(out, (list, tuple)) else [out]
    if any(not isinstance(t, torch.Tensor) for t in found):
        raise NotTraceable(f"{target} tells it something about a tensor's values")
    return list(enumerate(found))


@functools.cache
def _is_view(target: Any) -> bool:
    """Does it return a view of what it was given?"""
    return target is not data_of and any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)
