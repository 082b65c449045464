"""Says that a loop draws its batches from an iterator that no checkpoint knows."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

from fxckpt.compat.loaders import iterates_over, iterators_alive

log: logging.Logger = logging.getLogger("fxckpt")

_LOOKS = 2  # checkpoints at which it looks: it costs tens of milliseconds


class LoaderWatch:
    """Looks at the first checkpoints for an iterator of a ``DataLoader`` that gives batches from one to the next.

    After a resume such an iterator is made anew: it draws random numbers where the run that was not interrupted did not, and
    begins elsewhere unless the loader has a state.
    """

    def __init__(self) -> None:
        self._left = _LOOKS
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}  # iterator -> what it had given at the last look

    def look(self, known: Iterable[Any]) -> None:
        """A checkpoint is taken. ``known``: the loaders that ``fxckpt.batches`` goes over."""
        if self._left == 0:
            return
        self._left -= 1
        now = [(it, given) for it, given in iterators_alive() if not any(iterates_over(it, loader) for loader in known)]
        for it, given in now:
            before = self._seen.get(id(it))
            if before is not None and before[0]() is it and given > before[1]:
                self._left = 0
                log.warning(
                    "fxckpt: the batches of a DataLoader over a %s come from an iterator that no checkpoint knows: a run that "
                    "resumes makes a new one, which draws random numbers that this run does not draw there, and other batches. "
                    "Go over the loader with fxckpt.batches(loader)",
                    type(it._dataset).__name__,
                )
                return
        self._seen = {id(it): (weakref.ref(it), given) for it, given in now}
