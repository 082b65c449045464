"""What autograd and a GradScaler tell a run: a gradient arrives, an attempt was skipped.

Both hold the run weakly: they live as long as the parameters and the scaler do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from fxckpt.compat.dynamo import untraced
from fxckpt.compat.optimizers import count_skipped_attempts
from fxckpt.compat.tensors import gradient_node, on_gradient
from fxckpt.optim.stepper import Stepper


class GradientListener(Protocol):
    """Who is told of gradients."""

    def gradient_arrived(self, index: int) -> None:
        """A gradient reached a parameter of the optimizer of that number. Called by autograd, in its thread."""

    def first_backward(self) -> None:
        """A gradient arrived, before the first step."""


class GradientHooks:
    """Hooks on autograd's accumulation nodes, one for each parameter; Dynamo does not see them.

    See ``compat.tensors.gradient_node``.
    """

    def __init__(self) -> None:
        self.listener: Callable[[], GradientListener | None] = lambda: None  # a weak reference, once there is one
        self._hooked: dict[int, Any] = {}  # parameter -> its node; the hook lives as long as the node does

    def first_backward(self) -> None:
        """Tell the listener of a gradient that arrives before the hooks are there."""
        if (listener := self.listener()) is not None:
            listener.first_backward()

    def hook(self, steppers: Iterable[Stepper]) -> None:
        """Hook every parameter that has no hook yet."""
        for index, stepper in enumerate(steppers):
            arrived = self._hook_of(index)
            for param in (m.param for m in stepper.bindings.members):
                if not param.requires_grad:
                    continue
                node = gradient_node(param)  # another one after param.data changed its type
                if self._hooked.get(id(param)) is not node:
                    on_gradient(node, arrived)
                    self._hooked[id(param)] = node

    def _hook_of(self, index: int) -> Callable[..., None]:
        whom = self.listener

        @untraced
        def arrived(*_: Any) -> None:
            listener = whom()
            if listener is not None:
                listener.gradient_arrived(index)

        return arrived


def watch_scalers(
    objects: Iterable[object], optimizers: Iterable[torch.optim.Optimizer], skipped: Callable[[torch.optim.Optimizer], None]
) -> None:
    """Call the method ``skipped`` with the optimizer whose step a GradScaler does not call, because it found an inf."""
    weak = weakref.WeakMethod(skipped)

    def tell(opt: torch.optim.Optimizer) -> None:
        if (method := weak()) is not None:
            method(opt)

    for value in objects:
        if isinstance(value, torch.amp.GradScaler):
            for opt in optimizers:
                count_skipped_attempts(value, opt, tell)
