"""Compiled regions as they run: forwards are counted, and whoever watches is told when the backward of one begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from fxckpt.compat.dynamo import untraced
from fxckpt.compat.placing import autograd_is_compiled, region_nodes
from fxckpt.compat.tensors import backward_under_way, gradient_accumulator
from fxckpt.graph import ops
from fxckpt.graph.backward.region import Region
from fxckpt.optim.bindings import BoundParam


class Seen:
    """One compiled region as it runs: how often forward since the last step, and what speaks against arming it for good."""

    def __init__(self, region: Region):
        self.region: Region = region
        self.at: list[int] = [each.index for each in region.bound]
        self.forwards = 0
        self.why = ""  # it can never be armed
        self.against = ""  # it was not armed in the last backward
        self.nodes: list[Any] = []  # the accumulators of its parameters; autograd keeps the same ones while they are held
        self.members: dict[int, BoundParam] = {}  # by input
        self.bound = -1  # the binding that they are of


class Watcher(Protocol):
    """Who is told of regions: see ``InBackward``."""

    def watches(self) -> bool:
        """Is it to be told?"""

    def forward_begins(self) -> None:
        """One of the regions runs forward."""

    def forward_ended(self, seen: Seen) -> None:
        """It did, and its backward may follow."""

    def region_begins(self, seen: Seen) -> None:
        """The backward of a region begins."""

    def region_ended(self, seen: Seen, gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...] | None:
        """It ended, with these gradients; returns others that are to go on in their place, or None."""


This = Callable[[], Watcher | None]
"""A weak reference to who watches: what is compiled must not keep a run."""


def watched(region: Region, inner: Callable[..., Any], this: This) -> Callable[..., Any]:
    """The compiled region ``inner``, and what has to be known of its forwards."""
    seen = Seen(region)

    def run(*args: Any) -> Any:
        watching = this()
        if watching is None or not watching.watches():
            return inner(*args)
        watching.forward_begins()
        ops.listen(None)
        _look_at(seen, args)
        out = inner(*args)
        if _has_backward(seen, out, this):
            watching.forward_ended(seen)
        return out

    return run


def _look_at(seen: Seen, args: Sequence[Any]) -> None:
    """Its inputs must be what the run trains."""
    given = list(map(args.__getitem__, seen.at))
    if list(map(id, given)) != seen.region.ids:
        seen.why = "its code also runs for other parameters (blocks that share one compile)"
    elif not seen.nodes:
        seen.nodes = [gradient_accumulator(param) for param in given if param.requires_grad]


def _has_backward(seen: Seen, out: Any, this: This) -> bool:
    """Have whoever watches told when the backward of this very forward begins and ends, if it may have one."""
    if not seen.region.layers or not torch.is_grad_enabled():
        return False
    if autograd_is_compiled():
        seen.why = "compiled autograd runs the backward"
        return False
    node: Any = next(region_nodes(out, _MARK), None)
    if node is None:
        return False
    node.metadata[_MARK] = True
    if backward_under_way() is not None:
        seen.why = "its forward also runs inside a backward (activation checkpointing around it)"
    seen.forwards += 1
    node.register_prehook(partial(_begins, this, seen))
    node.register_hook(partial(_ended, this, seen))
    return True


_MARK = "fxckpt"
"""In an autograd node's metadata: it is a region's, and watched."""


@untraced
def _begins(this: This, seen: Seen, _: Any) -> None:
    """A hook of autograd, which compiled autograd may show to Dynamo."""
    if (watching := this()) is not None:
        watching.region_begins(seen)


@untraced
def _ended(this: This, seen: Seen, gradients: Any, _: Any) -> Any:
    """The same behind the region."""
    watching = this()
    return None if watching is None else watching.region_ended(seen, gradients)
