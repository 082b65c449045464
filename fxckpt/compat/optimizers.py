"""Private parts of ``torch.optim``: steps without their wrappers, hooks, schedulers' and scalers' marks."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import optimizer

from fxckpt.compat.instance_subclass import instance_subclass
from fxckpt.errors import SetupError

SCHEDULER_NOTES = {"initial_lr", "swa_lr", "base_momentum", "max_momentum", "max_lr", "min_lr"}
"""What schedulers leave in a group."""

GROUP_BOOKKEEPING = {"params", "param_names", *SCHEDULER_NOTES}
"""Entries of a group that no optimizer's arithmetic reads."""

HOOKS = ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
"""The hooks of an optimizer, each kind in an attribute ``_optimizer_<kind>_hooks``."""

ATTRIBUTES_OF_TORCH = frozenset({
    *(f"_optimizer_{kind}_hooks" for kind in HOOKS), "state", "param_groups", "defaults", "step", "grad_scale", "found_inf",
    "_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused", "_step_supports_amp_scaling", "_opt_called",
    "_step_count", "_zero_grad_profile_name", "_with_counter", "_hook_for_profile",
})  # fmt: skip
"""What PyTorch, its schedulers and its scaler keep in an optimizer: nothing that a step computes with, but state and groups."""

_OURS: Any = "fxckpt"
"""The key of our own hooks; those of others have numbers."""


def unhooked_step(opt: torch.optim.Optimizer) -> Any:
    """The plain function behind ``type(opt).step``, without the hook wrapper and without the grad-mode wrapper.
    ``Optimizer.__init__`` puts ``profile_hook_step`` on the class (marked ``hooked``); under it most optimizers have
    ``_use_grad_for_differentiable``, which would ask Dynamo for a graph break. Both keep ``__wrapped__``."""
    step: Any = plain_class(opt).step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step


def settings_of(opt: torch.optim.Optimizer) -> frozenset[str]:
    """The entries of a parameter group that a class of ``torch.optim`` can read: what it takes, and what it has as defaults.
    Users keep more in their groups: a name, a factor for a scheduler, tables."""
    cls: Any = plain_class(opt)
    return (_arguments_of(cls) | opt.defaults.keys()) - GROUP_BOOKKEEPING


@functools.cache
def _arguments_of(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls).parameters)


def stock_step(opt: torch.optim.Optimizer) -> Callable[..., Any]:
    """The stock step as a user would call it, less the hooks (they fire once, in our own wrapper)."""
    step: Any = plain_class(opt).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def plain_class(opt: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """The class the user made: the first one of the MRO that is not ours."""
    return next(c for c in type(opt).__mro__ if "_fxckpt_base" not in c.__dict__)


def is_stock(opt: torch.optim.Optimizer) -> bool:
    """Is it an optimizer of ``torch.optim`` itself, and not of a class that only has its name or derives from it?"""
    cls = plain_class(opt)
    return cls is getattr(torch.optim, cls.__name__, None)


def inner_hooks(opt: torch.optim.Optimizer) -> bool:
    """Are hooks registered, on ``opt`` or for all optimizers, that the step of one of its base classes would call too?
    ``Optimizer.__init__`` marks each step that it wraps with ``hooked``."""
    cls = plain_class(opt)
    inner = [step for c in cls.__mro__ if (step := vars(c).get("step")) is not None and step is not cls.step]
    return _has_hooks(opt) and any(getattr(step, "hooked", False) for step in inner)


def _has_hooks(opt: torch.optim.Optimizer) -> bool:
    """Are hooks of ``step`` registered, on ``opt`` or for all optimizers, which are not ours? Nothing public lists them."""
    of_all = optimizer._global_optimizer_pre_hooks or optimizer._global_optimizer_post_hooks
    before, after = opt._optimizer_step_pre_hooks, opt._optimizer_step_post_hooks
    return bool(len(before) > (_OURS in before) or len(after) > (_OURS in after) or of_all)


def has_pre_hooks(opt: torch.optim.Optimizer) -> bool:
    """Are hooks registered in front of ``step``, on ``opt`` or for all optimizers, which are not ours?"""
    before = opt._optimizer_step_pre_hooks
    return bool(len(before) > (_OURS in before) or optimizer._global_optimizer_pre_hooks)


def hooked(function: Callable) -> Callable:
    """Wrap ``function`` as ``Optimizer.__init__`` wraps ``step``: a region for profilers, and pre and post hooks, once each.

    With no hook and no profiler none of that is to be done, and PyTorch's wrapper would take a fifth of a millisecond for it
    after a backward pass, when its code is cold. (An ``ExecutionTraceObserver`` without a profiler cannot be seen: its trace
    lacks the region.) Private: ``profile_hook_step``, the flags of profilers (one is a thread's own, one the legacy profiler does
    not set), and the mark ``hooked``, without which ``__setstate__`` wraps a second time and hooks fire twice.
    """
    full, profiler = torch.optim.Optimizer.profile_hook_step(function), torch.autograd.profiler
    by_daemon = "KINETO_USE_DAEMON" in os.environ  # profiles begin from outside then, and set no flag

    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if profiler._is_profiler_enabled or torch._C._autograd._profiler_enabled() or by_daemon or _has_hooks(self):
            return full(self, *args, **kwargs)
        out = function(self, *args, **kwargs)
        if _has_hooks(self):  # registered meanwhile, by a closure; ours knows that this is our step
            for hook in (*self._optimizer_step_post_hooks.values(), *optimizer._global_optimizer_post_hooks.values()):
                hook(self, (self, *args), kwargs)
        return out

    wrapped: Any = functools.wraps(function)(wrapper)
    wrapped.hooked = True
    return wrapped


def complete(opt: torch.optim.Optimizer) -> None:
    """Give ``opt`` the hooks' attributes, as ``Optimizer.__setstate__`` does, if its class never calls ``Optimizer.__init__``."""
    for kind in HOOKS:
        vars(opt).setdefault(f"_optimizer_{kind}_hooks", OrderedDict())


def has_own_contract(opt: torch.optim.Optimizer) -> bool:
    """Does its class, or a hook, have a say in what ``state_dict()`` gives and ``load_state_dict()`` takes?"""
    cls, base = plain_class(opt), torch.optim.Optimizer
    hooks = any(vars(opt).get(f"_optimizer_{kind}_hooks") for kind in HOOKS[2:])
    both = [(getattr(cls, name, None), getattr(base, name)) for name in ("state_dict", "load_state_dict")]
    return all(theirs is not None for theirs, _ in both) and (hooks or any(theirs is not plain for theirs, plain in both))


def steps_like_one(value: object) -> bool:
    """Is it an optimizer, whether its class says so or not? schedulefree's wrapper derives from nothing."""
    named = not isinstance(value, type) and all(hasattr(value, name) for name in ("param_groups", "state", "step"))
    return named and isinstance(value.param_groups, list)  # type: ignore[attr-defined]


def takes(opt_class: type) -> tuple[str, ...]:
    """The names of what its ``step`` takes, less ``self``."""
    return tuple(inspect.signature(opt_class.step).parameters)[1:]  # type: ignore[attr-defined]


def watch_steps(opt: torch.optim.Optimizer, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Have ``before`` and ``after`` called as hooks around each step of ``opt``, and ask ``comes_by_itself`` which one it is.

    A bound method that somebody took before the class was swapped, and the step of the plain class, run in the wrapper that
    ``Optimizer.__init__`` puts around a class's ``step``, which calls the hooks of the instance. Ours are put beside them, under
    a key that no handle has, so that ``_has_hooks`` need not count them. Both can be pickled: they are functions of a module."""
    complete(opt)
    opt._optimizer_step_pre_hooks[_OURS] = before
    opt._optimizer_step_post_hooks[_OURS] = after


def comes_by_itself(*opts: torch.optim.Optimizer) -> bool:
    """Asked by a hook: is the step that called it inside no other step of these, neither ours (``hooked``) nor one with hooks,
    as that of a class whose step calls its base's?"""
    ours, theirs = _codes()
    frame: Any = sys._getframe(1)
    found = 0  # wrappers of PyTorch; the innermost one is what called the hook
    while (frame := frame.f_back) is not None:
        code = frame.f_code
        is_theirs = code.co_filename == theirs.co_filename and code.co_name.startswith(_WRAPPER_NAMES)
        if (code is ours or is_theirs) and any(frame.f_locals.get("self") is opt for opt in opts):
            found += 1
            if code is ours or found > 1:
                return False
    return True


_WRAPPER_NAMES = ("wrapper", "torch_dynamo_resume_in_wrapper")
"""Of the function in ``profile_hook_step``, as it is and where Dynamo goes on behind a hook: the code is another one there."""


@functools.cache
def _codes() -> tuple[Any, Any]:
    """The code of the wrapper that ``hooked`` makes, and that of PyTorch's."""

    def step(self: torch.optim.Optimizer) -> None: ...

    ours: Any = hooked(step)
    theirs: Any = torch.optim.Optimizer.profile_hook_step(step)
    return ours.__code__, theirs.__code__


def callers(opt: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The other optimizers in whose methods this call is under way, innermost first."""
    frame: Any = sys._getframe(1)
    while (frame := frame.f_back) is not None:
        if "self" in frame.f_code.co_varnames:
            owner = frame.f_locals.get("self")
            if owner is not opt and steps_like_one(owner):
                yield owner


FORWARDING = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer", "OptimizersContainer"}
"""Classes of Accelerate, Lightning, Fabric and torchtitan: their objects hand everything on to the optimizers that they hold, and
keep no state of their own; what else they hold no checkpoint could."""


def forwards(opt: torch.optim.Optimizer) -> bool:
    """Is it such a wrapper?"""
    return any(cls.__name__ in FORWARDING for cls in type(opt).__mro__)


def sets_up_state(opt: torch.optim.Optimizer) -> bool:
    """Is the step that is about to run made for the state it leaves, and trains nothing? ``torch.distributed.checkpoint`` (and
    others after its example) makes a step of learning rate 0 with gradients of zeros where an optimizer has no state yet."""
    if opt.state or any("lr" in group and not _is_zero(group["lr"]) for group in opt.param_groups):
        return False
    gradients = [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(g.any()) if g.layout is torch.strided else True for g in gradients)


def _is_zero(lr: Any) -> bool:
    """Without asking a device, which would wait for it."""
    return bool(lr == 0) if not isinstance(lr, torch.Tensor) or lr.device.type == "cpu" else False


def rebind_scheduler_wrapper(opt: torch.optim.Optimizer) -> bool:
    """Take away the wrapper that an LR scheduler put on the *instance*, in front of the class's new step; True if there was one.
    ``LRScheduler.__init__`` stores a wrapper around the old function in ``opt.step``, which sets a flag that it reads, and warns
    if the step has not its mark. The class's new step has both (``marked_for_schedulers``). Raises SetupError if ``step`` was
    replaced on the instance by something else."""
    current = opt.__dict__.get("step")
    if current is None:
        return False
    if getattr(current, "__self__", None) is opt and getattr(current, "__func__", None) is plain_class(opt).step:
        del vars(opt)["step"]  # the class's own, as Accelerate leaves it there after a step
        return False
    if not getattr(current, "_wrapped_by_lr_sched", False):
        raise SetupError(
            f"opt.step of this {type(opt).__name__} was replaced by {current!r}; fxckpt cannot see the "
            "steps through it. Call compile_step before that wrapper is installed."
        )
    del vars(opt)["step"]
    return True


def marked_for_schedulers(step: Callable[..., Any]) -> Callable[..., Any]:
    """Keep schedulers from putting a wrapper of their own in front of ``step``, which Dynamo cannot trace: it has their mark, and
    sets ``_opt_called`` on its optimizer itself."""
    marked: Any = step
    marked._wrapped_by_lr_sched = True
    return marked


def count_skipped_attempts(scaler: Any, opt: torch.optim.Optimizer, skipped: Callable[[torch.optim.Optimizer], None]) -> None:
    """Call ``skipped(opt)`` each time ``scaler`` decides, on an inf, not to call ``opt.step()`` at all.
    ``GradScaler._maybe_opt_step`` is where that is decided. The class of this one instance is swapped for a subclass, as the
    optimizer's is; pickles and copies of it are of the plain class."""
    base: Any = type(scaler)
    scaler.__class__ = _watched_class(base)
    scaler.__dict__.setdefault("_fxckpt_watchers", []).append((weakref.ref(opt), skipped))


@functools.cache
def _watched_class(base: Any) -> type:
    """A scaler's class that tells its watchers."""

    def maybe(self: Any, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        told = [skipped for watched, skipped in self._fxckpt_watchers if watched() is optimizer]
        found = sum(v.item() for v in optimizer_state["found_inf_per_device"].values()) if told else 0
        out = base._maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs)
        for skipped in told if found else ():
            skipped(optimizer)
        return out

    return instance_subclass(base, {"_maybe_opt_step": maybe})


def mark_stepped(opt: torch.optim.Optimizer) -> None:
    """Steps were made in an earlier process: a scheduler that finds no ``_opt_called`` warns of a wrong order."""
    opt._opt_called = True  # type: ignore[attr-defined]


def default_implementation(param: torch.Tensor) -> str:
    """What an optimizer picks when neither ``foreach`` nor ``fused`` is given: see ``_default_to_fused_or_foreach``."""
    from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

    return "foreach" if param.device.type in _get_foreach_kernels_supported_devices() else "single"
