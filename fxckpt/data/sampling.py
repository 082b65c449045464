"""The order of indices: the state of samplers, and whether one can give its order again."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fxckpt.data.generators import global_states, moved
from fxckpt.errors import SetupError

_SCALARS = (bool, int, float, str)
_WATCHED = 64  # batches of a pass: a sampler that draws as it goes does so early


def is_stateful(value: Any) -> bool:
    """Has it a state that it takes back?"""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class Samplers:
    """The samplers of a loader, outermost first, and what they keep from pass to pass: an epoch's number, an order."""

    def __init__(self, loader: Any):
        self._loader = loader
        self._given = {name: _marks(each) for name, each in self.chain().items()}

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

    def name(self) -> str:
        """The class of the innermost."""
        return type(list(self.chain().values())[-1]).__name__ if self.chain() else "order"

    def all_of_torch(self) -> bool:
        """Are they torch's own?"""
        return all(type(each).__module__.startswith("torch.utils.data.") for each in self.chain().values())

    def state(self, whole: bool) -> dict[str, Any]:
        """What they keep; ``whole``: also orders and weights that changed since the loader was given. Those are looked at
        between passes only, as there may be millions of them."""
        return {name: _kept(each, self._given.get(name, {}) if whole else None) for name, each in self.chain().items()}

    def load(self, saved: Mapping[str, Any], keep_epoch: bool = False, stateful: bool = True) -> None:
        """Put it back. ``keep_epoch``: the loop has called ``set_epoch`` for the pass to come, or will; ``stateful``: also what
        samplers have as their own state, which would begin another pass."""
        for name, each in self.chain().items():
            state = saved.get(name, {})
            if "state_dict" in state and stateful:
                each.load_state_dict(state["state_dict"])
            for attribute, value in state.get("attributes", {}).items():
                if not (keep_epoch and attribute == "epoch" and hasattr(each, "set_epoch")):
                    _put(each, attribute, value)


def _put(owner: Any, attribute: str, value: Any) -> None:
    """Set an attribute, and a list or tensor that others may share in place."""
    mine = vars(owner).get(attribute)
    if isinstance(mine, list):
        mine[:] = value.tolist() if isinstance(value, np.ndarray) else value
    elif isinstance(mine, torch.Tensor) and mine.shape == value.shape:
        mine.copy_(value)
    else:
        setattr(owner, attribute, value)


def _kept(sampler: Any, given: Mapping[str, int] | None) -> dict[str, Any]:
    """One sampler's state: its own, or its attributes that are numbers, or that changed."""
    if is_stateful(sampler):
        return {"state_dict": copy.deepcopy(sampler.state_dict())}
    values = getattr(sampler, "__dict__", {})
    attributes = {name: value for name, value in values.items() if isinstance(value, _SCALARS)}
    if given is not None:
        for name, mark in _marks(sampler).items():
            if given.get(name) != mark:
                attributes[name] = _copied(values[name])
    return {"attributes": attributes}


def _copied(value: Any) -> Any:
    """A list of numbers as an array, which is stored quickly; anything else as a copy."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list) and all(type(each) is int for each in value):
        return np.array(value, np.int64)
    return value.copy()


def _marks(sampler: Any) -> dict[str, int]:
    """Checksums of its lists, arrays and tensors."""
    found = {}
    for name, value in getattr(sampler, "__dict__", {}).items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout is torch.strided:
            found[name] = zlib.crc32(value.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            found[name] = zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)
        elif isinstance(value, list) and value and type(value[0]) in (int, float, str):
            found[name] = zlib.crc32(repr(value).encode())
    return found


class Order:
    """The indices of one pass: a mark of the first batch's, to know the order again, and whether the sampler draws as it goes
    from generators that others draw from too: no other process can make that order again."""

    def __init__(self, known: bool):
        """``known``: the samplers are torch's, which draw all at once or from a generator of their own."""
        self.mark: int | None = None
        self.draws = None if known else Draws()

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
        self.again = False  # iterating again, up to where training stopped: all is watched

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
