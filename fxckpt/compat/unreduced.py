"""Gradients that FSDP2 holds back: those of backwards that it was told not to reduce (``set_requires_gradient_sync(False)``).

It keeps each, this rank's own sum, as the gradient of the whole parameter, which no optimizer sees, or, where it reduces in
another type, as ``unsharded_accumulated_grad``. To the latter every later backward adds, in either case: so that is where a
restored one goes, and the sums have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fxckpt.compat.spread import arrived, is_spread, lies_as, like_spec, local, param_groups_of
from fxckpt.errors import SetupError

_ONLY_AT_STEPS = "Take checkpoints at optimizer steps only, behind a backward that reduces everything"


def held_back(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, str]]:
    """Each sharded parameter of which FSDP2 holds a gradient back, that gradient, of which no copy is made, and how the parameter
    lies over the ranks, in words. Raises SetupError for one that has no place in a checkpoint."""
    for group in param_groups_of(model):
        if getattr(group, "_partial_reduce_output", None) is not None:
            raise SetupError(
                "FSDP2 holds gradients that it has summed up over shards and not over replicas "
                f"(set_requires_all_reduce(False)): they lie in no checkpoint. {_ONLY_AT_STEPS}"
            )
        for each in group.fsdp_params:
            if (grad := _held(each)) is not None:
                if is_spread(grad) and tuple(grad.placements) != tuple(_spec_of(each).placements):
                    raise SetupError(
                        f"FSDP2 holds a gradient back that tensor parallelism has not made whole either ({lies_as(grad)}): it "
                        f"lies in no checkpoint. {_ONLY_AT_STEPS}"
                    )
                yield each.sharded_param, arrived(grad), lies_as(each.sharded_param) or ""


def holding(model: torch.nn.Module | None) -> tuple[tuple[int, int], ...]:
    """What FSDP2 holds back, so that whoever looks twice sees whether a backward came between."""
    groups = [] if model is None else list(param_groups_of(model))
    sums = (getattr(group, "_partial_reduce_output", None) for group in groups)
    grads = (_held(each) for group in groups for each in group.fsdp_params)
    return tuple((id(each), local(each)._version) for each in (*sums, *grads) if each is not None)


def hold_back(model: torch.nn.Module, of: dict[int, tuple[torch.Tensor, str]]) -> set[int]:
    """Have FSDP2 hold these gradients back, by the ``id`` of the sharded parameter: (gradient, how the parameter lay), and no
    others. Returns the ids of those that were set: each has the shape of its parameter, which lies as it did."""
    done = set()
    for group in param_groups_of(model):
        group._partial_reduce_output = None
        for each in group.fsdp_params:
            if (whole := getattr(each, "_unsharded_param", None)) is not None:
                whole.grad = None
            each.unsharded_accumulated_grad = None
            grad, lay = of.get(id(each.sharded_param), (None, ""))
            if grad is not None and grad.shape == each._orig_size and lay == lies_as(each.sharded_param):
                each.unsharded_accumulated_grad = _as_whole(each, grad)
                done.add(id(each.sharded_param))
    return done


def _held(param: Any) -> Any:
    """What FSDP2 keeps of a parameter's gradient; None if all of it was reduced."""
    whole = getattr(param, "_unsharded_param", None)
    found = getattr(param, "unsharded_accumulated_grad", None)
    return found if found is not None else None if whole is None else whole.grad


def _as_whole(param: Any, grad: torch.Tensor) -> Any:
    """A gradient as FSDP2 has it: under tensor parallelism a DTensor."""
    held = grad.to(local(param.sharded_param).device, copy=True)
    spec = _spec_of(param)
    return held if spec is None else like_spec(held, spec)


def _spec_of(param: Any) -> Any:
    """How tensor parallelism spreads the whole parameter; None where there is none. It has another name from torch 2.12 on."""
    return getattr(param, "_unsharded_dtensor_spec", None) or getattr(param, "_tp_spec", None)
