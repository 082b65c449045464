"""The optimizer that ``compile_step`` gives back: the same object, of a subclass whose step is a run's.

Only the class of the instance is swapped (as FSDP2's ``fully_shard`` does with modules), so ``isinstance(opt,
torch.optim.AdamW)`` holds and whoever keeps a reference sees the new step.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, cast

import torch

from fxckpt.compat.dynamo import untraced
from fxckpt.compat.instance_subclass import instance_subclass
from fxckpt.compat.optimizers import hooked
from fxckpt.handle import Handle


class Checkpointed(torch.optim.Optimizer, metaclass=ABCMeta):
    """An optimizer that belongs to a run. Every one that ``compile_step`` took is an instance.

    For annotations, ``def train(opt: fxckpt.Checkpointed)``, and for type checkers, which know after
    ``isinstance(opt, fxckpt.Checkpointed)`` that ``opt`` is both what it was and one with ``.ckpt``.
    """

    _fxckpt_handle: Handle

    @property
    def ckpt(self) -> Handle:
        """The run's handle; all optimizers of one ``compile_step`` share it."""
        return self._fxckpt_handle


def attach(opt: torch.optim.Optimizer, handle: Handle) -> None:
    """Make ``opt`` step through the run of ``handle`` from now on."""
    plain: type = type(opt)
    opt.__class__ = stepped_class(plain)
    cast(Checkpointed, opt)._fxckpt_handle = handle


@functools.cache
def stepped_class(base: type) -> type:
    """The subclass of ``base`` whose step is ours. Pickles and copies are of ``base``: a run belongs to one process and one
    optimizer."""

    def step(self: Checkpointed, closure: Callable[[], Any] | None = None) -> Any:
        return self._fxckpt_handle._run.stepping.step(self, closure)

    functools.update_wrapper(step, base.step, assigned=("__doc__",), updated=())  # type: ignore[attr-defined]
    ours = {"step": untraced(hooked(step)), "load_state_dict": _load_state_dict, "add_param_group": _add_param_group}
    made = instance_subclass(base, {**ours, "ckpt": Checkpointed.ckpt})
    Checkpointed.register(made)
    return made


def _load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
    """Load, once no copy reads the tensors that it replaces."""
    self._fxckpt_handle._run.closing.drop("load_state_dict() replaced its tensors")
    self._fxckpt_base.load_state_dict(self, state_dict)


def _add_param_group(self: Any, param_group: dict[str, Any]) -> None:
    """Add a group; the checkpoint of a step that has not closed would have the old layers and the new groups."""
    if "_fxckpt_handle" in self.__dict__:
        self._fxckpt_handle._run.closing.drop("add_param_group() changed the optimizer before the step closed")
    self._fxckpt_base.add_param_group(self, param_group)
