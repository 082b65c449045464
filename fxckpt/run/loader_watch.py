"""Says that a loop draws its batches from an iterator that no checkpoint knows."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from fxckpt.compat.loaders import iterates_over, under_way

log: logging.Logger = logging.getLogger("fxckpt")


class LoaderWatch:
    """Looks at the first two checkpoints for an iterator of a ``DataLoader`` that gives batches from one to the next.

    After a resume such an iterator is made anew: it draws random numbers where the run that was not interrupted did not, and
    begins elsewhere unless the loader has a state.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}  # iterator -> what it had given at the last look

    def look(self, iterators: Iterable[Any], known: Sequence[Any]) -> None:
        """A checkpoint is taken, and these are alive. ``known``: the loaders that ``fxckpt.batches`` goes over."""
        now = [(it, given) for it, given in under_way(iterators) if not any(iterates_over(it, loader) for loader in known)]
        for it, given in now:
            if self._went_on(it, given):
                log.warning(
                    "fxckpt: the batches of a DataLoader over a %s come from an iterator that no checkpoint knows: a run that "
                    "resumes makes a new one, which draws random numbers that this run does not draw there, and other batches. "
                    "Go over the loader with fxckpt.batches(loader)",
                    type(it._dataset).__name__,
                )
                return
        self._seen = {id(it): (weakref.ref(it), given) for it, given in now}

    def _went_on(self, iterator: Any, given: int) -> bool:
        """Has it given more than at the last look?"""
        before = self._seen.get(id(iterator))
        return before is not None and before[0]() is iterator and given > before[1]
