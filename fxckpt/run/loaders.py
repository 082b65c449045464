"""The loaders that a script goes over, by their places in an epoch."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

from fxckpt.data import source_of
from fxckpt.data.source import Source

_REMEMBERED = 8  # loaders that others took the places of


class Loaders:
    """Knows each loader by its place among those that are asked for in an epoch, which is the same in another process.

    A loader that is made anew for each epoch takes the place of the one before; one that takes turns with others comes back to
    its own state. ``restored``: places and states of a record, for loaders that were not asked for yet.
    """

    def __init__(self, restored: Sequence[tuple[int, Any]] = ()):
        self._restored = list(restored)
        self._sources: dict[int, Source] = {}
        self._others: list[tuple[int, Source]] = []  # whose places others have now
        self._used: set[int] = set()  # the places that were asked for in this epoch
        self._passes: dict[int, weakref.ref[Any]] = {}  # place -> the generator of its pass

    def ask(self, loader: Any) -> tuple[Source, bool, bool]:
        """A loop over this loader begins: its source; is it the first in this epoch; was a state restored?"""
        place = self._place(loader)
        source = self._sources[place]
        first = place not in self._used
        self._used.add(place)
        fitting = [each for each in self._restored if source.fits(each[1])]
        chosen = next((e for e in fitting if e[0] == place), next((e for e in self._restored if e[0] == place), None))
        chosen = chosen if chosen is None or chosen in fitting else next(iter(fitting), chosen)
        if chosen is None or source.begun:
            return source, first, False
        self._restored.remove(chosen)
        source.load_state_dict(chosen[1])
        return source, first, bool(chosen[1]["running"])

    def _place(self, loader: Any) -> int:
        """Its own, unless a pass over it is under way: then it is two loaders; else the next of this epoch."""
        for place, source in self._sources.items():
            if source.loader is loader and not self._under_way(place):
                return place
        place = next(i for i in range(len(self._used) + 1) if i not in self._used and not self._under_way(i))
        if (evicted := self._sources.pop(place, None)) is not None:
            self._others = [*self._others[-_REMEMBERED + 1 :], (place, evicted)]
        back = next((each for each in self._others if each[1].loader is loader and each[0] == place), None)
        if back is not None:
            self._others.remove(back)
        self._sources[place] = source_of(loader) if back is None else back[1]
        return place

    def begun(self, source: Source, generator: Any) -> None:
        """This generator gives the batches of the source's pass."""
        place = next(place for place, each in self._sources.items() if each is source)
        self._passes[place] = weakref.ref(generator)

    def _under_way(self, place: int) -> bool:
        """Does somebody hold a pass over it that has not ended?"""
        generator = self._passes[place]() if place in self._passes else None
        return generator is not None and inspect.getgeneratorstate(generator) != inspect.GEN_CLOSED

    def end_epoch(self) -> None:
        """An epoch is over: so are passes of which no batch was taken, and those that nobody holds."""
        for place, source in self._sources.items():
            generator = self._passes[place]() if place in self._passes else None
            idle = generator is None or inspect.getgeneratorstate(generator) in (inspect.GEN_CREATED, inspect.GEN_CLOSED)
            if idle and place in self._used:
                source.finish()
        self._used.clear()

    def known(self) -> list[Any]:
        """What was asked for."""
        return [source.loader for source in self._sources.values()]

    def state_dict(self) -> list[tuple[int, Any]]:
        """Places and states of all, what was not asked for since a load among them."""
        sources = [*self._sources.items(), *self._others]
        return [*((place, source.state_dict()) for place, source in sources), *self._restored]
