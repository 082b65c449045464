"""What torch's data loaders do in private: the order of indices behind an iterator, and which worker makes which batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as _IterableDataset
from torch.utils.data._utils import worker as _worker
from torch.utils.data._utils.pin_memory import pin_memory as _pin_memory
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter, _SingleProcessDataLoaderIter

from fxckpt.compat.alive import alive

Indices = Iterator[Any]


def is_iterable_style(loader: DataLoader[Any]) -> bool:
    """Is the order the data set's own? Also true where a wrapped data pipe hides it."""
    return isinstance(loader.dataset, _IterableDataset)


def iterates_as_torch(loader: DataLoader[Any], known: tuple[type, ...] = ()) -> bool:
    """Are its iterators torch's own? A subclass that makes others may do anything with them. ``known``: subclasses whose
    uninterrupted passes are torch's, bit for bit."""
    kind = next((k for k in type(loader).__mro__ if k in known or "__iter__" in vars(k) or "_get_iterator" in vars(k)), None)
    return kind is DataLoader or kind in known


def copied(loader: DataLoader[Any], kind: type) -> DataLoader[Any]:
    """A shallow copy, of class ``kind``: made without ``__init__``, as the attributes of a loader cannot be set after it."""
    copy: DataLoader[Any] = object.__new__(kind)
    vars(copy).update(vars(loader))
    return copy


def iterate_with(loader: DataLoader[Any], begin: Callable[[], Iterator[Any]]) -> None:
    """Let a copy begin its passes otherwise, for Accelerate, which calls ``__iter__`` as an attribute of the loader inside."""
    vars(loader)["__iter__"] = begin


def has_workers_running(loader: DataLoader[Any]) -> bool:
    """Has it been iterated before, with workers that stay?"""
    return loader.persistent_workers and getattr(loader, "_iterator", None) is not None


def holds_workers(loader: DataLoader[Any]) -> bool:
    """Does it keep an iterator with workers in an attribute of its own, whose passes go on from one to the next?"""
    return any(isinstance(each, _MultiProcessingDataLoaderIter) for name, each in vars(loader).items() if name != "_iterator")


def watch_order(iterator: Any, watch: Callable[[Indices], Indices]) -> None:
    """Let ``watch`` see the indices that an iterator without workers takes from its sampler."""
    assert isinstance(iterator, _SingleProcessDataLoaderIter)
    iterator._sampler_iter = watch(iterator._sampler_iter)


def watch_samples(iterator: Any, watch: Callable[[Iterator[Any]], Iterator[Any]]) -> None:
    """Let ``watch`` see the samples of an iterable data set, as it gives them; the samples are not in batches yet."""
    fetcher = iterator._dataset_fetcher
    fetcher.dataset_iter = watch(fetcher.dataset_iter)


def skip_order(iterator: Any, count: int) -> None:
    """Drop the next ``count`` batches by their indices; nothing is read."""
    for _ in range(count):
        next(iterator._sampler_iter, None)


def reading_ended(iterator: Any) -> bool:
    """Has the data set ended within the last batch? Its own state may say already that it starts anew."""
    return bool(getattr(getattr(iterator, "_dataset_fetcher", None), "ended", False))


def pinned(batch: Any) -> Any:
    """A batch in pinned memory, as the loader itself pins it."""
    return _pin_memory(batch)


@dataclass
class Start:
    """Where a pass goes on that another process began: ``skip`` batches were handed out, ``worker`` makes the next one.

    ``base_seed``: of the former process's workers. ``rewind``: puts the generators to the start of the pass, where it was not
    the first of its workers: that one began without drawing a seed. ``hold``: the pass is over, its workers wait for the next.
    """

    skip: int
    worker: int
    base_seed: int | None
    rewind: Callable[[], None] | None = None
    hold: bool = False


class WorkersIterator(_MultiProcessingDataLoaderIter):
    """torch's iterator over batches that workers make, which can also begin in the middle of a pass.

    Worker numbers, and which worker makes which batch, are those of the uninterrupted pass: the first index goes to the
    worker whose turn it is.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        watch: Callable[[Indices], Indices],
        received: Callable[[Any], None],
        start: Start | None = None,
    ):
        """``loader``: a copy, which keeps this iterator if its workers stay. ``watch`` and ``received`` must lead to no object
        that holds this one: it ends its workers when it is let go of, which a circle would put off, into a forked child even."""
        self._watch, self._received, self._start = watch, received, start
        self._fresh, self._hold = True, start is not None and start.hold
        super().__init__(loader)
        if loader.persistent_workers:
            loader._iterator = self

    @property
    def _base_seed(self) -> int:
        """What torch drew, or what it drew for the workers that these go on for."""
        return self._seed

    @_base_seed.setter
    def _base_seed(self, drawn: int) -> None:
        known = self._start.base_seed if self._start is not None else None
        self._seed = drawn if known is None else known

    @property
    def base_seed(self) -> int:
        """The seed that the workers were made with."""
        return self._seed

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        self._fresh = True
        if not first_iter:
            self._hold = False
        super()._reset(loader, first_iter)

    def _try_put_index(self) -> None:
        """The first call of a pass comes when the sampler's iterator is made and nothing is drawn from it."""
        if self._fresh:
            self._fresh = False
            self._begin()
        if not self._hold:
            super()._try_put_index()

    def _begin(self) -> None:
        start, self._start = self._start, None
        if start is not None and start.rewind is not None:
            start.rewind()
            self._sampler_iter = iter(self._index_sampler)
        self._sampler_iter = self._watch(self._sampler_iter)
        if start is not None:
            skip_order(self, start.skip)
            for _ in range(start.worker):
                next(self._worker_queue_idx_cycle)

    def _get_data(self) -> Any:
        """Every result passes here, also those that a new pass throws away."""
        found = super()._get_data()
        self._received(found[1])
        return found


@dataclass(frozen=True)
class DataEnded(_worker._IterableDatasetStopIteration):
    """What a worker sends behind the last batch of an iterable data set, with what it has become."""

    state: Any = None


def tell_end(state: Callable[[], Any]) -> None:
    """In a worker: let it send :class:`DataEnded`. No call of the user's comes so late, and a data set may draw after its last
    batch, or make one that is dropped."""
    _worker._IterableDatasetStopIteration = lambda worker: DataEnded(worker, state())  # type: ignore[assignment,misc]


def is_stateful(value: object) -> bool:
    """Has it a state that it takes back?"""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def takes_back_its_place(dataset: Any) -> bool:
    """Does its state bring back exactly what comes next? Hugging Face's iterable data sets say that they lose what is in a
    shuffle buffer, and may lose a batch of a batched ``map`` over Arrow tables."""
    if not is_stateful(dataset):
        return False
    level, seen = [getattr(dataset, "_ex_iterable", None)], 0
    while _is_hugging_face(dataset) and level and seen < 1000:
        each, seen = level.pop(), seen + 1
        if "Shuffled" in type(each).__name__ or (getattr(each, "batched", False) and getattr(each, "iter_arrow", None)):
            return False
        level += [
            inner for inner in (getattr(each, "ex_iterable", None), *getattr(each, "ex_iterables", ())) if inner is not None
        ]
    return True


def take_back_place(dataset: Any, state: Any, in_worker: bool) -> None:
    """Load a data set's state for one pass. Hugging Face's would begin each later pass there too: theirs is believed as often
    as one pass asks, twice in a worker, which looks before and after it takes its shards."""
    dataset.load_state_dict(_Believed(state, 2 if in_worker else 1) if _is_hugging_face(dataset) else state)


def starts_passes_anew(dataset: Any) -> bool:
    """Is there nothing to put back between two passes? A state of Hugging Face's would then mean the end of the last one."""
    return _is_hugging_face(dataset)


def _is_hugging_face(dataset: Any) -> bool:
    return any(
        kind.__module__.partition(".")[0] == "datasets" and kind.__name__ == "IterableDataset" for kind in type(dataset).__mro__
    )


class _Believed(dict):
    """A state that is true a number of times, and false from then on."""

    def __init__(self, state: Any, times: int):
        super().__init__(state)
        self._times = times

    def __bool__(self) -> bool:
        self._times -= 1
        return self._times >= 0


ITERATOR: type[Any] = _BaseDataLoaderIter
"""What a ``DataLoader`` makes for a pass."""


def under_way(iterators: Iterable[Any]) -> list[tuple[Any, int]]:
    """Those that were begun and have not ended, and how many batches each has given."""
    return [(each, each._num_yielded) for each in iterators if each._num_yielded and not _has_ended(each)]


def loaders_alive() -> dict[int, weakref.ref[Any]]:
    """Every ``DataLoader``, by its id. It looks at all objects that the collector knows."""
    return {id(each): weakref.ref(each) for each in alive(DataLoader)}


def _has_ended(iterator: _BaseDataLoaderIter) -> bool:
    """Has it given all batches of its pass? One whose workers persist stays with its loader."""
    try:
        return iterator._num_yielded >= len(iterator._index_sampler)
    except TypeError:
        return False


def iterates_over(iterator: _BaseDataLoaderIter, loader: object) -> bool:
    """Is it one of this loader, or of a copy of it?"""
    return iterator._dataset is getattr(loader, "dataset", None)
