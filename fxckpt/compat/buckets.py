"""The buckets in which DistributedDataParallel sums gradients: in the first backward of a process other ones than behind it.

That one sums all of them together, in the order of the parameters, and the order in which they become ready makes the buckets of
all others (``Reducer::rebuild_buckets``, from rank 0's order). Of three numbers or more the sum depends on where in a bucket they
lie. A process that goes on from a checkpoint needs the buckets of the one before from its first backward on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

from fxckpt.compat.alive import alive
from fxckpt.compat.tensors import hooks_of


def rebuilding(params: Iterable[torch.Tensor]) -> list[Any]:
    """Each ``DistributedDataParallel`` of these parameters, of three ranks or more, whose buckets its first backward makes anew.
    Those of ``find_unused_parameters`` stay as they are."""
    kind = getattr(sys.modules.get("torch.nn.parallel.distributed"), "DistributedDataParallel", None)
    if kind is None:
        return []
    wanted = set(map(id, params))
    found = [each for each in alive(kind) if not each.find_unused_parameters or each.static_graph]
    of_these = [each for each in found if any(id(p) in wanted for p in each.parameters())]
    return [each for each in of_these if torch.distributed.get_world_size(each.process_group) > 2]


def why_not_settled(ddp: Any) -> str:
    """Why ``settle`` is not for it; empty if it is."""
    reasons = {
        "static_graph": ddp.static_graph,
        "optimize_ddp='python_reducer'": getattr(ddp, "_use_python_reducer", False),
        "a communication hook": getattr(ddp, "_comm_hooks", ()),
        "its mixed_precision": ddp.mixed_precision is not None,
        "hooks on parameters": any(map(hooks_of, ddp.parameters())),
        "this version of torch": not hasattr(ddp.reducer, "prepare_for_backward"),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def settle(ddp: Any, order: Iterable[torch.Tensor]) -> None:
    """Have its buckets made as a first backward would in which gradients come in this order; what it does not have comes last.
    All ranks call it together, before the first forward: zeros are summed, once, and gradients that wait stay as they are."""
    params = {id(p): p for p in ddp.parameters() if p.requires_grad}
    first = [p for p in order if id(p) in params]
    kept = [(p, p.grad) for p in params.values()]
    for param, _ in kept:
        param.grad = None
    ddp.reducer.prepare_for_backward([])
    with torch.enable_grad():
        for param in {**{id(p): p for p in first}, **params}.values():
            torch.autograd.backward([param], [torch.zeros_like(param)])
    for param, grad in kept:
        param.grad = grad
