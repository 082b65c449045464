"""Private parts of Accelerate's optimizer wrapper: what ``prepare`` captured of the optimizer, and that its steps reach ours.

``AcceleratedOptimizer`` takes the bound ``step`` of the optimizer where it has a ``GradScaler``, and puts that on the instance at
each of its steps: a class that was swapped later would never be asked.
"""

from __future__ import annotations

from typing import Any

from fxckpt.errors import SetupError

_CAPTURED = ("_optimizer_original_step_method", "_optimizer_patched_step_method")


def is_prepared(value: object) -> bool:
    """Is it what ``Accelerator.prepare`` makes of an optimizer? Its subclasses leave the steps to DeepSpeed or Megatron."""
    cls = getattr(type(value), "_fxckpt_base", type(value))
    return (cls.__module__, cls.__name__) == ("accelerate.optimizer", "AcceleratedOptimizer")


def steps_elsewhere(value: object) -> bool:
    """Is it a wrapper of Accelerate's whose engine makes the steps itself?"""
    names = [(cls.__module__, cls.__name__) for cls in type(value).__mro__]
    return ("accelerate.optimizer", "AcceleratedOptimizer") in names and not is_prepared(value)


def scaler_of(value: Any) -> Any:
    """The ``GradScaler`` that a prepared optimizer steps with, if any."""
    return getattr(value, "scaler", None) if is_prepared(value) else None


def rebind(wrapper: Any) -> None:
    """Let the steps of a prepared optimizer reach the new class of the one inside."""
    if getattr(wrapper, "scaler", None) is not None:
        if not all(hasattr(wrapper, name) for name in _CAPTURED):
            raise SetupError("this version of Accelerate keeps an optimizer's step elsewhere: call compile_step before prepare()")
        from accelerate.optimizer import patch_optimizer_step

        step = wrapper.optimizer.step
        wrapper._optimizer_original_step_method = step
        wrapper._optimizer_patched_step_method = patch_optimizer_step(wrapper, step)
