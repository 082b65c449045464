"""JSON from a file nobody has vouched for: bounded in size and depth, no duplicate keys, no NaN.

Python's parser recurses, so a file of a million ``[`` would end in ``RecursionError`` somewhere up the caller's stack,
and a number of a million digits is turned down with a bare ``ValueError``. Here all of it is one error: ``Corrupt``.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from fxckpt.errors import Corrupt

MAX_BYTES = 1 << 30
"""No header or record is larger; a larger one is not read into memory at all."""

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def depth_of(raw: bytes) -> int:
    """The deepest nesting of brackets outside strings, found without recursion and without building anything."""
    # Without escapes every second piece between quotes is a string. (A pattern that matches whole strings would take
    # a hundred times a long string's memory to be able to go back.)
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(bare.split(b'"')[::2]).translate(None, _NOT_BRACKETS)
    return max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is given twice: which value counts would depend on the reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return found


def _constant(text: str) -> Any:
    """Refuse ``NaN`` and ``Infinity``."""
    raise ValueError(f"{text} is not JSON")


def parse_json(raw: bytes, path: str, *, depth: int, what: str) -> Any:
    """The value of ``raw``; whatever is wrong with it is ``Corrupt`` with ``path`` and ``what`` it should have been."""
    if len(raw) > MAX_BYTES:
        raise Corrupt(path, f"{what} has {len(raw)} bytes, more than the {MAX_BYTES} that any has")
    found = depth_of(raw)
    if found > depth:
        raise Corrupt(path, f"{what} is nested {found} levels deep, more than the {depth} that any is")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are kinds of it
        raise Corrupt(path, f"{what} is not valid JSON: {error}") from error
