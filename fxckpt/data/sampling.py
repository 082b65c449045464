"""The order of indices: the state of samplers, and whether one can give its order again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from fxckpt.compat.loaders import is_stateful
from fxckpt.data.attributes import Attributes
from fxckpt.data.generators import global_states, moved
from fxckpt.data.other_ranks import PLACE
from fxckpt.errors import SetupError

_WATCHED = 64  # batches of a pass: a sampler that draws as it goes does so early
_DEEPEST, _MOST = 8, 64  # levels of data sets that wrap others, and how many one is put together from
_LARGEST = 1 << 20  # bytes of an array or a list of a data set: what is larger is data


class Samplers(Attributes):
    """The samplers of a loader, outermost first, and what they keep from pass to pass: an epoch's number, an order."""

    def __init__(self, loader: Any):
        self._loader = loader
        super().__init__(self.chain, every_number=True)

    def chain(self) -> dict[str, Any]:
        """Batch sampler, its sampler, and what these wrap."""
        found: dict[str, Any] = {}
        level = [(name, getattr(self._loader, name, None)) for name in ("batch_sampler", "sampler")]
        while level:
            name, each = level.pop(0)
            if each is None or isinstance(each, (list, tuple, range)) or any(each is other for other in found.values()):
                continue
            found[name] = each
            level += [(f"{name}.{part}", getattr(each, part, None)) for part in ("batch_sampler", "sampler")]
        return found

    def load(self, saved: Mapping[str, Any], keep_epoch: bool = False, stateful: bool = True) -> None:
        """Put it back, but for whose share of the data it is."""
        own = {name for name, each in self.chain().items() if isinstance(each, DistributedSampler)}
        super().load(
            {name: _without_place(state) if name in own else state for name, state in saved.items()}, keep_epoch, stateful
        )

    def name(self) -> str:
        """The class of the innermost."""
        return type(list(self.chain().values())[-1]).__name__ if self.chain() else "order"

    def all_of_torch(self) -> bool:
        """Are they torch's own?"""
        return all(type(each).__module__.startswith("torch.utils.data.") for each in self.chain().values())


def _without_place(state: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in state.get("attributes", {}).items() if key not in PLACE}
    return {**state, "attributes": kept}


def kept_by_data(dataset: Any) -> Attributes:
    """What a data set, and those that it wraps, keep in attributes and change: the number of a pass, an order, a curriculum.
    One that has a state of its own says it there; those of Hugging Face change no attribute as they are read."""
    return Attributes(lambda: _wrapped(dataset), largest=_LARGEST)


def _wrapped(dataset: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    level = [("dataset", dataset)]
    for _ in range(_DEEPEST):
        level = [(name, each) for name, each in level if hasattr(each, "__dict__") and not is_stateful(each)]
        level = [(name, each) for name, each in level if type(each).__module__.partition(".")[0] != "datasets"]
        found |= level
        inside = [(f"{name}.dataset", getattr(each, "dataset", None)) for name, each in level]
        parts = [(name, vars(each).get("datasets")) for name, each in level]
        inside += [(f"{n}.{at}", each) for n, all_ in parts if isinstance(all_, list) for at, each in enumerate(all_[:_MOST])]
        level = inside
    return found


class Order:
    """The indices of one pass: a mark of the first batch's, to know the order again, and whether the sampler draws as it goes
    from generators that others draw from too: no other process can make that order again."""

    def __init__(self, known: bool):
        """``known``: the samplers are torch's, which draw all at once or from a generator of their own."""
        self.mark: int | None = None
        self.draws: Draws | None = None if known else Draws()

    def watch(self, indices: Iterator[Any]) -> Iterator[Any]:
        """The same indices."""
        indices = indices if self.draws is None else self.draws.watch_all(indices)
        for first in indices:
            self.mark = _mark(first)
            yield first
            break
        yield from indices


def _mark(indices: Any) -> int | None:
    """A checksum of a batch's indices, where they are values that print the same in every process."""
    text = repr(indices.tolist() if isinstance(indices, (torch.Tensor, np.ndarray)) else indices)
    return None if " at 0x" in text else zlib.crc32(text.encode())


class Draws:
    """Who draws from the global generators while something is iterated: it, in its ``next``, or its consumer between two.

    What it draws in its first ``next`` (a seed, an order) does not count: that comes before all that the consumer draws.
    """

    def __init__(self) -> None:
        self._inside: set[str] = set()
        self._between: set[str] = set()
        self._after: dict[str, Any] = {}  # the states behind the last ``next`` that was watched
        self.again: bool = False  # iterating again, up to where training stopped: all is watched

    def watch_all(self, items: Iterator[Any]) -> Iterator[Any]:
        """The items, of which the first are watched."""
        at = 0
        while at < _WATCHED or self.again:
            before = self._look()
            try:
                item = next(items)
            except StopIteration:
                return
            self._after = global_states()
            if at:
                self._inside |= moved(before, self._after)
            at += 1
            yield item
            del item
        self._look()
        self._after = {}
        yield from items

    def _look(self) -> dict[str, Any]:
        """What the consumer drew since."""
        now = global_states()
        self._between |= moved(self._after, now)
        return now

    def check(self, what: str, remedy: str) -> None:
        """Raise SetupError where two draw from one generator."""
        self._look()
        _refuse(self._inside & self._between, what, remedy)

    def check_again(self, real: dict[str, Any], what: str, remedy: str) -> None:
        """Raise SetupError where iterating again, up to where training stopped, drew from a generator that is not then where
        it really was: something else had drawn from it too, later than :meth:`watch_all` looks."""
        self.again = False
        _refuse(self._inside & moved(real, global_states()), what, remedy)


def _refuse(shared: set[str], what: str, remedy: str) -> None:
    if shared:
        raise SetupError(
            f"{what} draws from global generators ({', '.join(sorted(shared))}) while it is iterated, and so does training in "
            f"between: a new process cannot make the same order again without training again. {remedy}"
        )


def check_order(found: int | None, expected: int | None, sampler: Any) -> None:
    """Raise SetupError where a resumed pass would have other batches than those that were handed out."""
    if expected is not None and found != expected:
        raise SetupError(
            f"{type(sampler).__name__} gives another order of batches than before the restart, so some samples would be seen "
            "twice and others not at all. It must depend on nothing but generators and numbers among its attributes, and on "
            "set_epoch(): call that before fxckpt.batches(), and make the data set and the loader as before"
        )
