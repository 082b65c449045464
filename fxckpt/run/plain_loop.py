"""Watches a loop without boundaries: what is changed before a backward, and what behind a step.

From its start (``compile_step``, ``load``) to the first gradient a process does what a resumed one does in place of what lies
between an ``opt.step()`` and the next gradient. What changes in this first turn is changed by the head of an iteration or by a
forward, and is taken at the end of a step: a resumed run changes it again. What changes there in later turns only is changed
behind the step, and is taken when the next backward begins: no head and no forward has touched it. Random numbers that only
later turns draw are drawn behind the step, too, and no instant holds both.
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
from fxckpt.compat.spread import is_spread, local
from fxckpt.compat.tensors import version_of
from fxckpt.saving.guard import WAY_OUT, ChangedInTurns

log: logging.Logger = logging.getLogger("fxckpt")

UNREAD = "unread"
"""In a mark: nobody knows whether a forward changes it, so it is taken as if one did."""

_PATIENCE = 3  # turns that draw otherwise than the one before, until that is said
_LONGEST = 4096  # elements of a list that are looked at
_LARGEST = 1 << 16  # bytes of an array that are looked at
_LARGEST_BUFFER = 1 << 24

Marks = dict[tuple[str, str], object]
"""By kind (``"buffer"``, ``"parameter"``, ``"extra"``) and name of what may change outside ``opt.step()``: something that is
equal as long as it has not."""


class Unlike(ChangedInTurns):
    """Random numbers were drawn after the step that other turns do not draw: its checkpoint is dropped, which is no failure."""


def mark(value: Any, depth: int = 8) -> object:
    """Something that differs once ``value`` was changed. A large array is looked at only in part."""
    if is_spread(value):
        return mark(local(value)), version_of(value)
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


def mark_buffer(buffer: torch.Tensor) -> object:
    """As ``mark``, by its values too: kernels of normalisation layers change running statistics without counting a change.
    ``UNREAD`` in their place where they are too many, or lie on a device."""
    if buffer.device.type != "cpu" or buffer.layout is not torch.strided or buffer.nbytes > _LARGEST_BUFFER:
        return mark(buffer), UNREAD
    copy = (
        local(buffer).detach().clone(memory_format=torch.contiguous_format)
    )  # memory that numpy has seen cannot be resized any more
    return mark(buffer), zlib.crc32(copy.reshape(-1).view(torch.uint8).numpy().data)


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
        self._last_changed: set[tuple[str, str]] | None = None
        self._last_drawn: dict[str, int] = {}
        self._usual: dict[str, int] | None = None  # what two turns in a row drew
        self._unsettled = 0  # turns in a row that drew otherwise than the one before
        self._odd = self._said = False  # the last turn was unlike the usual; somebody was told

    def start(self, marks: Marks) -> None:
        """The process is where a resumed one would begin, and all looks so."""
        self.changed, self.watching = None, True
        self._marks, self._positions = marks, positions()

    def first_gradient(self, plain: bool) -> None:
        """The first turn has come to its backward; ``plain``: in a loop without boundaries."""
        self.watching = False
        if plain:
            now = self._look(True)
            self._known = now.keys() & self._marks.keys()
            self.changed = {key for key in self._known if now[key] != self._marks[key] or _is_unread(now[key])}
            self._first_drawn = self._last_drawn = drawn(self._positions, positions())
            self._usual = self._last_changed = None

    def changed_since_start(self, kind: str) -> set[str]:
        """The names of this kind that are not as they were at the start, in a loop with boundaries."""
        now = self._look(True)
        return {key[1] for key, each in self._marks.items() if key[0] == kind and key in now and now[key] != each}

    def step_ended(self) -> None:
        """What is taken at the end of ``opt.step()`` is taken now."""
        self._marks, self._positions = self._look(False), positions()

    def is_early(self, kind: str, name: str) -> bool:
        """Is it taken at the end of a step? What is not known to stay as it is before a backward is, but for extras."""
        if self.changed is None or (kind, name) not in self._known:
            return kind != "extra"
        return (kind, name) in self.changed

    def moved(self) -> bool:
        """Has what is taken at the end of a step changed since, or was anything drawn?"""
        return any(self.is_early(*key) for key in self._changed_since()) or positions() != self._positions

    def check(self, step: int) -> None:
        """The next backward begins. Raises Unlike if random numbers were drawn behind the step."""
        if self.changed is None:
            return
        changed = {key for key in self._changed_since() if not self.is_early(*key)}
        self._behind = (self._behind or set()) | changed
        usual, self._last_changed = self._last_changed, changed
        if usual is not None and changed != usual and not self._odd:  # never two in a row
            self._odd = True
            names = ", ".join(repr(name) for _, name in sorted(changed ^ usual))
            what = (
                f"{names} changed before the next backward in some turns only: nobody knows if that was done behind step {step}"
            )
            raise Unlike(f"{what}, or at the beginning of the next turn. {WAY_OUT}")
        self._check_draws(step)

    def unfinished(self) -> bool:
        """The process ends: was the last turn left before all that turns change behind their step was changed?"""
        if self._behind is None:
            return any(kind == "extra" and not self.is_early(kind, name) for kind, name in self._marks)
        return not self._behind <= self._changed_since()

    def _changed_since(self) -> set[tuple[str, str]]:
        """What is not as it was at the step's end."""
        return {key for key, each in self._look(False).items() if key in self._marks and each != self._marks[key]}

    def _check_draws(self, step: int) -> None:
        """Were as many random numbers drawn as in other turns? One that differs did something else behind its step (an
        evaluation's loader draws a seed, an epoch ended): its checkpoint is dropped. Where the first turn differs from all
        others, it does what the others do not (a loader's iterator is made). Where all differ, nothing can be told."""
        now, last = drawn(self._positions, positions()), self._last_drawn
        self._last_drawn = now
        if self._usual is not None:
            if _alike(now, self._usual):
                self._odd = False
                return
            if not self._odd:  # never two in a row
                self._odd = True
                what = (
                    f"after step {step} other random numbers were drawn than usual, perhaps by an evaluation or at an epoch's end"
                )
                raise Unlike(f"{what}, and a run that resumes from it would not draw them. {WAY_OUT}")
        self._odd = False
        self._unsettled = 0 if _alike(now, last) else self._unsettled + 1
        if self._unsettled == _PATIENCE:
            self._say(
                "how many random numbers are drawn varies from turn to turn, so nobody can tell if some are drawn behind the step"
            )
        self._usual = now if _alike(now, last) else None
        if self._usual is not None and not _alike(now, self._first_drawn):
            self._say("before the first step other random numbers are drawn than between later ones, as a loader's iterator does")

    def _say(self, what: str) -> None:
        """Once: why a resumed run may go on with other random numbers."""
        if not self._said:
            self._said = True
            log.warning("fxckpt: %s: a resumed run may go on with other ones than this run. %s.", what, WAY_OUT)


def _is_unread(found: object) -> bool:
    """Does the mark say nothing of values?"""
    return isinstance(found, tuple) and found[-1:] == (UNREAD,)


def _alike(a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    """Is as much drawn of each generator that both know of?"""
    return all(a[name] == b[name] for name in a.keys() & b.keys())
