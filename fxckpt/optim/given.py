"""The settings that a script gave an optimizer, as plain values: by them a later life of it knows what was changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxckpt.compat.optimizers import SCHEDULER_NOTES

Given = list[dict[str, Any]]
"""Of each group, by name."""

_PLAIN = (bool, int, float, str, type(None))


def given_to(opt: torch.optim.Optimizer) -> Given:
    """What stands in its groups now, as far as it is plain: numbers, flags, text, and tuples of them."""
    return [
        {key: value for key, found in group.items() if key not in SCHEDULER_NOTES and (value := _plain(found)) is not _NOT}
        for group in opt.param_groups
    ]


def what_changed(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """``lr=0.5 (it was 0.1)`` for each setting that both lives gave, and gave differently; once where several groups agree."""
    found = [
        f"{key}={now_in[key]!r} (it was {value!r})"
        for old, now_in in zip(before, now)
        for key, value in old.items()
        if key in now_in and _plain(value) is not _NOT and now_in[key] != value and not _both_nan(now_in[key], value)
    ]
    return list(dict.fromkeys(found))


_NOT = object()


def _plain(value: Any) -> Any:
    """A plain value, or that of a tensor on the host which is one number, or ``_NOT``."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and value.device.type == "cpu" and value.layout is torch.strided else _NOT
    if type(value) in _PLAIN:
        return value
    if type(value) is tuple and all(type(each) in _PLAIN for each in value):
        return value
    return _NOT


def _both_nan(a: Any, b: Any) -> bool:
    return a != a and b != b
