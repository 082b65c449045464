"""What a record of the journal is made of: its layout, which is kept for those alike, and what it says beside its bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxckpt.compat.optimizers import plain_class
from fxckpt.engine import Engine, Sources, Streams
from fxckpt.errors import FxckptError
from fxckpt.journal.digests import Digester, digest, watched_tensors
from fxckpt.journal.layout import layer_label, record_layout
from fxckpt.journal.machine import adds_up, machine
from fxckpt.journal.made import Made
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.inventory import stored_box
from fxckpt.saving.landing import Landing, Link, Waiting
from fxckpt.saving.plan import Layout
from fxckpt.store.record import CUDA

_LAYOUTS = 8  # that are kept: they differ in which gradients there are, and in what changed outside


class Links:
    """Makes them for the records of one run. ``together``: how many ranks write the store."""

    def __init__(
        self,
        update: str | None,
        steppers: Sequence[Stepper],
        engine: Engine | None,
        make_sources: Callable[[Sequence[torch.Tensor]], Sources | None],
        together: int,
    ):
        self._update, self._steppers, self._engine, self._make_sources = update, steppers, engine, make_sources
        self._kept = _LAYOUTS + together  # of each rank whose part is checksummed as well there is one
        self._layouts: dict[Any, Layout] = {}
        self._sums = adds_up(plain_class(each.opt).__name__ for each in steppers)
        self._digester = None if engine is None else Digester(engine, make_sources)

    def forget(self) -> None:
        """The live tensors become others."""
        self._layouts = {}
        if self._digester is not None:
            self._digester.forget()

    def layout(self, full: Layout, whole: frozenset[int], present: frozenset[str]) -> Layout:
        """Made once for the same gradients and changes."""
        key = id(full), whole, present
        found = self._layouts.get(key)
        if found is None or found.full is not full:
            assert self._engine is not None
            found = record_layout(self._engine, full, self._steppers, whole, present, self._make_sources)
            self._layouts = {**dict(list(self._layouts.items())[1 - self._kept :]), key: found}
        return found

    def make(self, layout: Layout, base: Landing, after: Landing, number: int, made: Sequence[Made], device: str | None) -> Link:
        """What the record with this number, of these steps, says beside its bytes. ``after``: the one before it."""
        threads = made[0].threads if made else torch.get_num_threads()
        groups, order = [each.groups for each in made], tuple(each.index for each in made)
        link = Link(base, after, number, self._update, groups, machine(self._sums, device), threads, order)
        if device is not None:
            link.device = CUDA
        for each in made:
            link.strides |= each.strides
            link.tensors |= each.tensors
        updated, full = layout.number("gradients"), layout.full
        if updated and full is not None:
            chosen = updated[number % len(updated)]
            link.watched = chosen, self._label(full, chosen)
        return link

    def wait_for(self, link: Link, layout: Layout, made: Sequence[Made], stepper: Stepper | None) -> None:
        """The gradients of all steps but that of ``stepper``, which is about to update, are handed over with the rest."""
        of = {each.index: each for each in made}
        for index, other in enumerate(self._steppers):
            if other is not stepper:
                mine = (n for n in other.executor.arranged.numbers if layout.layers[n].kind == "gradients")
                link.waiting |= {n: of[index].waiting(n) if index in of else Waiting([]) for n in mine}

    def _label(self, full: Layout, number: int) -> str:
        """What a digest calls this layer."""
        [owner] = [i for i, each in enumerate(self._steppers) if number in each.executor.arranged.numbers]
        boxes = {e.key: stored_box(e.tensor) for e in full.layers[number].entries if e.key == e.owner}
        parts = {key: (box.offset, box.shape) for key, box in boxes.items() if box is not None and not box.is_whole}
        return layer_label(owner, full.layers[number].name, parts)

    def digest(self, pending: InFlight, layer: int, streams: Callable[[], Streams]) -> None:
        """This layer was updated: note how it looks, if it is this record's turn. What lies on a device is not waited for."""
        link = pending.link
        if link is None or link.watched is None or link.watched[0] != layer or pending.given_up is not None:
            return
        (_, label), link.watched = link.watched, None
        full = pending.layout.full
        assert full is not None and self._digester is not None
        if link.device is None:
            link.digests[label] = digest(watched_tensors(full, layer))
            return
        try:
            link.digesting = label, self._digester.begin(full, layer, streams())
        except (FxckptError, OSError) as error:
            link.failure = error
