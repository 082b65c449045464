"""What nobody has vouched for: JSON from a file, bounded, and whether values are what they should be.

Python's parser recurses, so a file of a million ``[`` would end in ``RecursionError`` somewhere up the caller's stack, and a
number of a million digits is turned down with a bare ``ValueError``. From ``parse_json`` all of it is ``Corrupt``.

Then come small tests of values, and tests made of tests. ``need`` and ``members`` turn a no into ``Malformed``; whoever reads a
file turns that into ``Corrupt`` with the file's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxckpt.errors import Corrupt

_DIMENSIONS = 64  # torch has no more, and the product of a million sizes would take for ever

MAX_BYTES = 128 << 20
"""No header or record is larger: the record of 100,000 parameters under AdamW has 83 MB. A larger one is not read into memory."""

MAX_VALUES, MAX_CONTAINERS = 12 << 20, 3 << 20
"""Values, and arrays and objects among them, in one file: Python takes some 70 bytes for each value and up to 300 for an object,
so that a file of the size above could cost it ten times as much. The record of 100,000 parameters has 5.1 and 1.4 million."""

_BLOCK = 1 << 20


@dataclass
class Structure:
    """What JSON is made of, outside strings: the deepest nesting, the arrays and objects, and all values at most."""

    depth: int = 0
    containers: int = 0
    values: int = 0

    @property
    def too_large(self) -> str | None:
        """Why nothing of ours has so much in it, if it has."""
        if self.containers > MAX_CONTAINERS or self.values > MAX_VALUES:
            return (f"has {self.values} values in {self.containers} arrays and objects, more than the {MAX_VALUES} in "
                    f"{MAX_CONTAINERS} that any has")  # fmt: skip
        return None


def structure_of(raw: bytes) -> Structure:
    """Found without recursion, and block by block: in little more memory than ``raw`` has, whatever is in it."""
    if b"\\" in raw:  # without escapes a quote begins or ends a string
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    found, quotes, level = Structure(), 0, 0
    for at in range(0, len(raw), _BLOCK):
        block = np.frombuffer(raw, np.uint8, min(_BLOCK, len(raw) - at), at)
        count = np.cumsum(block == ord('"'), dtype=np.int32) + quotes
        outside, quotes = count % 2 == 0, int(count[-1] % 2)
        opens = ((block == ord("[")) | (block == ord("{"))) & outside
        closes = ((block == ord("]")) | (block == ord("}"))) & outside
        levels = np.cumsum(opens.astype(np.int8) - closes.astype(np.int8), dtype=np.int32) + level
        found.depth, level = max(found.depth, int(levels.max())), int(levels[-1])
        opened = int(np.count_nonzero(opens))
        found.containers += opened
        found.values += opened + int(np.count_nonzero((block == ord(",")) & outside))
    return found


def size_of(raw: bytes) -> Structure:
    """The same of what this process wrote, but nothing of what cannot be too large: a value has a byte at least."""
    return structure_of(raw) if len(raw) > min(MAX_CONTAINERS, MAX_VALUES) else Structure()


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is given twice: which value counts would depend on the reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return found


def _constant(text: str) -> Any:
    """Refuse ``NaN`` and ``Infinity``."""
    raise ValueError(f"{text} is not JSON")


def parse_json(raw: bytes, path: str, *, depth: int, what: str, beside: tuple[int, int] = (0, 0)) -> Any:
    """The value of ``raw``; whatever is wrong with it is ``Corrupt`` with ``path`` and ``what`` it should have been, also that
    there is no memory for it: nothing that a store writes takes so much. ``beside``: bytes and values taken out of it before."""
    if (nbytes := len(raw) + beside[0]) > MAX_BYTES:
        raise Corrupt(path, f"{what} has {nbytes} bytes, more than the {MAX_BYTES} that any has")
    found = structure_of(raw)
    found.values += beside[1]
    if found.depth > depth:
        raise Corrupt(path, f"{what} is nested {found.depth} levels deep, more than the {depth} that any is")
    if found.too_large:
        raise Corrupt(path, f"{what} {found.too_large}")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are kinds of it
        raise Corrupt(path, f"{what} is not valid JSON: {error}") from error
    except MemoryError as error:
        raise Corrupt(path, f"{what} of {len(raw)} bytes does not fit into memory") from error


Check = Callable[[Any], bool]


class Malformed(Exception):
    """Something has the wrong type or is out of range."""


def need(holds: bool, what: str | Callable[[], str]) -> None:
    """Raises ``Malformed`` unless ``holds``. ``what``: the text, or, where it is asked thousands of times, what makes it."""
    if not holds:
        raise Malformed(what if isinstance(what, str) else what())


def members(value: Any, checks: Mapping[str, Check], what: str) -> dict[str, Any]:
    """``value`` if it is an object of exactly these members, each as its test wants it. Raises ``Malformed``."""
    need(type(value) is dict, f"{what} is not an object")
    need(value.keys() == checks.keys(), lambda: f"{what} has members {sorted(value)}, not {sorted(checks)}")
    for name, check in checks.items():
        if not check(value[name]):  # the text of a large value takes its time
            raise Malformed(f"{what}: {name} is {str(value[name])[:80]}")
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


def is_counts(value: Any) -> bool:
    """A list of what ``is_count`` is true of. (A record has thousands of short ones, each of which is looked at.)"""
    if type(value) is not list:
        return False
    for each in value:  # noqa: SIM110  a generator takes as long again
        if type(each) is not int or not 0 <= each < 1 << 63:
            return False
    return True


def is_shape(value: Any) -> bool:
    """The sizes of a tensor."""
    return is_counts(value) and len(value) <= _DIMENSIONS
