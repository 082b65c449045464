"""The loaders that a script goes over, by their places in an epoch."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from fxckpt.compat.loaders import loaders_alive
from fxckpt.data import source_of
from fxckpt.data.source import Source

log: logging.Logger = logging.getLogger("fxckpt")

_REMEMBERED = 8  # loaders that others took the places of


class Loaders:
    """Knows each loader by its place among those that are asked for in an epoch, which is the same in another process.

    A loader that is made anew for each epoch takes the place of the one before; one that takes turns with others comes back to
    its own state. ``restored``: places and states of a record, for loaders that were not asked for yet. A state with
    ``"current": False`` is of a loader whose place another one had then.
    """

    def __init__(self, restored: Sequence[tuple[int, Any]] = ()):
        self._restored = list(restored)
        self._sources: dict[int, Source] = {}
        self._others: list[tuple[int, Source]] = []  # whose places others have now
        self._turns: dict[int, int | None] = {}  # the turn in which each was first asked for, if it was in one
        self._used: set[int] = set()  # the places that were asked for in this epoch
        self._passes: dict[int, weakref.ref[Any]] = {}  # place -> the generator of its pass
        self._of_epoch: set[int] = set()  # places whose passes were asked for by an epoch itself, not by a turn in it
        self._old: dict[int, weakref.ref[Any]] | None = None  # loaders that were there before the first epoch since a load
        self._left_over: dict[int, int] = {}  # place -> how far its pass was when an epoch ended and somebody held it

    def begin_epoch(self) -> None:
        """An epoch begins. Looking for all loaders takes tens of milliseconds, and is done where something was restored."""
        if self._restored and self._old is None:
            self._old = loaders_alive()

    def ask(self, loader: Any, turn: int | None = None) -> tuple[Source, bool, bool]:
        """A loop over this loader begins: its source; is it the first in this epoch; was a state restored? ``turn``: the number
        of the turn that asks, if it is one."""
        place = self._place(loader)
        self._turns.setdefault(place, turn)
        source = self._sources[place]
        first = place not in self._used
        self._used.add(place)
        state = self._restored_for(place, source)
        if state is None:
            return source, first, False
        source.load_state_dict(state)
        return source, first, bool(state["running"])

    def _restored_for(self, place: int, source: Source) -> dict[str, Any] | None:
        """The state that it goes on from: of a loader like it, at its place if there is one. A pass that was under way must find
        its loader; between two passes, the former run might have had another one as well. One that is made in each epoch
        begins each pass anew."""
        if source.passes:
            return None
        made_anew = self._old is not None and _is_new(source.loader, self._old)
        fitting = [each for each in self._restored if source.fits(each[1]) and (each[1]["running"] or not made_anew)]
        must_fit = [each for each in self._restored if each[0] == place and each[1]["running"] and each[1].get("current", True)]
        chosen = next((each for each in fitting if each[0] == place), next(iter(fitting or must_fit), None))
        if chosen is None:
            return None
        self._warn_of_look_alikes(chosen, fitting)
        self._restored = [each for each in self._restored if each is not chosen]
        self._turns[place] = chosen[1].get("turn")
        return {name: value for name, value in chosen[1].items() if name not in ("current", "turn")}

    def _warn_of_look_alikes(self, chosen: tuple[int, Any], fitting: Sequence[tuple[int, Any]]) -> None:
        """Turns may ask for loaders in an order of chance, or of their numbers: another one in a run that resumes amid."""
        turns = [state.get("turn") for _, state in [chosen, *fitting] if state.get("current", True)]
        if chosen[1].get("turn") is not None and len({turn for turn in turns if turn is not None}) > 1:
            kinds = ", ".join(f"{name}: {value}" for name, value in chosen[1]["loader"].items() if value is not None)
            log.warning(
                "fxckpt: %d loaders are alike (%s) and were first asked for in different turns. They are told apart by that "
                "order: if this run does not ask for them in the same one, they have changed places. Ask for all of them in a "
                "fixed order before the loop, `passes = [iter(fxckpt.batches(each)) for each in loaders]`",
                len(fitting),
                kinds,
            )

    def _place(self, loader: Any) -> int:
        """Its own, unless a pass over it is under way: then it is two loaders; else the next of this epoch. A pass that somebody
        holds since another epoch (``it = iter(...)`` at each epoch's head) is over where a new one is asked for."""
        own = sorted(place for place, source in self._sources.items() if source.loader is loader and not self._under_way(place))
        place = own[0] if own else self._next_place()
        if self._is_held(place):
            self._sources[place].finish()
        if own:
            return place
        self._turns.pop(place, None)
        if (evicted := self._sources.pop(place, None)) is not None:
            self._others = [*self._others[-_REMEMBERED + 1 :], (place, evicted)]
        back = next((each for each in self._others if each[1].loader is loader and each[0] == place), None)
        if back is not None:
            self._others.remove(back)
        self._sources[place] = source_of(loader) if back is None else back[1]
        return place

    def _next_place(self) -> int:
        """The first that this epoch has not asked for and nobody holds a pass of; else one whose pass is held from before."""
        known = sorted(self._sources)
        free = [place for place in known if place not in self._used and not self._under_way(place)]
        return next((place for place in free if not self._is_held(place)), free[0] if free else len(known))

    def begun(self, source: Source, generator: Any, of_epoch: bool) -> None:
        """This generator gives the batches of the source's pass. ``of_epoch``: which an epoch asked for, so that it asks for
        another one if it comes again; a pass that a turn asked for, or the script before its epochs, may go on."""
        place = next(place for place, each in self._sources.items() if each is source)
        self._passes[place] = weakref.ref(generator)
        self._of_epoch = self._of_epoch | {place} if of_epoch else self._of_epoch - {place}
        self._left_over.pop(place, None)

    def _is_held(self, place: int) -> bool:
        """Does somebody hold a pass over it that has not ended?"""
        generator = self._passes[place]() if place in self._passes else None
        return generator is not None and inspect.getgeneratorstate(generator) != inspect.GEN_CLOSED

    def _under_way(self, place: int) -> bool:
        """Is a pass held that was begun in this epoch, or has given a batch in it?"""
        return self._is_held(place) and self._left_over.get(place) != self._sources[place].position

    def end_epoch(self) -> None:
        """An epoch is over: so are its own passes, those of which no batch was taken, and those that nobody holds."""
        for place in self._used:
            generator = self._passes[place]() if place in self._passes else None
            idle = generator is None or inspect.getgeneratorstate(generator) in (inspect.GEN_CREATED, inspect.GEN_CLOSED)
            if idle or place in self._of_epoch:
                self._sources[place].finish()
        self._left_over = {place: source.position for place, source in self._sources.items() if self._is_held(place)}
        self._restored = [(place, {**state, "current": False}) for place, state in self._restored]
        self._used.clear()

    def known(self) -> list[Any]:
        """What was asked for."""
        return [source.loader for source in self._sources.values()]

    def state_dict(self) -> list[tuple[int, Any]]:
        """Places and states of all, what was not asked for since a load among them."""
        now = [(place, {**source.state_dict(), "turn": self._turns.get(place)}) for place, source in self._sources.items()]
        others = [(place, {**source.state_dict(), "current": False}) for place, source in self._others]
        return [*now, *others, *self._restored][: len(now) + 2 * _REMEMBERED]


def _is_new(loader: Any, old: Mapping[int, weakref.ref[Any]]) -> bool:
    """Is it a loader that was not there before?"""
    return isinstance(loader, DataLoader) and (id(loader) not in old or old[id(loader)]() is not loader)
