"""What of torch spreads one training over ranks, or its steps into the backward: found by class names and marks.

Nobody who does not use it need import it. Each mark is private; without it what it marks is taken as any other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from fxckpt.compat.alive import alive

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def is_zero(opt: object) -> bool:
    """Is it a ``ZeroRedundancyOptimizer``, or the optimizer of one rank's share inside one? That does not know whose it is, so
    this looks at what the garbage collector knows, where the class is imported at all."""
    kind = getattr(sys.modules.get(_ZERO), "ZeroRedundancyOptimizer", None)
    if kind is None:
        return False
    return isinstance(opt, kind) or any(getattr(each, "optim", None) is opt for each in alive(kind))


def is_flattened(param: torch.Tensor) -> bool:
    """Does FSDP1 (``FullyShardedDataParallel``) hold it in flat shards? It marks its own parameters and, with
    ``use_orig_params``, those that are views of them."""
    return hasattr(param, "_fsdp_flattened")


def steps_in_backward(param: torch.Tensor) -> str | None:
    """The class of an optimizer that ``_apply_optimizer_in_backward`` has step this parameter as its gradient arrives."""
    found = getattr(param, "_in_backward_optimizers", None)
    return type(found[0]).__name__ if found else None


def steps_in_hooks(model: object) -> bool:
    """Does a ``DistributedDataParallel`` in this model step its parameters itself, in the hook that averages gradients
    (``_register_fused_optim``)?"""
    kind = getattr(sys.modules.get("torch.nn.parallel.distributed"), "DistributedDataParallel", None)
    wrapped = [each for each in _modules(model) if kind is not None and isinstance(each, kind)]
    hooks = [hook for each in wrapped for hook, *_ in getattr(each, "_comm_hooks", ())]
    return any(getattr(hook, "__qualname__", "").startswith("_hook_then_optimizer") for hook in hooks)


def _modules(model: object) -> Iterator[torch.nn.Module]:
    """All modules of what was given as ``model=``."""
    given = model.values() if isinstance(model, dict) else model if isinstance(model, (list, tuple)) else [model]
    for each in given:
        if isinstance(each, torch.nn.Module):
            yield from each.modules()


def sharded_as(tensor: Any) -> str | None:
    """How a DTensor is laid out over ranks, in words; None of any other tensor."""
    if type(tensor).__name__ != "DTensor" and not any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):
        return None
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [f"dimension {at}" for at in range(mesh.ndim)]
    each = [f"{how} over the {size} ranks of {name!r}" for how, size, name in zip(tensor.placements, mesh.shape, names)]
    return ", ".join(each)
