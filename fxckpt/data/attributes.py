"""What the objects behind a loader keep in plain attributes (an epoch's number, an order, weights), taken and put back."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fxckpt.compat.loaders import is_stateful

_SCALARS = (bool, int, float, str)
_LOOKS = 3  # states within a pass for which all arrays are looked at; from then on those that were seen to change
_ABSENT = object()

Objects = Callable[[], Mapping[str, Any]]
Marks = dict[tuple[str, str], Any]
"""What tells that an attribute changed: (attribute, a value, a version or a checksum) → it."""


class Attributes:
    """Those of some objects that changed since the loader was given: numbers, text, and what has numbers as elements.

    There may be millions of elements. All are looked at between two passes; within a pass only for the first few states. Then
    what was seen to change within a pass is taken always, and tensors are known to change by their version.
    """

    def __init__(self, objects: Objects, every_number: bool = False, largest: int | None = None):
        """``objects``: by name, asked for each time. ``every_number``: numbers and text in any case. ``largest``: arrays and
        lists of more bytes are left out."""
        self._objects, self._every, self._largest = objects, every_number, largest
        self._given = {name: self._marks(each, True) for name, each in objects().items()}
        self._start = self._given
        self._contents: dict[str, dict[str, Any]] = {}  # what could move within the pass, as it was when that began
        self._moving: set[tuple[str, str]] = set()  # (object, attribute) that changes within a pass
        self._looks = _LOOKS
        self._latest: list[tuple[Any, Marks]] = []  # the objects of the last state, with what told of a change in them

    def state(self, whole: bool) -> dict[str, Any]:
        """By object, its own state if it has one, else attributes. ``whole``: a pass begins, or none runs."""
        objects = self._objects()
        now = {name: self._marks(each, whole or self._looks > 0) for name, each in objects.items()}
        if whole:
            self._start = now
            self._contents = {name: self._copies(each, now[name]) for name, each in objects.items()}
        else:
            self._looks = max(self._looks - 1, 0)
            self._moving |= {(name, key) for name in now for key in _changed(self._start.get(name, {}), now[name])}
        self._latest = [(each, now[name]) for name, each in objects.items()]
        return {name: self._state(name, each, now[name]) for name, each in objects.items()}

    def stands_still(self) -> bool:
        """Would a state within the pass be the last one again? Asked for each batch: it sees what ``state`` sees once it looks
        at no array any more, without asking which objects there are; before that, and where something moves, it says no."""
        return not (self._looks or self._moving) and all(self._marks(each, False) == last for each, last in self._latest)

    def begun(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """The state that was taken when the pass began, with what turned out to move since: elsewhere it may be as it is now."""
        found = {name: {**each} for name, each in start.items()}
        for name, key in self._moving:
            if "attributes" in found.get(name, {}) and key in self._contents.get(name, {}):
                found[name]["attributes"] = {**found[name]["attributes"], key: self._contents[name][key]}
        return found

    def _copies(self, owner: Any, marks: Marks) -> dict[str, Any]:
        """Of what has marks."""
        names = {name for name, kind in marks if kind != "version"}
        return {name: _copied(value) for name, value in getattr(owner, "__dict__", {}).items() if name in names}

    def _state(self, name: str, owner: Any, now: Marks) -> dict[str, Any]:
        if is_stateful(owner):
            return {"state_dict": copy.deepcopy(owner.state_dict())}
        values, given = vars(owner) if hasattr(owner, "__dict__") else {}, self._given.get(name, {})
        taken = _changed(given, {**self._start.get(name, {}), **now}) | {key for who, key in self._moving if who == name}
        if self._every:
            taken |= {key for key, value in values.items() if isinstance(value, _SCALARS)}
        return {"attributes": {key: _copied(values[key]) for key in values if key in taken}}

    def numbers(self) -> dict[str, Any]:
        """All numbers, as they are now."""
        kept = {name: vars(each).items() if hasattr(each, "__dict__") else () for name, each in self._objects().items()}
        return {name: {"attributes": {key: v for key, v in found if isinstance(v, (int, float))}} for name, found in kept.items()}

    def load(self, saved: Mapping[str, Any], keep_epoch: bool = False, stateful: bool = True) -> None:
        """Put it back. ``keep_epoch``: the loop has called ``set_epoch`` for the pass to come, or will; ``stateful``: also what
        objects have as their own state, which would begin another pass."""
        for name, each in self._objects().items():
            state = saved.get(name, {})
            if "state_dict" in state and stateful:
                each.load_state_dict(state["state_dict"])
            for attribute, value in state.get("attributes", {}).items():
                if not (keep_epoch and attribute == "epoch" and hasattr(each, "set_epoch")):
                    _put(each, attribute, value)

    def _marks(self, owner: Any, deep: bool) -> Marks:
        """``deep``: with checksums of what has many elements."""
        found: Marks = {}
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, _SCALARS):
                found[name, "value"] = value
            elif isinstance(value, torch.Tensor) and value.is_shared():
                continue  # by processes: it is the state of none of them
            elif isinstance(value, torch.Tensor):
                found[name, "version"] = (id(value), value._version)
            if deep and (check := self._checksum(value)) is not None:
                found[name, "checksum"] = check
        return found

    def _checksum(self, value: Any) -> int | None:
        """None for what is no list of numbers or text, array or tensor in memory, or is too large."""
        limit = float("inf") if self._largest is None else self._largest
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu" or value.layout is not torch.strided or value.nbytes > limit:
                return None
            return zlib.crc32(value.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.nbytes <= limit:
            return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)
        if isinstance(value, list) and value and type(value[0]) in (int, float, str) and 8 * len(value) <= limit:
            return zlib.crc32(repr(value).encode())
        return None


def _changed(before: Marks, now: Marks) -> set[str]:
    """The attributes that a mark says are others."""
    return {key[0] for key, mark in now.items() if before.get(key, _ABSENT) != mark}


def _put(owner: Any, attribute: str, value: Any) -> None:
    """Set an attribute, and a list, array or tensor that others may share in place."""
    mine = vars(owner).get(attribute)
    if isinstance(mine, list):
        mine[:] = value.tolist() if isinstance(value, np.ndarray) else value
    elif isinstance(mine, torch.Tensor) and mine.shape == value.shape:
        mine.copy_(value)
    elif isinstance(mine, np.ndarray) and mine.shape == value.shape:
        mine[...] = value
    else:
        setattr(owner, attribute, value)


def _copied(value: Any) -> Any:
    """A list of numbers as an array, which is stored quickly; anything else as a copy."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list) and all(type(each) is int for each in value):
        return np.array(value, np.int64)
    return value if isinstance(value, _SCALARS) else value.copy()
