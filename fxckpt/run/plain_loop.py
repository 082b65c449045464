"""Watches a loop without boundaries: is what lies between a step and the next backward what a resumed run would repeat?

From its start (``compile_step``, ``load``) to the first gradient a process does what a resumed one does in place of what lies
between an ``opt.step()`` and the next gradient. So what changes or is drawn there later, and not in this first turn, is done
behind ``opt.step()``: a resumed run would not do it again, and a checkpoint of the step's end misses it.
"""

from __future__ import annotations

import dataclasses
import logging
import types
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fxckpt.compat.draws import Position, drawn, positions
from fxckpt.compat.tensors import version_of
from fxckpt.errors import Cancelled
from fxckpt.saving.guard import WAY_OUT, Changed

log: logging.Logger = logging.getLogger("fxckpt")

_LONGEST = 4096  # elements of a list that are looked at
_LARGEST = 1 << 16  # bytes of an array that are looked at

Marks = dict[tuple[str, str], object]
"""By kind (``"buffer"``, ``"parameter"``, ``"extra"``) and name of what may change outside ``opt.step()``, something that is equal
as long as it has not."""


class Unlike(Changed, Cancelled):
    """Random numbers were drawn after the step that ordinary turns do not draw: its checkpoint is dropped, which is no failure."""


def mark(value: Any, depth: int = 8) -> object:
    """Something that differs once ``value`` was changed. A large array is looked at only in part."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() if value.layout is torch.strided else id(value), version_of(value), tuple(value.shape)
    if isinstance(value, np.ndarray):
        return value.shape, zlib.crc32(value.tobytes()) if value.nbytes <= _LARGEST and value.dtype != object else id(value)
    if depth == 0:
        return id(value)
    if isinstance(value, Mapping):
        return tuple((repr(key), mark(each, depth - 1)) for key, each in list(value.items())[:_LONGEST])
    if isinstance(value, (list, tuple, deque, set, frozenset)):
        return len(value), tuple(mark(each, depth - 1) for each in list(value)[-_LONGEST:])
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        return mark(vars(value), depth - 1)
    return id(value)


class PlainLoop:
    """Holds the marks of the start and of the last step's end. ``look`` takes those of now; True: of parameters, too.

    ``changed``: what changes before a backward in every turn, the first included; None: not known. ``watching``: the first turn
    is not over.
    """

    def __init__(self, look: Callable[[bool], Marks]):
        self._look = look
        self.changed: set[tuple[str, str]] | None = None
        self.watching: bool = False
        self._known: set[tuple[str, str]] = set()  # what there was at the start, and at the first gradient still
        self._marks: Marks = {}
        self._positions: dict[str, Position] = {}
        self._behind: set[tuple[str, str]] | None = None  # extras that some turn changed behind its step
        self._first_drawn: dict[str, int] = {}
        self._drawn: dict[str, int] = {}
        self._alike = self._odd = 0  # turns that drew as the first one did; others since
        self._said = False

    def start(self) -> None:
        """The process is where a resumed one would begin."""
        self.changed, self.watching = None, True
        self._marks, self._positions = self._look(True), positions()

    def first_gradient(self, plain: bool) -> None:
        """The first turn has come to its backward; ``plain``: in a loop without boundaries."""
        self.watching = False
        if plain:
            now = self._look(True)
            self._known = now.keys() & self._marks.keys()
            self.changed = {key for key in self._known if now[key] != self._marks[key]}
            self._first_drawn = drawn(self._positions, positions())

    def step_ended(self) -> None:
        """What is taken at the end of ``opt.step()`` is taken now."""
        self._marks, self._positions = self._look(False), positions()

    def changes_in_forward(self, kind: str) -> frozenset[str]:
        """The names of this kind that every turn changes before its backward."""
        return frozenset(name for found, name in self.changed or () if found == kind)

    def moved(self) -> bool:
        """Has anything been changed or drawn since the step's end?"""
        kept = {key: each for key, each in self._look(False).items() if self._is_early(key)}
        return any(self._marks.get(key) != each for key, each in kept.items()) or positions() != self._positions

    def check(self, step: int) -> None:
        """The next backward begins. Raises Changed, with all names, if the step's checkpoint misses what was done behind it."""
        if self.changed is None:
            return
        changed = self._changed_since()
        self._behind = (self._behind or set()) | {key for key in changed if not self._is_early(key)}
        if names := [name for kind, name in changed if kind == "buffer" and (kind, name) in self._known - self.changed]:
            what = f"{', '.join(map(repr, names[:8]))}{' ...' if names[8:] else ''} changed after opt.step()"
            raise Changed(f"{what}, so the checkpoint of step {step} would mix two iterations; it is discarded. {WAY_OUT}.")
        self._check_draws(step)

    def unfinished(self) -> bool:
        """The process ends: was the last turn left before all that turns change behind their step was changed?"""
        if self._behind is None:
            return any(kind == "extra" and not self._is_early((kind, name)) for kind, name in self._marks)
        return not self._behind <= self._changed_since()

    def _changed_since(self) -> set[tuple[str, str]]:
        """What is not as it was at the step's end."""
        return {key for key, each in self._look(False).items() if key in self._marks and each != self._marks[key]}

    def _is_early(self, key: tuple[str, str]) -> bool:
        """Is it taken at the step's end?"""
        return key[0] != "extra" or key in (self.changed or ())

    def _check_draws(self, step: int) -> None:
        """Were as many random numbers drawn as in the first turn? Where that differs once in a while, something else was drawn
        behind the step (an evaluation's loader draws a seed): that checkpoint is dropped. Where it always differs from the
        first turn, the first turn does what the others do not (a loader's iterator is made)."""
        before, self._drawn = self._drawn, drawn(self._positions, positions())
        common = self._drawn.keys() & self._first_drawn.keys()
        if all(self._drawn[name] == self._first_drawn[name] for name in common):
            self._alike, self._odd = self._alike + 1, 0
            return
        self._odd += 1
        if self._alike >= 2 and self._odd == 1:
            what = f"more random numbers than usual were drawn after step {step}, perhaps by an evaluation"
            self._say(f"{what}: its checkpoint is dropped, for a run that resumes from it would not draw them. {WAY_OUT}.")
            raise Unlike(what)
        if self._alike == 0 and self._odd >= 2 and self._drawn == before:
            self._say(
                "before the first step other random numbers are drawn than between later ones, as a loader's iterator does: a run "
                f"that resumes draws them again, and goes on with other ones than this run. {WAY_OUT}."
            )

    def _say(self, what: str) -> None:
        """Once."""
        if not self._said:
            self._said = True
            log.warning("fxckpt: %s", what)
