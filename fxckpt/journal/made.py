"""A step that was made and is in no record yet: what it was made with, kept until the record of its iteration is complete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from fxckpt.compat.tensors import version_of
from fxckpt.journal.layout import gradient_key
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.guard import glimpse
from fxckpt.saving.inventory import storable
from fxckpt.saving.landing import Waiting
from fxckpt.store.typed_json import encode_state

Gradients = Sequence[torch.Tensor | None]

_FIRST = 3
"""Steps whose gradients are looked at from end to end. Of later ones it is a few elements of one layer in turn."""


class Made:
    """One step of one optimizer. ``index``: the optimizer's number; ``groups``, encoded, its settings as the step found them, and
    ``tensors`` those among them; ``threads`` of PyTorch; ``present``: the names of parameters that had gradients; ``strides`` of
    gradients that lie in another order of memory than their parameters, by name."""

    def __init__(self, index: int, stepper: Stepper, gradients: Gradients, copied: Collection[str] | None, turn: int):
        """``copied``: keys of gradients that are known to change behind their step, and are copied in memory, None: all are;
        ``turn``: how many records there were. Raises StateError for a setting that cannot be stored."""
        self.index: int = index
        self.tensors: dict[str, Any] = {}
        groups = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in stepper.opt.param_groups]
        self.groups: Any = encode_state(groups, self.tensors, f"journal/{index}")
        self.threads: int = torch.get_num_threads()
        arranged = stepper.executor.arranged
        both = [(m, grad.detach()) for m, grad in zip(arranged.members, gradients) if grad is not None]
        self.strides: dict[str, list[int]] = {m.name: list(g.stride()) for m, g in both if g.stride() != m.local.stride()}
        given = {m.name: grad for m, grad in both}
        self.present: frozenset[str] = frozenset(given)
        self._waiting: dict[int, Waiting] = {}
        self._seen: dict[str, tuple[torch.Tensor, int]] = {}  # with versions
        self._glimpses: dict[str, int | None] = {}
        self._whole = turn < _FIRST
        chosen = turn % max(len(arranged.numbers), 1)
        for i, (number, owned) in enumerate(zip(arranged.numbers, arranged.owned)):
            mine = {m.name: given[m.name] for m in owned if m.name in given}
            if copied is None or (copied and any(gradient_key(name) in copied for name in mine)):
                copies = [storable(grad, name).clone(memory_format=torch.contiguous_format) for name, grad in mine.items()]
                self._waiting[number] = Waiting(copies, copied=True)
                continue
            self._waiting[number] = Waiting(list(mine.values()))
            self._seen |= {name: (grad, version_of(grad)) for name, grad in mine.items()}
            if self._whole or i == chosen:
                self._glimpses |= {name: glimpse(grad, self._whole) for name, grad in mine.items()}

    def changed(self) -> set[str]:
        """The keys of gradients that are not as the step was given them."""
        seen = self._seen
        moved = {name for name, (grad, version) in seen.items() if version_of(grad) != version}
        moved |= {name for name, before in self._glimpses.items() if glimpse(seen[name][0], self._whole) != before}
        return {gradient_key(name) for name in moved}

    def waiting(self, number: int) -> Waiting:
        """The gradients of this layer, by the engine's number."""
        return self._waiting[number]
