"""Any other iterable: with a state of its own, or read again up to where training stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from fxckpt.compat.loaders import is_stateful
from fxckpt.data.generators import Owned, global_generators, kept_globals, states, write_all
from fxckpt.data.sampling import Draws, kept_by_data
from fxckpt.data.source import Source, length_of, read_again

_REMEDY = "Give it state_dict() and load_state_dict(), or iterate over a torch DataLoader"


class IterableSource(Source):
    """An iterable that is no ``DataLoader``. An iterator (a generator, say) has one pass."""

    def __init__(self, loader: Any):
        super().__init__(loader)
        self._stateful = is_stateful(loader)
        self._owned, self._kept = Owned(lambda: {"loader": loader}), kept_by_data(loader)
        self._draws = Draws()
        self._start: dict[str, Any] = {}

    def _begin(self, saved: dict[str, Any] | None, going_on: bool) -> Iterator[Any]:
        self._draws = Draws()
        if not going_on:
            self._start = {"global": states(global_generators()), **self._own(whole=True)}
            return self._items(iter(self.loader))
        assert saved is not None
        if self._stateful:
            with kept_globals():
                self.loader.load_state_dict(saved["state"])
                return iter(()) if self.exhausted else iter(self.loader)
        self._start = saved["start"]
        with kept_globals() as real:
            write_all(global_generators(), self._start["global"])
            self._write(self._start)
            self._draws.again = True
            items = self._items(iter(self.loader))
            self._pass_by(items)
            self._draws.check_again(real, f"the {type(self.loader).__name__} that feeds training", _REMEDY)
        self._write(saved)
        return items

    def _own(self, whole: bool) -> dict[str, Any]:
        """Its generators, and what it keeps in attributes."""
        return {"own": self._owned.states(), "kept": self._kept.state(whole)}

    def _write(self, state: Mapping[str, Any]) -> None:
        self._owned.write(state["own"])
        self._kept.load(state.get("kept", {}))

    def _pass_by(self, items: Iterator[Any]) -> None:
        if isinstance(self.loader, (list, tuple, range)):
            next(islice(items, self.position, self.position), None)
        elif self.position:
            read_again(items, self.position, f"a {type(self.loader).__name__}")

    def _items(self, items: Iterator[Any]) -> Iterator[Any]:
        """The items; what cannot be put back is watched at first."""
        return items if self._stateful or isinstance(self.loader, (list, tuple, range)) else self._draws.watch_all(items)

    def _state(self) -> dict[str, Any]:
        if self._stateful:
            return {"state": copy.deepcopy(self.loader.state_dict())}
        if self._running:
            self._draws.check(f"the {type(self.loader).__name__} that feeds training", _REMEDY)
        own = self._own(whole=not self._running)
        return {**own, "start": {**self._start, "kept": self._kept.begun(self._start.get("kept", {}))}} if self._running else own

    def _loaded(self, state: dict[str, Any]) -> None:
        if not state["running"]:
            if self._stateful:
                self.loader.load_state_dict(state["state"])
            else:
                self._write(state)

    def _fingerprint(self) -> dict[str, Any]:
        return {"kind": type(self.loader).__name__, "length": None if self._stateful else length_of(self.loader)}
