"""Which checkpoints of a run are records of the journal: each builds on the one before it, and where that is in doubt comes a
full one.

What changed outside ``opt.step()`` is no function of gradients. So the tensors of every layer are looked at when a step has
ended, when it closes and before the next one: a layer that was changed in between is stored whole in the record of the next step.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxckpt.compat.tensors import version_of
from fxckpt.engine import Engine, Sources
from fxckpt.errors import StateError
from fxckpt.journal.digests import digest
from fxckpt.journal.layout import record_layout
from fxckpt.journal.length import Trial, choose, describe
from fxckpt.journal.repeatable import WAY_OUT, why_not, why_not_now
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.guard import glimpse
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.landing import Landing, Link
from fxckpt.saving.plan import Layout
from fxckpt.store.typed_json import encode_state

log: logging.Logger = logging.getLogger("fxckpt")

_FIRST = 3
"""Steps behind which all elements are looked at: what writes past version counters does so from the first turn on. Behind later
ones it is a few elements of one layer in turn, and of each tensor the first ones and where it lies."""

_WORD = 16  # bytes of each tensor

_LAYOUTS = 8  # that are kept: they differ in which gradients there are, and in what changed outside

_PATIENCE = 3  # steps in a row that could not be journalled, before somebody is told

Gradients = Sequence[torch.Tensor | None]


def machine() -> str:
    """What makes a step: the same steps made elsewhere may have other bits, and whoever compares them says so."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


class Watched:
    """Which tensors of a layout are looked at: its layers of parameters and state, by the engine's number; found once."""

    def __init__(self, layout: Layout):
        self.layout: Layout = layout
        self.layers = {i: layer for i, layer in enumerate(layout.layers) if layer.kind in ("counts", "update", "frozen")}
        self.tensors = [(e.tensor, _word_bytes(e.tensor)) for layer in self.layers.values() for e in layer.entries]


class Look:
    """The tensors of a run's layers as a step left them."""

    def __init__(self, watched: Watched, number: int):
        """``number``: how many such looks there were."""
        self._layers, self._tensors = watched.layers, watched.tensors
        self._turn, self._whole = number, number < _FIRST
        self._versions = self._versions_now()
        self._glimpses = self._glimpses_now()

    def _versions_now(self) -> list[tuple[int, int, bytes]]:
        """Of each tensor its version, its address, and a few bytes of it: what takes no time to look at."""
        # A script may have put it on a device meanwhile, or emptied it: then there is nothing to be read.
        places = [(each, each.data_ptr() if each.is_cpu else 0, nbytes) for each, nbytes in self._tensors]
        return [(version_of(each), at, ctypes.string_at(at, nbytes) if at else b"") for each, at, nbytes in places]

    def _glimpses_now(self) -> dict[tuple[int, int], int | None]:
        """By layer and place in it."""
        numbers = list(self._layers) if self._whole else [list(self._layers)[self._turn % len(self._layers)]]
        return {
            (n, i): glimpse(e.tensor, self._whole, self._turn) for n in numbers for i, e in enumerate(self._layers[n].entries)
        }

    def moved(self) -> dict[int, list[str]]:
        """The keys of what is not as it was, by layer; most often nothing."""
        versions, glimpses = self._versions_now(), self._glimpses_now()
        if versions == self._versions and glimpses == self._glimpses:
            return {}
        found: dict[int, list[str]] = {}
        at = 0
        for number, layer in self._layers.items():
            for i, entry in enumerate(layer.entries):
                place = number, i
                if versions[at] != self._versions[at] or glimpses.get(place) != self._glimpses.get(place):
                    found.setdefault(number, []).append(entry.key)
                at += 1
        return found

    def unseen(self) -> set[str]:
        """The keys of what changed though its version did not."""
        glimpses, places = self._glimpses_now(), [(n, i) for n, layer in self._layers.items() for i in range(len(layer.entries))]
        moved = {place for place, value in glimpses.items() if value != self._glimpses[place]}
        both = zip(places, self._versions, self._versions_now())
        moved |= {place for place, before, now in both if before[0] == now[0] and before != now}
        return {self._layers[n].entries[i].key for n, i in moved}

    def nbytes(self, keys: Sequence[str]) -> int:
        """Bytes of these tensors."""
        return sum(e.tensor.nbytes for layer in self._layers.values() for e in layer.entries if e.key in keys)


def _word_bytes(tensor: torch.Tensor) -> int:
    """How many of the first bytes of a tensor can be read: only its first element's where there may be gaps behind that."""
    nbytes = tensor.nbytes if tensor.is_contiguous() else min(tensor.nbytes, tensor.element_size())
    return min(nbytes, _WORD)


class Chain:
    """The last checkpoint of a run with the records behind it. ``steps``: from one checkpoint to the next; 1: no journal.
    ``trial``: they are to be chosen, and so many until then."""

    def __init__(
        self,
        steps: int,
        update: str | None,
        steppers: Sequence[Stepper],
        engine: Engine | None,
        changed_outside: set[str],
        make_sources: Callable[[Sequence[torch.Tensor]], Sources | None],
        trial: Trial | None = None,
    ):
        self.steps: int = steps
        self.trial: Trial | None = trial
        self._update, self._steppers, self._engine = update, steppers, engine
        self._changed_outside, self._make_sources = changed_outside, make_sources
        self._base: Landing | None = None  # None: the next one is a full one
        self._tail: list[Landing] = []  # the base and records that may not have ended, the last one at the end
        self._number = 0  # of the last record on its base
        self._key: object = None  # what the base was bound to
        self._updates = 0  # steps that were made
        self._looked_at = -1  # how many there were at the last look
        self._look: Look | None = None
        self._watched: Watched | None = None
        self._looks = 0
        self._layouts: dict[Any, Layout] = {}
        self._machine = machine()
        self._said: set[str] = set()
        self._refused = 0  # steps in a row that could not be journalled
        self._off: str | None = None

    def start(self, on_device: bool) -> None:
        """Say at once what will not be journalled."""
        if self.steps > 1:
            self._off = why_not(self._steppers, on_device)
            if self._off is not None:
                self.trial = None
                self._say(self._off)

    @property
    def length(self) -> int:
        """Steps from one full checkpoint to the next."""
        return self.steps if self._off is None else 1

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.warning("fxckpt: no journal: %s; %s", why, WAY_OUT)

    def advance(self) -> None:
        """A step begins: what was seen behind the one before it is of one step earlier."""
        self._updates += 1

    def stop(self) -> None:
        """The live tensors become others: the next one is a full one."""
        self._base, self._look, self._watched, self._layouts = None, None, None, {}

    def next(self, stepper: Stepper, refused: str | None, full: Layout, gradients: Gradients) -> tuple[Layout, Link] | None:
        """The layout and link of a record of the coming step; None where a full checkpoint is due. ``refused``: why this step
        cannot be one."""
        if self.steps < 2 or self._off is not None:
            return None
        why = refused or why_not_now(stepper, gradients)
        self._refused = 0 if why is None else self._refused + 1
        if why is not None and self._refused >= _PATIENCE:
            self._say(why)
        if why is not None or not self._may_go_on(full):
            return None
        assert self._look is not None and self._base is not None and self._engine is not None
        moved = self._look.moved()
        kinds = {full.layers[number].kind for number in moved}
        self._changed_outside |= self._look.unseen() if moved else set()
        if kinds - {"update"}:  # a count, or a frozen parameter, which is copied with the buffers from now on
            self._changed_outside |= {
                key for number, keys in moved.items() if full.layers[number].kind == "frozen" for key in keys
            }
            return None
        outside = {i for i, each in enumerate(full.layers) if {e.key for e in each.entries} & self._changed_outside}
        whole = frozenset(set(moved) | {number for number in outside if full.layers[number].kind == "update"})
        present = frozenset(m.index for m, g in zip(stepper.executor.arranged.members, gradients) if g is not None)
        layout = self._layout(full, stepper, whole, present)
        try:
            return layout, self._link(stepper, full, layout, gradients)
        except StateError:  # a setting of a group that cannot be stored: the full one fails of it, and says so
            return None

    def _may_go_on(self, full: Layout) -> bool:
        """Is there an unbroken chain up to the step before this one, and room for one record more?"""
        self._tail = [each for each in self._tail if each.generation is None or each is self._tail[-1]]
        whole = self._base is not None and not self._base.failed and not any(each.failed for each in self._tail)
        same = self._key == self._bound(full) and self._looked_at == self._updates - 1 and self._look is not None
        return whole and same and self._number + 1 < self.steps

    def _bound(self, full: Layout) -> object:
        """Changes with the tensors that a checkpoint has."""
        fixed = tuple(
            (layer.name, layer.kind, tuple(e.key for e in layer.entries)) for layer in full.layers if layer.kind == "update"
        )
        return tuple(s.bindings.number for s in self._steppers), fixed

    def _layout(self, full: Layout, stepper: Stepper, whole: frozenset[int], present: frozenset[int]) -> Layout:
        """Made once for the same gradients and changes."""
        key = id(full), whole, present
        found = self._layouts.get(key)
        if found is None or found.full is not full:
            assert self._engine is not None
            found = record_layout(self._engine, full, stepper, whole, present, self._make_sources)
            self._layouts = {**dict(list(self._layouts.items())[1 - _LAYOUTS :]), key: found}
        return found

    def _link(self, stepper: Stepper, full: Layout, layout: Layout, gradients: Gradients) -> Link:
        """What the record says beside its bytes, of the settings as the step finds them."""
        assert self._base is not None
        tensors: dict[str, Any] = {}
        groups = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in stepper.opt.param_groups]
        number, encoded = self._number + 1, encode_state([groups], tensors, "journal")
        both = zip(stepper.executor.arranged.members, gradients)
        strides = {m.name: list(g.stride()) for m, g in both if g is not None and g.stride() != m.param.stride()}
        made_by = self._machine, torch.get_num_threads()
        link = Link(self._base, self._tail[-1], number, self._update, encoded, strides, *made_by, tensors)
        updated = layout.number("gradients")
        if updated:
            chosen = updated[number % len(updated)]
            link.watched = chosen, full.layers[chosen].name, watched_tensors(full, chosen)
        return link

    def taken(self, pending: InFlight | None, full: Layout | None) -> None:
        """The step has ended, or everything was handed over at a boundary: ``pending`` is what was taken, None if nothing could
        be."""
        if self.steps < 2 or self._off is not None:
            return
        if pending is None or full is None:
            self.stop()
            return
        if pending.link is None:
            self._base, self._number, self._tail, self._key = pending.landing, 0, [], self._bound(full)
        else:
            self._number = pending.link.number
        self._tail.append(pending.landing)
        self._try(pending)
        if self._watched is None or self._watched.layout is not full:
            self._watched = Watched(full)
        self._look, self._looked_at = Look(self._watched, self._looks), self._updates
        self._looks += 1

    def _try(self, pending: InFlight) -> None:
        """Choose how many steps there are to be, once it can be known."""
        if self.trial is None:
            return
        self.trial.taken(pending.landing, pending.link is not None)
        if (found := self.trial.measured()) is not None:
            choice = choose(found, self.trial.restore_seconds)
            self.steps, self.trial = choice.steps, None
            log.info("fxckpt: %s", describe(found, choice))

    def check_closed(self, pending: InFlight) -> None:
        """Raises Changed if a layer of which this record has gradients was changed since its step ended: the record is of the
        instant at which it closes. What a forward changes is of the next step."""
        if pending.link is None or self._look is None or not (moved := self._look.moved()):
            return
        kinds = dict(enumerate(layer.kind for layer in pending.layout.layers))
        keys = [key for number, found in moved.items() for key in found if kinds.get(number) != "update"]
        if changed := [key for key in keys if key not in (pending.guard.in_forward or ())]:
            raise pending.guard.changed(changed, self._look.nbytes(changed))

    def digest(self, pending: InFlight, layer: int) -> None:
        """This layer was updated: note how it looks, if it is this record's turn."""
        link = pending.link
        if link is not None and link.watched is not None and link.watched[0] == layer:
            link.digests[link.watched[1]] = digest(link.watched[2])
            link.watched = None


def watched_tensors(full: Layout, number: int) -> list[torch.Tensor]:
    """A layer's tensors in the order of a checkpoint's record: parameters and states, then their counts."""
    layer = full.layers[number]
    owners = [e.owner for e in layer.entries if e.file == 0]
    counts = [e for each in full.layers if each.kind == "counts" for e in each.entries]
    return [e.tensor for e in layer.entries] + [e.tensor for name in owners for e in counts if e.owner == name]
