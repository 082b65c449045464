"""CRC-32C of a layer as a step left it: what a step that is made again is compared with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

import torch

from fxckpt.engine import Engine, Sources, Streams, crc32c
from fxckpt.saving.digesting import Digesting, DigestPlan
from fxckpt.saving.inventory import storable
from fxckpt.saving.plan import Entry, Layout


def digest(tensors: Iterable[torch.Tensor]) -> int:
    """Of tensors, one after the other, each in row-major order. What lies on a device is waited for."""
    crc = 0
    for tensor in tensors:
        row_major = storable(tensor).contiguous().cpu()
        if row_major.numel():
            crc = crc32c((ctypes.c_char * row_major.nbytes).from_address(row_major.data_ptr()), crc)
    return crc


def watched_tensors(full: Layout, number: int) -> list[torch.Tensor]:
    """A layer's tensors in the order of a checkpoint's record: parameters and states, then their counts. Where several ranks
    write it, by their files and keys."""
    found = [*full.layers[number].entries, *_counts(full, number)]
    if full.share is not None:
        found.sort(key=lambda e: (e.key != e.owner, e.key))
    return [e.tensor for e in found]


def _counts(full: Layout, number: int) -> list[Entry]:
    owners = [e.owner for e in full.layers[number].entries if e.key == e.owner]
    counts = [e for each in full.layers if each.kind == "counts" for e in each.entries]
    return [e for name in owners for e in counts if e.owner == name]


class Digester:
    """Digests layers on a device, each by a plan that is made once for a layout."""

    def __init__(self, engine: Engine, make_sources: Callable[[Sequence[torch.Tensor]], Sources | None]):
        self._engine, self._make_sources = engine, make_sources
        self._full: Layout | None = None
        self._plans: dict[int, DigestPlan] = {}

    def forget(self) -> None:
        """The live tensors become others."""
        self._full, self._plans = None, {}

    def begin(self, full: Layout, number: int, streams: Streams) -> Digesting:
        """Have this layer digested as it is after what is in these streams now. Raises SaveFailed, Cancelled.

        Its fence comes before its next update, but behind that of the counts, and a device copies whole ranges only: counts, and
        what is not in row-major order, are copied in memory first, in the order of the stream.
        """
        if self._full is not full:
            self._full, self._plans = full, {}
        live, counts = [e.tensor for e in full.layers[number].entries], [e.tensor for e in _counts(full, number)]
        stored = [storable(each) for each in [*live, *counts]]
        if number not in self._plans:
            self._plans[number] = DigestPlan(self._engine, number, [(each.nbytes, each.element_size()) for each in stored])
        read = [t if t.is_contiguous() and i < len(live) else _copy(t) for i, t in enumerate(stored)]
        sources = self._make_sources(read)
        assert sources is not None  # all are contiguous
        return Digesting(self._plans[number], sources, streams, live, read)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
