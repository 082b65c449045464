"""What is alive in this process, and what an object leads to: the garbage collector is the only one that knows."""

from __future__ import annotations

import gc
import types
import weakref
from collections import deque
from collections.abc import Iterable
from itertools import compress
from typing import Any

import torch

_MOST = 20_000  # objects behind an extra: a replay buffer has millions
_ENDS = (torch.Tensor, torch.optim.Optimizer, type, types.ModuleType, types.FrameType, types.CodeType, str, bytes, int, float)


def alive(*kinds: type) -> list[Any]:
    """Every object of these classes. It looks at all that the collector knows, which takes tens of milliseconds."""
    objects = gc.get_objects()
    found = set(map(type, objects))
    # By type: isinstance asks an object for its __class__, which a proxy may answer by importing what it stands for.
    wanted = {kind for kind in found if issubclass(kind, kinds)}
    return list(compress(objects, map(wanted.__contains__, map(type, objects))))


def reached_from(roots: Iterable[object], ends: Iterable[object]) -> set[int]:
    """The ids of what these objects hold, by whatever way, nearest first. Not behind ``ends``, nor behind optimizers and tensors,
    whose hooks hold anything, nor behind the variables of a function's module."""
    seen = set(map(id, ends))
    coming = deque(roots)
    while coming and len(seen) < _MOST:
        each = coming.popleft()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if not issubclass(type(each), _ENDS):
            coming.extend(_held_by(each))
    return seen


def _held_by(value: Any) -> Iterable[object]:
    """What one object refers to."""
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, types.FunctionType):
        return [*(value.__closure__ or ()), *(value.__defaults__ or ())]
    return gc.get_referents(value)
