"""Is a value that nobody has vouched for what it should be? Small tests, and tests made of tests.

``need`` and ``members`` turn a no into ``Malformed``; whoever reads a file turns that into ``Corrupt`` with the file's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]

_DIMENSIONS = 64  # torch has no more, and the product of a million sizes would take for ever


class Malformed(Exception):
    """Something has the wrong type or is out of range."""


def need(holds: bool, what: str) -> None:
    """Raises ``Malformed`` unless ``holds``."""
    if not holds:
        raise Malformed(what)


def members(value: Any, checks: Mapping[str, Check], what: str) -> dict[str, Any]:
    """``value`` if it is an object of exactly these members, each as its test wants it. Raises ``Malformed``."""
    need(type(value) is dict, f"{what} is not an object")
    need(value.keys() == checks.keys(), f"{what} has members {sorted(value)}, not {sorted(checks)}")
    for name, check in checks.items():
        need(check(value[name]), f"{what}: {name} is {str(value[name])[:80]}")
    return value


def optional(check: Check) -> Check:
    """None, or what ``check`` wants."""
    return lambda value: value is None or check(value)


def list_of(check: Check) -> Check:
    """A list of what ``check`` wants."""
    return lambda value: type(value) is list and all(map(check, value))


def map_of(check: Check) -> Check:
    """A dict, ordered or not, from text to what ``check`` wants."""
    return lambda value: isinstance(value, dict) and all(type(key) is str and check(item) for key, item in value.items())


def has(checks: Mapping[str, Check], perhaps: Mapping[str, Check] | None = None) -> Check:
    """A dict with these keys, and perhaps those; further ones are nobody's business."""
    every = {**checks, **(perhaps or {})}
    return lambda value: (type(value) is dict and checks.keys() <= value.keys()
                          and all(check(value[key]) for key, check in every.items() if key in value))  # fmt: skip


def is_anything(value: Any) -> bool:
    """For what is looked at later, or by nobody."""
    return True


def is_str(value: Any) -> bool:
    """A str, and no subclass."""
    return type(value) is str


def is_text(value: Any) -> bool:
    """A str that JSON, file systems and safetensors can hold: without surrogates, two of which JSON joins into one character."""
    if type(value) is not str:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_count(value: Any) -> bool:
    """A whole number that can be a size or a position: an int, not a bool, and not negative or beyond 63 bits."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> bool:
    """A number of a clock: a count, or a finite float."""
    return is_count(value) or (type(value) is float and math.isfinite(value))


is_counts: Check = list_of(is_count)


def is_shape(value: Any) -> bool:
    """The sizes of a tensor."""
    return is_counts(value) and len(value) <= _DIMENSIONS
