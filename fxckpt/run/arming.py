"""What speaks against updates inside a backward: of any layer, or of one compiled region's."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from fxckpt.compat.optimizers import has_pre_hooks
from fxckpt.compat.placing import accumulates
from fxckpt.compat.ranks import world_size
from fxckpt.compat.tensors import hooks_of
from fxckpt.optim.strategy import SplitStep
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.regions import Seen

ADDED_UP = "gradients are added up over several backwards"


def against_all(arrangement: Arrangement, trains: threading.Thread, backwards: int) -> str | None:
    """What speaks against arming any layer in the backward that begins, number ``backwards`` since the last step; ``trains``: the
    thread that steps."""
    stepper = arrangement.steppers[0]
    opt, members = stepper.opt, stepper.bindings.members
    if len(arrangement.steppers) > 1:
        return "several optimizers make one run"
    if world_size() > 1:
        return "gradients are averaged over ranks behind the backward"
    if not isinstance(stepper.strategy, SplitStep):
        return "its step is not one that is traced and split into layers"
    if not isinstance(stepper.executor.prepared.made_for, list) or stepper.bindings.stale():
        return "the optimizer has made no step with these tensors yet"
    if any(m.param.device.type != "cpu" for m in members):
        return "parameters are on a device, whose backward runs in a thread of its own"
    if threading.current_thread() is not trains:
        return "the backward runs in another thread than opt.step()"
    if backwards > 1:
        return ADDED_UP
    if torch.is_grad_enabled():
        return "the backward makes a graph of its own (create_graph=True)"
    if any(map(hooks_of, (m.param for m in members))):
        return "there are hooks on parameters, which see gradients"
    if has_pre_hooks(opt):
        return "there are hooks in front of opt.step()"
    return None


def against_now(seen: Seen, ran: Sequence[Seen]) -> str:
    """What speaks against arming this region's layers in its backward; ``ran``: those that ran forward since the last step."""
    if seen.why:
        return seen.why
    if seen.forwards != 1:
        return f"its region ran forward {seen.forwards} times since the last step"
    if any(m.param.grad is not None for m in seen.members.values()):
        return ADDED_UP
    mine = set(seen.region.ids)
    if any(other is not seen and not mine.isdisjoint(other.region.ids) for other in ran):
        return "another compiled region uses its parameters, too"
    if not all(map(accumulates, seen.nodes)):
        return "the backward does not add to its parameters' gradients"
    return ""


def against_at_step(seen: Seen) -> str | None:
    """What speaks against a region, where no backward is under way."""
    if seen.why or seen.against or seen.forwards == 1:
        return seen.why or seen.against or None
    return f"its region ran forward {seen.forwards} times since the last step"
