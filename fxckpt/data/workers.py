"""What runs in a loader's workers: each batch carries the state of the worker that made it, as it was after the batch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import get_worker_info

from fxckpt.compat.generators import Ends, Glance, completed, since
from fxckpt.compat.loaders import DataEnded, pinned, take_back_place, takes_back_its_place, tell_end
from fxckpt.data.generators import Owned, Reader, entry, global_generators, packed, same, write_all
from fxckpt.data.sampling import Order, kept_by_data

State = dict[str, Any]


class Carried:
    """A batch, its worker's number, and what changed of that worker's state since its batch before: None for nothing."""

    __slots__ = ("batch", "state", "worker")

    def __init__(self, batch: Any, worker: int, state: State | None):
        self.batch: Any = batch
        self.worker: int = worker
        self.state: State | None = state

    def __reduce__(self) -> tuple[Any, ...]:
        return Carried, (self.batch, self.worker, self.state)

    def pin_memory(self) -> Carried:
        """As the loader's own thread pins a batch; a type of the user's is asked itself."""
        return Carried(pinned(self.batch), self.worker, self.state)


class Arrivals:
    """The training process's side: what each worker had become behind the last batch that arrived, and the order of the pass."""

    def __init__(self, former: list[State], drew: bool):
        self.states: list[State] = former
        self.drew: bool = drew
        self.order: Order | None = None

    def watch(self, indices: Iterator[Any]) -> Iterator[Any]:
        """The indices of a pass that begins; an iterable data set has none."""
        return indices if self.order is None else self.order.watch(indices)

    def receive(self, data: Any) -> None:
        """A result arrived, be it to be handed out later or never. A batch gets its worker's whole state."""
        if type(data) is Carried:
            self._merge(data.worker, data.state)
            data.state = self.states[data.worker]
        elif type(data) is DataEnded:
            self._merge(data.worker_id, data.state)

    def _merge(self, worker: int, changed: State | None) -> None:
        if changed:
            self.drew, before = True, self.states[worker]
            glances = {name: completed(before[name], now) for name, now in changed.items() if isinstance(now, Ends)}
            self.states[worker] = {**before, **changed, **glances}


def _leave_if_orphaned(trainer: int) -> None:
    """At a worker's end. Batches with their states fill the pipe, and where the trainer was killed nobody empties it: the thread
    that writes there, which an exit waits for, would never end."""
    if os.getppid() != trainer:
        os._exit(1)


class InWorker:
    """A loader's ``worker_init_fn`` and ``collate_fn`` around the user's own. The two are pickled together, so that they are one
    object in each worker."""

    def __init__(
        self, collate: Callable[[Any], Any], init: Callable[[int], Any] | None, former: list[State], batch_size: int | None
    ):
        """``former``: the state of each former worker, empty where it made no batch; ``batch_size``: of an iterable data set."""
        self._collate, self._user_init, self._former, self._batch_size = collate, init, former, batch_size
        self._dataset: Any = None
        self._ended = False
        self._batches = 0
        self._sent: set[str] = set()  # generators whose state the trainer has

    def init(self, worker: int) -> None:
        """A new worker of that number, begun as ever; then what the former one had become."""
        Finalize(None, _leave_if_orphaned, args=(os.getppid(),), exitpriority=0)
        if self._user_init is not None:
            self._user_init(worker)
        info = get_worker_info()
        assert info is not None
        self._worker, self._dataset, self._stateful = worker, info.dataset, takes_back_its_place(info.dataset)
        self._owner = Owned(lambda: {"dataset": self._dataset, "collate_fn": self._collate})
        self._kept = kept_by_data(self._dataset)
        if self._former and self._former[worker]:
            self._restore(self._former[worker])
        self._look()
        self._last, self._last_kept = self._reader.read(), self._kept.state(whole=False)
        tell_end(self._end)

    def _restore(self, state: State) -> None:
        write_all(global_generators(), {name: value for (where, name), value in _split(state) if where == "global"})
        self._owner.write({name: value for (where, name), value in _split(state) if where == "own"})
        self._kept.load(state.get("data", {}))
        self._ended = state.get("ended", False)
        if "dataset" in state:
            take_back_place(self._dataset, state["dataset"], in_worker=True)

    def _look(self) -> None:
        """For generators that this worker has."""
        self._generators = {f"global/{name}": each for name, each in global_generators().items()}
        self._generators |= {f"own/{name}": each for name, each in self._owner.find().items()}
        self._reader = Reader(self._generators)

    def collate(self, samples: Any) -> Carried:
        """The user's batch, and what this worker has become."""
        if self._ended:  # its data set had ended, and what its state says may be a new beginning
            self._restore(self._former[self._worker])
            raise StopIteration
        batch = self._collate(samples)
        self._batches += 1
        if self._batches <= 2:  # made at the first sample, perhaps
            self._look()
        state = self._changed()
        if self._batch_size is not None and len(samples) < self._batch_size:
            state["ended"] = True
        if self._stateful:
            state["dataset"] = copy.deepcopy(self._dataset.state_dict())  # it is pickled later, in another thread
        return Carried(batch, self._worker, state or None)

    def _end(self) -> State:
        """The data set of this worker ended; the next pass begins anew."""
        self._ended = False
        return self._changed()

    def _changed(self) -> State:
        """States of the generators that this batch drew from, not packed: the training process does it at a checkpoint; and
        what the data set keeps in attributes, where that changed."""
        found: State = {}
        states = self._reader.read()
        for name, now in states.items():
            if name not in self._last or not same(self._last[name], now):
                found[name] = self._news(name, now) if name.startswith("global/") else entry(self._generators[name], now)
        self._last = states
        if not self._kept.stands_still() and not same(kept := self._kept.state(whole=False), self._last_kept):
            found["data"] = self._last_kept = kept
        return found

    def _news(self, name: str, now: Any) -> Any:
        """What the trainer does not know of a generator's state."""
        before = self._last.get(name)
        if name in self._sent and isinstance(now, Glance) and isinstance(before, Glance):
            return since(before, now)
        self._sent.add(name)
        return now


def packed_states(states: list[State]) -> list[State]:
    """Each worker's, for a checkpoint."""
    return [{name: _packed(name, value) for name, value in state.items()} for state in states]


def _packed(name: str, value: Any) -> Any:
    if name.startswith("own/"):
        return {**value, "state": packed(value["state"])}
    return packed(value) if name.startswith("global/") else value


def _split(state: State) -> list[tuple[tuple[str, str], Any]]:
    """A state's generators by where they are and their names."""
    return [((where, name), value) for key, value in state.items() for where, slash, name in [key.partition("/")] if slash]
