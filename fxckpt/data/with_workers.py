"""A torch ``DataLoader`` with workers: each goes on with the random state that it had behind its last batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from fxckpt.compat.loaders import Start, WorkersIterator, copied, has_workers_running, starts_passes_anew
from fxckpt.data.generators import kept_globals
from fxckpt.data.loader import LoaderSource
from fxckpt.data.source import read_again
from fxckpt.data.workers import Arrivals, InWorker, State, packed_states
from fxckpt.errors import SetupError


class WorkersSource(LoaderSource):
    """A ``DataLoader`` with workers.

    It is iterated over as a shallow copy, whose ``collate_fn`` adds to each batch what its worker has become. Prefetched batches
    are ahead of what was handed out, so both are kept: the states behind the last batch received, which persistent workers
    take into the next pass, and those behind the last one handed out, from which a new process goes on.
    """

    def __init__(self, loader: DataLoader[Any], kind: type[DataLoader[Any]] | None = None):
        super().__init__(loader, kind)
        if getattr(loader, "_initial_iter_for_state_dict", False):
            raise SetupError(
                "the loader's state_dict() was called before training, which began a pass and drew from generators: leave that "
                "out, fxckpt.batches() keeps the loader's place itself"
            )
        if not loader.in_order:
            raise SetupError(
                "in_order=False hands batches out as workers happen to finish them, an order that no resumed run can repeat; "
                "make the DataLoader with in_order=True"
            )
        self._persistent = loader.persistent_workers
        self._copy: Any = None
        self._former: dict[str, Any] | None = None  # a loaded state whose persistent workers are not made yet
        self._arrivals = Arrivals([{} for _ in range(loader.num_workers)], False)
        self._handed: list[State] = []
        self._at_start: list[State] = []
        self._made: dict[str, Any] = {}
        self._left: dict[str, Any] = {}
        self._next, self._base_seed = 0, 0
        self._again = False

    # ---- one pass ----

    def _make(self, saved: dict[str, Any] | None) -> Any:
        if saved is not None:
            self._former = None
            return self._make_former(saved)
        if self._former is not None:
            self._make_former_workers()
        if self._copy is None or not self._persistent:
            made = self._first()
        else:
            self._arrivals.order = None if self._iterable else self._order
            made = iter(self._copy)  # the workers stay; what they read ahead is thrown away
            self._arrivals.states = self._between_passes(self._arrivals.states)
            self._handed, self._again = list(self._arrivals.states), True
        self._at_start, self._next = list(self._handed), 0
        return made

    def _between_passes(self, states: list[State]) -> list[State]:
        """What workers take from one pass into the next: not where they are in an iterable data set."""
        return [_without(state, "ended", "dataset") for state in states] if self._iterable else list(states)

    def _first(self, former: list[State] | None = None, start: Start | None = None) -> Any:
        """New workers."""
        if has_workers_running(self.loader):
            raise SetupError(
                "the loader's persistent workers have made batches already, outside of fxckpt.batches(), so that a new process "
                "cannot bring them to the same state: iterate over it in fxckpt.batches() only, and over another one elsewhere"
            )
        loader = self.loader
        self._handed, self._again = list(former) if former else [{} for _ in range(loader.num_workers)], False
        self._arrivals = Arrivals(list(self._handed), self._arrivals.drew)
        self._arrivals.order = None if self._iterable else self._order
        self._made = {"own": self._owned.states(), "numbers": self._data.numbers()} if self._persistent else {}
        both = InWorker(
            loader.collate_fn, loader.worker_init_fn, list(self._handed), loader.batch_size if self._iterable else None
        )
        self._copy = made = copied(loader, self._kind)
        made.collate_fn, made.worker_init_fn = both.collate, both.init
        iterator = WorkersIterator(made, self._arrivals.watch, self._arrivals.receive, start)
        self._base_seed = iterator.base_seed
        return iterator

    def _noted(self, iterator: Any) -> Iterator[Any]:
        """Nothing: the sampler has drawn when the iterator was made, for the workers read ahead."""
        return iterator  # type: ignore[no-any-return]

    def _items(self, iterator: Any) -> Iterator[Any]:
        workers = self.loader.num_workers
        for carried in iterator:
            self._handed[carried.worker] = carried.state
            self._next = (carried.worker + 1) % workers
            yield carried.batch
            del carried

    # ---- workers of a former process ----

    def _make_former(self, saved: Mapping[str, Any]) -> Any:
        """The pass that is saved, at its position; generators are as at its start."""
        former = saved["workers"]
        position, over = former["position"], former["exhausted"]
        again, same_workers = former["again"], len(former["states"]) == self.loader.num_workers
        reads_again = self._iterable and not self._stateful and not over
        states = (former["at_start"] if reads_again else former["states"]) if same_workers else []
        if over:
            states = self._between_passes(states)
        start = Start(
            skip=0 if self._iterable else position,
            worker=0 if reads_again else former["next"] if same_workers else position % self.loader.num_workers,
            base_seed=former["base_seed"],
            rewind=(lambda: self._go_to(saved["start"])) if again else None,
            hold=over,
        )
        if "own" in former:  # workers that have made nothing yet have the data set as it was when they were made
            self._owned.write(former["own"])
            self._data.load(former.get("numbers", {}))
        made = self._first(states, start)
        self._made = {key: former[key] for key in ("own", "numbers") if key in former}
        self._again, self._at_start, self._next = again, former["at_start"], start.worker
        if reads_again and position:
            read_again(self._items(made), position, type(self.loader.dataset).__name__)
        return made

    def _make_former_workers(self) -> None:
        """Persistent workers of a pass that was over; the next one begins with them."""
        former, self._former = self._former, None
        assert former is not None
        now = self._whole()
        with kept_globals():
            self._go_to(former["start"])
            self._make_former(former)
        self._go_to(now)
        self._watch_anew()

    # ---- state ----

    def mark(self) -> dict[str, Any]:
        found = super().mark()
        return {**found, "states": list(self._handed), "next": self._next}

    def set_back(self, state: dict[str, Any], mark: Mapping[str, Any]) -> None:
        super().set_back(state, mark)
        place = {name: mark[name] for name in ("position", "next")}
        state["workers"] |= {**place, "states": packed_states(mark["states"])}

    def finish(self) -> None:
        if self._running:
            self._left = self._place()
        super().finish()

    def _stands_anywhere(self) -> bool:
        """Persistent workers have the data set as the pass before left it, until each has made a batch."""
        return self._persistent and (not self._running or any("dataset" not in state for state in self._handed))

    def _place(self) -> dict[str, Any]:
        return {"position": self.position, "exhausted": self.exhausted}

    def _whole(self) -> dict[str, Any]:
        """Workers begin with the data set as this process has it."""
        found = super()._whole()
        if self._stateful and not starts_passes_anew(self.loader.dataset):
            found["dataset"] = copy.deepcopy(self.loader.dataset.state_dict())
        return found

    def _go_to(self, start: Mapping[str, Any]) -> None:
        super()._go_to(start)
        if "dataset" in start:
            self.loader.dataset.load_state_dict(start["dataset"])

    def _state(self) -> dict[str, Any]:
        found = {**super()._state(), "drew": self._arrivals.drew}
        found.pop("dataset", None)  # what this process has of it is in the start
        if self._former is not None:
            found |= {name: self._former[name] for name in ("start", "order", "workers")}
        elif self._copy is not None and (self._persistent or (self._running and not self.exhausted)):
            found |= {"start": found.get("start", self._start), "order": self._order.mark, "workers": self._workers()}
        return found

    def _workers(self) -> dict[str, Any]:
        place = self._place() if self._running else self._left
        states = self._arrivals.states if place["exhausted"] else self._handed
        found = {"states": packed_states(states), "at_start": packed_states(self._at_start), "next": self._next}
        return {**place, **self._made, **found, "base_seed": self._base_seed, "again": self._again}

    def _loaded(self, state: dict[str, Any]) -> None:
        super()._loaded(state)
        self._arrivals.drew = state.get("drew", True)
        self._former = state if self._persistent and "workers" in state else None


def _without(state: State, *names: str) -> State:
    return {name: value for name, value in state.items() if name not in names}
