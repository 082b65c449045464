"""Restored tensors whose owners are not known yet: without a model, only the compiler shows buffers and frozen parameters."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch

from fxckpt.graph.model.book import traces
from fxckpt.saving.inventory import storable, take


class LateOwners:
    """Holds tensors by name and hands them over when a graph shows who owns them: inside the backend's call, before the
    graph runs for the first time. Whoever wants that keeps this object."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]):
        self._tensors, self._optimizers = dict(tensors), optimizers
        traces.listeners.append(weakref.WeakMethod(self._hand_over))
        self._hand_over()

    def _hand_over(self, trace: object = None) -> None:
        """Copy what now has an owner of that name, shape and type."""
        if not self._tensors:
            return
        seen = take(None, self._optimizers, traces)
        with torch.no_grad():
            for name, tensor in {**seen.buffers, **seen.frozen}.items():
                held, live = self._tensors.get(name), storable(tensor)
                if held is not None and (held.shape, held.dtype) == (live.shape, live.dtype):
                    live.copy_(self._tensors.pop(name))
