"""A torch ``DataLoader`` that makes its batches in this process, and what is common to those that make them in workers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from fxckpt.compat.loaders import (
    copied,
    is_iterable_style,
    reading_ended,
    skip_order,
    starts_passes_anew,
    take_back_place,
    takes_back_its_place,
    watch_order,
    watch_samples,
)
from fxckpt.data.generators import Owned, entry, global_generators, kept_globals, packed, read, states, write_all
from fxckpt.data.other_ranks import moved
from fxckpt.data.sampling import Draws, Order, Samplers, check_order, kept_by_data
from fxckpt.data.source import Source, length_of, read_again
from fxckpt.errors import SetupError

_DRAW_AT_ONCE = (
    "Let it draw its order when its iterator is made, or from a generator among its attributes, or give it state_dict()"
)
_DRAW_OWN = "Give the data set a generator of its own among its attributes, or state_dict() and load_state_dict()"


class LoaderSource(Source):
    """A ``DataLoader`` without workers."""

    def __init__(self, loader: DataLoader[Any], kind: type[DataLoader[Any]] | None = None):
        """``kind``: the class whose iterators are used, if not the loader's own."""
        super().__init__(loader)
        self._kind = kind or type(loader)
        self._iterable = is_iterable_style(loader)
        self._stateful = takes_back_its_place(loader.dataset)
        self._samplers, self._data = Samplers(loader), kept_by_data(loader.dataset)
        self._owned = Owned(lambda: _roots(loader))
        self._start: dict[str, Any] = {}
        self._iterator: Any = None
        self._marking: dict[str, Any] = {}
        self._left_early = False
        self._watch_anew()

    # ---- one pass ----

    def _begin(self, saved: dict[str, Any] | None, going_on: bool) -> Iterator[Any]:
        self._watch_anew()
        if not going_on:
            self._refuse_state_of_its_own()
            self._start = self._whole()
            return self._items(self._noted(self._make(None)))
        assert saved is not None
        self._start = saved["start"]
        if not self.exhausted:
            with kept_globals() as real:
                self._go_to(self._start)
                for draws, *_ in self._watched():
                    draws.again = True
                made = self._make(saved)
                check_order(self._order.mark, saved["order"], self._sampler)
                for draws, *who in self._watched():
                    draws.check_again(real, *who)
        self._owned.write(saved["own"])
        self._samplers.load(saved["samplers"], stateful=self.exhausted)
        self._data.load(saved.get("data", {}))
        return iter(()) if self.exhausted else self._items(made)

    def _make(self, saved: dict[str, Any] | None) -> Iterator[Any]:
        """An iterator: of a new pass, or of the rest of the saved one; the generators are as at the start of that."""
        data = saved.get("dataset") if saved is not None else None
        if data is not None and self._iterable:
            take_back_place(self.loader.dataset, data, in_worker=False)
        self._iterator = made = iter(copied(self.loader, self._kind) if self._kind is not type(self.loader) else self.loader)
        if (first := self._start.get("first")) is not None:
            write_all(global_generators(), first["global"])
            self._owned.write(first["own"])
        if not self._iterable:
            watch_order(made, self._order.watch)
            skip_order(made, self.position)
            if data is not None:
                self.loader.dataset.load_state_dict(data)
        elif not self._stateful:
            watch_samples(made, self._draws.watch_all)
            if self.position:
                read_again(made, self.position, type(self.loader.dataset).__name__)
        return made

    def _noted(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The batches of a new pass. A sampler draws at its first index, and others may have drawn since the iterator was made
        (``zip`` of two loaders)."""
        self._start["first"] = {"global": states(global_generators()), "own": self._owned.states()}
        yield from iterator

    def _items(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The batches."""
        return iterator

    def finish(self) -> None:
        if self._running:
            self._left_early = bool(self.position) and not self.exhausted and self._iterable and self._stateful
        super().finish()
        self._iterator = None

    # ---- state ----

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(moved(self.loader, state))

    def mark(self) -> dict[str, Any]:
        """The present instant, taken quickly, for a consumer that reads ahead."""
        if not self._marking:
            self._marking = self._owned.find()
        found: dict[str, Any] = {"position": self.position, "exhausted": reading_ended(self._iterator)}
        found["own"] = {name: entry(each, packed(read(each))) for name, each in self._marking.items()}
        return {**found, "dataset": copy.deepcopy(self.loader.dataset.state_dict())} if self._stateful else found

    def set_back(self, state: dict[str, Any], mark: Mapping[str, Any]) -> None:
        """Make a state that was taken now one of the instant of a mark."""
        state |= {name: mark[name] for name in ("position", "exhausted")}
        state["own"] = copy.deepcopy(mark["own"])
        if "dataset" in state:
            state["dataset"] = copy.deepcopy(mark["dataset"])

    def _state(self) -> dict[str, Any]:
        for draws, *who in self._watched() if self._running else ():
            draws.check(*who)
        if self._left_early and not starts_passes_anew(self.loader.dataset) and self._stands_anywhere():
            raise SetupError(
                f"the loop left a pass of {type(self.loader.dataset).__name__} before its end: its state does not say whether "
                "its next pass begins there or anew. Let the data set end where the loop leaves it, or use workers that are not "
                "persistent"
            )
        whole = not self._running
        found: dict[str, Any] = {"samplers": self._samplers.state(whole), "data": self._data.state(whole)}
        found["own"] = self._owned.states()
        if self._running:
            both = {"samplers": self._samplers, "data": self._data}
            kept = {name: each.begun(self._start.get(name, {})) for name, each in both.items()}
            found |= {"start": {**self._start, **kept}, "order": self._order.mark}
        if self._stateful:
            found["dataset"] = copy.deepcopy(self.loader.dataset.state_dict())
        if self._running and reading_ended(self._iterator):
            found["exhausted"] = True
        return found

    def _loaded(self, state: dict[str, Any]) -> None:
        """Between two passes all is put back at once, as the loop may change it before the next (``set_epoch``)."""
        if not state["running"]:
            self._owned.write(state["own"])
            self._samplers.load(state["samplers"], keep_epoch=True)
            self._data.load(state.get("data", {}), keep_epoch=True)
        if "dataset" in state and (not state["running"] or state["exhausted"]):
            self._put_back_data(state["dataset"])

    def _put_back_data(self, state: Any) -> None:
        """The data set between two passes. Where its state means the end of the last one, that end is passed, as it was then."""
        data = self.loader.dataset
        if starts_passes_anew(data):
            return
        data.load_state_dict(state)
        if self._iterable:
            with kept_globals():
                if next(iter(data), self) is not self:
                    data.load_state_dict(state)

    def _whole(self) -> dict[str, Any]:
        """All that a pass starts from."""
        kept = {"samplers": self._samplers.state(whole=True), "data": self._data.state(whole=True)}
        return {"global": states(global_generators()), "own": self._owned.states(), **kept}

    def _go_to(self, start: Mapping[str, Any]) -> None:
        """Generators and samplers as they were when the pass began."""
        write_all(global_generators(), start["global"])
        self._owned.write(start["own"])
        self._samplers.load(start["samplers"])
        self._data.load(start.get("data", {}))

    def _fingerprint(self) -> dict[str, Any]:
        loader = self.loader
        return {
            "kind": self._kind.__name__,
            "data set": type(loader.dataset).__name__,
            "length of the data": None if self._iterable else length_of(loader.dataset),
            "batch size": loader.batch_size,
            "drop_last": loader.drop_last,
            "batch sampler": type(loader.batch_sampler).__name__,
            "sampler": type(loader.sampler).__name__,
            "workers": loader.num_workers,
            "persistent workers": loader.persistent_workers,
        }

    def _may_differ(self, name: str, state: Mapping[str, Any]) -> bool:
        """Workers that drew nothing made what this process makes."""
        return name == "workers" and state.get("drew") is False and not self._iterable

    # ---- parts ----

    def _stands_anywhere(self) -> bool:
        """Does the data set stand where the pass before left it?"""
        return not self._running or self.position == 0

    def _watch_anew(self) -> None:
        self._marking = {}
        self._order, self._draws = Order(self._samplers.all_of_torch()), Draws()

    def _watched(self) -> Iterator[tuple[Draws, str, str]]:
        """Whose draws are watched, and what to do if they are another's too."""
        if self._order.draws is not None:
            yield self._order.draws, f"the sampler {self._samplers.name()}", _DRAW_AT_ONCE
        yield self._draws, f"the data set {type(self.loader.dataset).__name__}", _DRAW_OWN

    @property
    def _sampler(self) -> Any:
        """What gives the indices of a batch."""
        return self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler

    def _refuse_state_of_its_own(self) -> None:
        """A state that was loaded into a stateful loader by hand would have no effect."""
        if getattr(self.loader, "next_iter_state", None) is not None:
            raise SetupError(
                f"a state was loaded into the {type(self.loader).__name__} itself. fxckpt keeps its place and goes on from "
                "there: leave out load_state_dict(), or iterate over the loader without fxckpt.batches()"
            )


def _roots(loader: DataLoader[Any]) -> dict[str, Any]:
    """Where generators that belong to a loader are looked for."""
    return {name: getattr(loader, name) for name in ("generator", "batch_sampler", "sampler", "dataset", "collate_fn")}
