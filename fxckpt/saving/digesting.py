"""The digest of a layer on a device: the copy engine brings its bytes, and the step that updated it waits for nothing.

Its copies are those of a small checkpoint of their own, which nobody writes, in which the layer has its number: events, staging
and the fence before its next update are those of any other copy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from fxckpt.compat.tensors import version_of
from fxckpt.engine import Checkpoint, Engine, Plan, Sources, Streams, crc32c, crc32c_joined
from fxckpt.store.layout import BLOCK


class DigestPlan:
    """Where a layer's tensors lie in what is checksummed: one behind the other, up to its end; zeros are before them.

    ``number``: the layer's; ``sizes``: bytes, and bytes of an element, of each tensor.
    """

    def __init__(self, engine: Engine, number: int, sizes: Sequence[tuple[int, int]]):
        self.number: int = number
        self._engine = engine
        self._nbytes = sum(nbytes for nbytes, _ in sizes)
        self._before = at = -self._nbytes % BLOCK
        placed = []
        for nbytes, itemsize in sizes:
            placed.append((number, 0, at, nbytes, itemsize))
            at += nbytes
        self._plan: Plan = engine.plan([(at, b"")], placed, number + 1)
        self._nothing = Sources([])

    def begin(self, sources: Sources, streams: Streams) -> Checkpoint:
        """Have the layer copied as it is after what is in these streams now. Raises SaveFailed, Cancelled."""
        begun = self._engine.begin(self._plan, "", [""])
        for number in range(self.number):
            begun.emit(number, self._nothing)
        begun.emit(self.number, sources, streams)
        return begun

    def crc(self, begun: Checkpoint) -> int:
        """CRC-32C of the tensors alone, once all is copied."""
        found, left = 0, self._before + self._nbytes
        for crc in begun.crcs(0):
            found = crc32c_joined(found, crc, min(self._plan.sum_bytes, left))
            left -= self._plan.sum_bytes
        return crc32c_joined(crc32c(bytes(self._before)), found, self._nbytes)


class Digesting:
    """One layer under way. ``tensors`` are read where they lie, until a fence on the layer; ``copies``, made for this, live here.

    What somebody changes outside of ``opt.step()`` meanwhile is not what the step left, and then there is no digest.
    """

    def __init__(self, plan: DigestPlan, sources: Sources, streams: Streams, tensors: Sequence[torch.Tensor], copies: object):
        """Raises SaveFailed, Cancelled."""
        self.number: int = plan.number
        self._plan, self._copies = plan, copies
        self._seen = [(tensor, version_of(tensor)) for tensor in tensors]
        self._same: bool | None = None  # None: nobody had to look so far
        self._looking = threading.Lock()
        self._begun = plan.begin(sources, streams)

    def let_go(self) -> None:
        """A step is about to wait for these copies and to change the layer then."""
        with self._looking:
            self._look()

    def _look(self) -> bool:
        """Was the layer left alone until now, or until the next step came?"""
        if self._same is None:
            self._same = all(version_of(tensor) == version for tensor, version in self._seen)
            self._seen = []
        return self._same

    def copied(self, timeout: float) -> bool:
        """Wait until all of it has come; False after ``timeout`` seconds. Raises SaveFailed, Cancelled."""
        return self._begun.durable(timeout)

    def result(self) -> int | None:
        """The digest of what was ``copied``; None where the layer was changed meanwhile."""
        with self._looking:
            same = self._look()
        return self._plan.crc(self._begun) if same else None

    def cancel(self) -> None:
        """Nobody wants it any more: no thread reads the layer when this returns."""
        self._begun.cancel()

    def release(self) -> None:
        """Free the engine's side."""
        self._begun.release()
        self._copies = None
