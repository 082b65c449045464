"""In which order autograd finishes gradients: what no compiled graph shows."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxckpt.compat.tensors import gradient_node, on_gradient


class FirstBackward:
    """Listens to the backwards before the first step; once stopped it costs nothing. What a compiled region computes arrives all
    at once, so this orders regions, and what is not compiled."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], told: Callable[[], None]):
        self.deaf: bool = False  # while gradients come that are none of the script's
        self._told = told  # of each gradient
        self._order: dict[int, None] = {}
        self._params = [p for opt in optimizers for group in opt.param_groups for p in group["params"] if p.requires_grad]
        self._nodes = [gradient_node(p) for p in self._params]  # hooks live as long as these
        hook = functools.partial(self._arrived, weakref.ref(self))  # weak: a circle through autograd is never collected
        self._handles = [on_gradient(node, functools.partial(hook, at)) for at, node in enumerate(self._nodes)]

    @staticmethod
    def _arrived(this: weakref.ref, at: int, *_: Any) -> None:
        if (self := this()) is not None and not self.deaf:
            self._told()
            self._order.pop(at, None)  # the last time counts
            self._order[at] = None

    def order(self) -> list[torch.Tensor]:
        """The parameters, in the order in which their gradients were final."""
        return [self._params[at] for at in self._order]

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._nodes.clear()
