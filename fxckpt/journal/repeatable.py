"""Which optimizers' steps come out the same when they are made again from the same gradients: what is not known to is not
journalled."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch

from fxckpt.compat.optimizers import plain_class
from fxckpt.compat.ranks import world_size
from fxckpt.compat.tensors import is_wrapper
from fxckpt.graph.update.inductor import is_dense
from fxckpt.graph.update.trace import BY_SHAPE, ELEMENTWISE
from fxckpt.journal.machine import adds_up
from fxckpt.optim.stepper import Stepper

WAY_OUT = "each step is a full checkpoint instead; leave out journal= to have fewer of them"

REPEATABLE = ELEMENTWISE | BY_SHAPE
"""Classes of ``torch.optim``. The second kind makes sums over a tensor: those have the same bits with the same number of threads
on the same machine (``machine``), wherever tensors lie and whatever else the machine does."""

_SMALLEST, _ONE = 5e-324, 1.0


Places = AbstractSet["int | None"]
"""The devices that parameters lie on, by the driver's numbers; None: host memory."""


def why_not(steppers: Sequence[Stepper], places: Places, together: int) -> str | None:
    """Why no step of this run is journalled, known before the first one; None if steps may be. ``together``: how many ranks write
    its store."""
    if (why := _other_ranks(together)) is not None:
        return why
    for name, stepper in ((plain_class(each.opt).__name__, each) for each in steppers):
        if not stepper.stock:
            return f"{name} is not of torch.optim, and what its step reads beside gradients and state is not known"
        if name not in REPEATABLE:
            return f"the step of {name} runs whole"
    return why_not_there(steppers, places, together)


def why_not_there(steppers: Sequence[Stepper], places: Places, together: int) -> str | None:
    """Why no step of parameters that lie there is journalled."""
    if places != {None} and together > 1:
        return "parameters of several ranks lie on devices, where steps made again were not compared yet"
    if len(places) > 1:
        return "parameters lie on several devices" + (", or in host memory" if None in places else "")
    if places != {None} and (sums := [n for each in steppers if adds_up([n := plain_class(each.opt).__name__])]):
        return f"{sums[0]} adds elements up, and in which order a device does that is not known"
    return None


def _other_ranks(together: int) -> str | None:
    """Ranks with a store each agree on checkpoints, and on what none of them may give up; records of a journal are not part of
    that."""
    if (world := world_size()) > 1 and together == 1:
        return f"this is one of {world} ranks with a store each, which agree on full checkpoints only"
    return None


def flushes_denormals() -> bool:
    """Are numbers near zero taken as zero in this thread (``torch.set_flush_denormal``)? Threads that began before go on
    without."""
    return _SMALLEST * _ONE == 0.0


def why_not_now(stepper: Stepper, gradients: Sequence[torch.Tensor | None], together: int) -> str | None:
    """Why the coming step is not journalled, though such steps may be. ``together`` as for ``why_not``."""
    if (why := _other_ranks(together)) is not None:  # the process group may have come after compile_step
        return why
    if flushes_denormals():
        return "torch.set_flush_denormal(True) holds for some threads of a process only, and for other ones in the next"
    if adds_up([plain_class(stepper.opt).__name__]) and torch.is_autocast_enabled("cpu"):
        return "its step is made under autocast, which chooses the types of products"
    if stepper.whole is not None:
        return f"its own step runs whole ({stepper.whole})"
    for member, grad in zip(stepper.executor.arranged.members, gradients):
        if member.plain:
            return f"{member.name} has optimizer state that is no tensor"
        param = member.local
        if is_wrapper(param):
            return f"{member.name} is a {type(param).__name__}, and steps of these were not compared"
        if grad is None:
            continue
        other = (grad.dtype, grad.shape) != (param.dtype, param.shape) or is_wrapper(grad)
        if other or grad.is_neg() or (grad.dtype.is_complex and grad.is_conj()):
            return f"the gradient of {member.name} is of another type than the parameter"
        if grad.device != param.device or grad.layout is not torch.strided:
            return f"the gradient of {member.name} is sparse, or lies elsewhere"
        if not is_dense(grad):
            return f"elements of the gradient of {member.name} share memory, or have gaps between them"
    return None
