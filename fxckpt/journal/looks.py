"""The tensors of a run's layers as steps left them, to be looked at again: what changed outside of steps is seen here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fxckpt.compat.spread import is_spread, local
from fxckpt.compat.tensors import version_of
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.guard import glimpse
from fxckpt.saving.plan import EngineLayer, Layout

FIRST = 3
"""Checkpoints and records behind which all elements are looked at: what writes past version counters does so from the first turn
on. Behind later ones it is a few elements of one layer in turn, and of each tensor the first ones and where it lies."""

_WORD = 16  # bytes of each tensor

_OTHERS = -1
"""In place of an optimizer's number: the layers that no step updates."""


@dataclass
class Moves:
    """What is not as it was left. ``layers``: by the engine's number of each layer the keys of its tensors; ``kinds`` of these
    layers; ``unseen``: the keys of what changed though its version did not."""

    layers: dict[int, list[str]] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)

    def add(self, other: Moves) -> None:
        """These moved, too."""
        for number, keys in other.layers.items():
            self.layers[number] = list(dict.fromkeys([*self.layers.get(number, ()), *keys]))
        self.kinds |= other.kinds
        self.unseen |= other.unseen

    def of(self, kind: str) -> list[str]:
        """The keys in layers of this kind."""
        return [key for number, keys in self.layers.items() if self.kinds[number] == kind for key in keys]


class Watched:
    """Some layers of a layout, and their tensors, found once."""

    def __init__(self, layers: Mapping[int, EngineLayer]):
        self.layers: Mapping[int, EngineLayer] = layers
        parts = [(local(e.tensor), e.tensor) for layer in layers.values() for e in layer.entries]
        self._tensors = [part for part, _ in parts]
        # What is done to a DTensor moves its own counter, not that of the part which lies here.
        self._spread = [(at, whole) for at, (_, whole) in enumerate(parts) if is_spread(whole)]
        self._addresses: list[int] = []
        self._words: list[ctypes.Array[ctypes.c_char]] = []  # the memory at these addresses

    def now(self) -> tuple[list[int], list[int], list[bytes]]:
        """Of each tensor its version, its address, and a few bytes of it: what takes no time to look at."""
        addresses = [each.data_ptr() for each in self._tensors]
        if addresses != self._addresses or not all(each.is_cpu for each in self._tensors):
            # A script may have put it on a device meanwhile, or emptied it: then there is nothing to be read.
            sizes = [_word_bytes(each) if each.is_cpu and at else 0 for each, at in zip(self._tensors, addresses)]
            self._words = [(ctypes.c_char * n).from_address(at) for at, n in zip(addresses, sizes)]
            self._addresses = addresses
        versions = [version_of(each) for each in self._tensors]
        for at, whole in self._spread:
            versions[at] += version_of(whole)
        return versions, addresses, [each.raw for each in self._words]


class Look:
    """The tensors of these layers as they were at one instant."""

    def __init__(self, watched: Watched, number: int):
        """``number``: at how many records' instants they were looked at."""
        self._layers, self._watched = watched.layers, watched
        self._turn, self._whole = number, number < FIRST
        self._seen = watched.now()
        self._glimpses = self._glimpses_now()

    def _glimpses_now(self) -> dict[tuple[int, int], int | None]:
        """By layer and place in it."""
        numbers = list(self._layers)
        if numbers and not self._whole:
            numbers = [numbers[self._turn % len(numbers)]]
        return {
            (n, i): glimpse(e.tensor, self._whole, self._turn) for n in numbers for i, e in enumerate(self._layers[n].entries)
        }

    def moved(self) -> Moves:
        """What is not as it was; most often nothing."""
        seen_now, glimpses, found = self._watched.now(), self._glimpses_now(), Moves()
        if seen_now == self._seen and glimpses == self._glimpses:
            return found
        places = [(n, i, e.key) for n, layer in self._layers.items() for i, e in enumerate(layer.entries)]
        for (number, i, key), before, now in zip(places, zip(*self._seen), zip(*seen_now)):
            seen = glimpses.get((number, i)) != self._glimpses.get((number, i))
            if before != now or seen:
                found.layers.setdefault(number, []).append(key)
                found.kinds[number] = self._layers[number].kind
            if seen or (before[0] == now[0] and before != now):
                found.unseen.add(key)
        return found


def _word_bytes(tensor: torch.Tensor) -> int:
    """How many of the first bytes of a tensor can be read: only its first element's where there may be gaps behind that."""
    nbytes = tensor.nbytes if tensor.is_contiguous() else min(tensor.nbytes, tensor.element_size())
    return min(nbytes, _WORD)


class Looks:
    """The last look at the layers of each optimizer, and at those that no step updates."""

    def __init__(self, steppers: Sequence[Stepper]):
        self._steppers = steppers
        self._layout: Layout | None = None
        self._watched: dict[int, Watched] = {}
        self._looks: dict[int, Look] = {}
        self._number = 0  # how often all were looked at

    def forget(self) -> None:
        """The live tensors become others."""
        self._layout, self._watched, self._looks = None, {}, {}

    def there(self) -> bool:
        """Is there one of each?"""
        return bool(self._looks)

    def all(self, layout: Layout) -> None:
        """Look at all layers of this layout of full checkpoints."""
        if not layout.numbers_as(self._layout):
            self._layout, self._watched, self._looks = layout, self._parts(layout), {}
        for index in self._watched:
            self.at(index)
        self._number += 1

    def at(self, index: int) -> None:
        """Look at the layers of this optimizer, whose step has ended."""
        if (watched := self._watched.get(index)) is not None:
            self._looks[index] = Look(watched, self._number)

    def moved(self, indices: Iterable[int] | None = None) -> Moves:
        """What of the layers of these optimizers, or of all layers, is not as it was at the last look."""
        found = Moves()
        for index in list(self._looks) if indices is None else indices:
            if (look := self._looks.get(index)) is not None:
                found.add(look.moved())
        return found

    def nbytes(self, keys: Iterable[str]) -> int:
        """Bytes of these tensors."""
        wanted = set(keys)
        layers = [layer for watched in self._watched.values() for layer in watched.layers.values()]
        return sum(local(e.tensor).nbytes for layer in layers for e in layer.entries if e.key in wanted)

    def _parts(self, layout: Layout) -> dict[int, Watched]:
        """By optimizer, its layers and counts; and those of the others that are stored with each full checkpoint only."""
        owner = {number: i for i, stepper in enumerate(self._steppers) for number, _ in stepper.executor.arranged.handed_over}
        parts: dict[int, dict[int, EngineLayer]] = {}
        for number, layer in enumerate(layout.layers):
            if layer.kind in ("counts", "update", "frozen"):
                parts.setdefault(owner.get(number, _OTHERS), {})[number] = layer
        return {index: Watched(layers) for index, layers in parts.items()}
