"""States of random generators read where they lie in memory: asked for theirs, Python's and numpy's make an object a word."""

from __future__ import annotations

import ctypes
import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class Glance(NamedTuple):
    """A state as it lay there. Two of one generator are equal if its states are."""

    kind: str
    """Whose it is: python, numpy or torch."""
    words: bytes
    """The words of a Mersenne twister, 32 bits each, and the place in them behind; what torch's get_state gives, of torch's."""
    gauss: float | None
    """The normal deviate that waits to be used."""


class Ends(NamedTuple):
    """A glance where nothing but both ends of its words differ from the one before."""

    kind: str
    words: tuple[bytes, bytes]
    gauss: float | None


Look = Callable[[], Glance | None]
"""Takes a glance; None where numpy's generator draws from other bits by now."""

_END = 64  # bytes at either end, in one of which the place is: the words change when all were used
_Words = ctypes.c_char * (625 * 4)


def since(before: Glance, now: Glance) -> Glance | Ends:
    """A glance without what it has in common with the one before: little to send, for few draws use up all words."""
    if now.words[_END:-_END] != before.words[_END:-_END]:
        return now
    return Ends(now.kind, (now.words[:_END], now.words[-_END:]), now.gauss)


def completed(before: Glance, now: Ends) -> Glance:
    """The glance that ``since`` was given."""
    head, tail = now.words
    return Glance(now.kind, head + before.words[_END:-_END] + tail, now.gauss)


def looking_at(generator: Any) -> Look | None:
    """What reads a generator's state quickly; None where its words are not found in its memory, or where it has none.

    Nothing is assumed of how they lie there: they are looked for, and what was found has to agree with the state as asked for.
    """
    if isinstance(generator, torch.Generator):
        return lambda: Glance("torch", generator.get_state().numpy().tobytes(), None)
    if type(generator) is random.Random:
        return _of_python(generator)
    return _of_numpy(generator) if type(generator) is np.random.RandomState else None


def _of_python(generator: random.Random) -> Look | None:
    """CPython has the place before the words."""
    *words, place = generator.getstate()[1]
    at = _memory(generator).find(np.array([place, *words], np.uint32).tobytes())
    if at < 0:
        return None
    words_there = _Words.from_address(id(generator) + at)

    def look() -> Glance:
        raw = words_there.raw
        return Glance("python", raw[4:] + raw[:4], generator.gauss_next)  # type: ignore[attr-defined]

    return look


def _of_numpy(generator: np.random.RandomState) -> Look | None:
    """The words are its bit generator's, which may be replaced; the deviate is its own."""
    bits, gauss = generator._bit_generator, _gauss_of_numpy()  # type: ignore[attr-defined]
    if not isinstance(bits, np.random.MT19937) or gauss is None:
        return None
    words = _Words.from_address(bits.ctypes.state_address)
    waits = ctypes.c_int.from_address(id(generator) + gauss[0])
    deviate = ctypes.c_double.from_address(id(generator) + gauss[1])

    def look() -> Glance | None:
        if generator._bit_generator is not bits:  # type: ignore[attr-defined]
            return None
        return Glance("numpy", words.raw, deviate.value if waits.value else None)

    state = generator.get_state(legacy=False)
    told = np.array([*state["state"]["key"], state["state"]["pos"]], np.uint32).tobytes()
    return look if look() == Glance("numpy", told, state["gauss"] if state["has_gauss"] else None) else None


@functools.cache
def _gauss_of_numpy() -> tuple[int, int] | None:
    """Where a ``RandomState`` has whether a deviate waits, and the deviate: found with one that does wait, and then does not."""
    probe = np.random.RandomState(0)
    probe.randn()
    at = _memory(probe).find(np.float64(probe.get_state(legacy=False)["gauss"]).tobytes())
    flag = at - ctypes.sizeof(ctypes.c_double)
    if flag < 0 or ctypes.c_int.from_address(id(probe) + flag).value != 1:
        return None
    probe.randn()
    return None if ctypes.c_int.from_address(id(probe) + flag).value else (flag, at)


def _memory(each: object) -> bytes:
    """What an object has beside what it refers to."""
    return ctypes.string_at(id(each), type(each).__basicsize__)
