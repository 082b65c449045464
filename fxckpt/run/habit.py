"""What a loop was seen to do between its backward and ``opt.step()``: only what never touches a gradient may be armed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fxckpt.optim.bindings import BoundParam
from fxckpt.saving.guard import glimpse

NEEDED = 2
"""Steps in a row in which a layer's gradients reached ``opt.step()`` as the backward left them, before it is armed."""


class Habit:
    """Counts, for each layer of one binding, the steps in a row whose gradients nobody touched. ``why``: what was in the way at
    the last one, by layer."""

    def __init__(self) -> None:
        self.clean: list[int] = []
        self.why: list[str] = []
        self._for_good: dict[int, str] = {}  # layers whose gradients were seen to change though no version moved
        self._settings: object = None  # of the groups, when the backward began
        self._noted: dict[int, tuple[int, int]] = {}  # by a parameter's index: address and version of the gradient it was given
        self._seen: dict[int, int | None] = {}  # and a checksum of some of its elements

    def bind(self, layers: int) -> None:
        """The layers are others now: nothing is known of them."""
        self.clean, self.why, self._for_good = [0] * layers, [""] * layers, {}

    def backward_begins(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The first compiled region's backward begins."""
        self._settings, self._noted, self._seen = settings(groups), {}, {}

    def note(self, member: BoundParam, layer: int, gradient: torch.Tensor) -> None:
        """An op came by: this is the gradient, and it is final. Before its layer may be armed some elements are looked at, too:
        what a GradScaler does in place moves no version."""
        self._noted[member.index] = gradient.data_ptr(), gradient._version
        if self.clean[layer] == NEEDED - 1 and layer not in self._for_good:
            self._seen[member.index] = glimpse(gradient)

    def settings_changed(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Was a value of a group changed since the backward began?"""
        return self._settings is not None and settings(groups) != self._settings

    def judge(self, layer: int, owned: Iterable[BoundParam], in_the_way: str | None) -> None:
        """At ``opt.step()``: did all gradients of this layer come as they were? ``in_the_way``: what else speaks against it."""
        trained = [m for m in owned if m.param.grad is not None]
        why = in_the_way or next(filter(None, map(self._touched, trained)), "" if trained else "it got no gradient")
        if not why and any(self._seen.get(m.index, found) != found for m in trained if (found := self._look(m)) is not None):
            self._for_good[layer] = f"the gradient of {trained[0].name!r} is changed between backward and opt.step()"
        why = why or self._for_good.get(layer, "")
        self.clean[layer], self.why[layer] = (0 if why else self.clean[layer] + 1), why

    def all_in_the_way(self, why: str) -> None:
        """No layer can be armed."""
        self.clean, self.why = [0] * len(self.clean), [why] * len(self.clean)

    def step_ended(self) -> None:
        """What was noted is of a step that is over."""
        self._settings, self._noted, self._seen = None, {}, {}

    def _look(self, member: BoundParam) -> int | None:
        """A checksum of some elements of its gradient, if the op was looked at, too."""
        gradient = member.param.grad
        return glimpse(gradient) if member.index in self._seen and gradient is not None else None

    def _touched(self, member: BoundParam) -> str:
        """What happened to the gradient of a parameter since the op came by; nothing, most often."""
        noted, gradient = self._noted.get(member.index), member.param.grad
        if noted is None:
            return f"no op of a compiled backward brings the gradient of {member.name!r}"
        if gradient is None or gradient.layout is not torch.strided or gradient.data_ptr() != noted[0]:
            return f"the gradient of {member.name!r} that reaches opt.step() is another one than its backward made"
        if gradient._version != noted[1]:
            return f"the gradient of {member.name!r} is changed between backward and opt.step()"
        return ""


def settings(groups: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The values of all groups but their parameters, to be compared; tensors by identity and version."""
    return [[_comparable(value) for key, value in group.items() if key != "params"] for group in groups]


def _comparable(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, (tuple, list)):
        return tuple(map(_comparable, value))
    return value if value is None or isinstance(value, (bool, int, float, str, complex)) else id(value)
