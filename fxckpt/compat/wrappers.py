"""The optimizers that Accelerate, Fabric and Lightning wrap: what is inside, whichever of them it was, how one joins a run."""

from __future__ import annotations

import functools
from typing import Any

from fxckpt.compat import accelerate, fabric
from fxckpt.compat.instance_subclass import instance_subclass


def is_wrapper(value: object) -> bool:
    """Is it a wrapper whose steps are made by the optimizer inside?"""
    return accelerate.is_prepared(value) or fabric.is_wrapped(value)


def unwrapped(value: Any) -> Any:
    """The optimizer that steps."""
    return value.optimizer if is_wrapper(value) else value


def scaler_of(value: Any) -> Any:
    """The ``GradScaler`` that a wrapped optimizer steps with, if any."""
    found = accelerate.scaler_of(value)
    return fabric.scaler_of(value) if found is None else found


def join(wrapper: Any, ckpt: property, known: Any) -> None:
    """Let its steps reach the new class of the optimizer inside, and give it ``.ckpt``. ``known``: the abstract class that its
    instances belong to from now on."""
    if accelerate.is_prepared(wrapper):
        accelerate.rebind(wrapper)
    kind: Any = type(wrapper)
    wrapper.__class__ = _joined_class(kind, ckpt, known)


@functools.cache
def _joined_class(base: Any, ckpt: property, known: Any) -> Any:
    made = instance_subclass(base, {"ckpt": ckpt})
    known.register(made)
    return made
