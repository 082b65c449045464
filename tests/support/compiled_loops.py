"""What a marked script begins with to run compiled: what ``compile_step`` is given is, and its code is interpreted.

``UPDATES`` says where the updates run, and ``FXCKPT_DISABLE=1`` that PyTorch makes them. At the end it is told how many layers
were updated inside backwards, and why the others were not in the last step.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from interpreted import interpret
from torch import nn

import fxckpt
from fxckpt.run.in_backward import InBackward
from fxckpt.run.run import live_runs


def begin() -> None:
    """Compile from here on what the script gives to ``compile_step``, and nothing else."""
    from torch._inductor import compile_fx, config

    compile_fx.compile_fx = functools.partial(compile_fx.compile_fx, inner_compile=interpret)
    config.force_disable_caches = True
    config.fallback_random = True  # PyTorch's own random numbers
    compile_step, compile_ = fxckpt.compile_step, torch.compile

    def compiled(optimizer: Any, *args: Any, model: Any, **options: Any) -> Any:
        for each in _modules(model):
            each.forward = compile_(_calling(each.forward), backend=fxckpt.backend)
        return compile_step(optimizer, *args, model=model, **{**options, "updates": os.environ["UPDATES"]})

    fxckpt.compile_step = compiled  # type: ignore[assignment]
    torch.compile = lambda module, **_: module  # type: ignore[assignment]  # where a script compiles itself
    atexit.register(_tell, _counted())


def _calling(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A frame that Dynamo looks at: that of ``nn.Sequential`` it passes by."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


def _modules(model: Any) -> list[nn.Module]:
    """Those that are called: in place of one without a forward, those in it."""
    given = [model] if isinstance(model, nn.Module) else list(model.values() if isinstance(model, dict) else model)
    found = [[each] if type(each).forward is not nn.Module.forward else _modules(list(each.children())) for each in given]
    return [each for part in found for each in part]


def _counted() -> list[str]:
    """Gets the layers that are updated inside backwards."""
    found, update = [], InBackward._update

    def counting(self: InBackward, place: int) -> None:
        update(self, place)
        found.append(self._names()[place])

    InBackward._update = counting  # type: ignore[method-assign]
    return found


def _tell(updated: list[str]) -> None:
    print(f"ARMED {len(updated)}")
    for run in live_runs:
        for why in sorted(set((run.steppers[0].executor.standing or {"": ""}).values())):
            print(f"WHY {why}")
