"""Attributes that refer to an optimizer without keeping it alive: it is the optimizer that keeps its run.

Of one optimizer. Several in one run keep each other, by the run, as long as it takes checkpoints: each of these has the state of
all, so whoever steps one of them needs the others, whether the script refers to them or not. That is a cycle by its nature, as is
a scheduler in ``extra=``, which the run has to ask and which holds its optimizer. So they go when the run is shut down, and
otherwise with the garbage collector. (One that is dropped could be revived in its ``__del__`` and be kept by the run from then
on. But where the collector takes it, the weak references to it, those of its scheduler among them, are gone before that.)
"""

from __future__ import annotations

import weakref
from typing import Any, overload

import torch


class HeldWeakly:
    """A descriptor for ``self.opt``. An optimizer holds its run, by ``opt.ckpt``. If the run's parts held the optimizer, its
    state and its run would stay until the garbage collector comes by, which for so many gigabytes may be too late."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_weak_{name}"

    @overload
    def __get__(self, holder: None, kind: type) -> HeldWeakly: ...
    @overload
    def __get__(self, holder: Any, kind: type) -> torch.optim.Optimizer: ...
    def __get__(self, holder: Any, kind: type) -> Any:
        """Raises ReferenceError if the optimizer is gone."""
        if holder is None:
            return self
        if (opt := holder.__dict__[self._name]()) is None:
            raise ReferenceError("this optimizer is gone, and with it its run")
        return opt

    def __set__(self, holder: Any, opt: torch.optim.Optimizer) -> None:
        holder.__dict__[self._name] = weakref.ref(opt)
