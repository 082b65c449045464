"""Which checkpoints of a run are records of the journal: each builds on the one before it, and where that is in doubt comes a
full one.

A record has the steps that were made since the one before it, one of each optimizer at most. What changed outside of them is no
function of gradients. So the tensors of every layer are looked at when a step has ended, before the next one, and when the record
closes: a layer that was changed in between is stored whole in the next record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxckpt.compat.cuda import Devices
from fxckpt.compat.optimizers import plain_class
from fxckpt.compat.spread import box_of
from fxckpt.engine import Engine, Sources, Streams
from fxckpt.errors import FxckptError, StateError
from fxckpt.journal.digests import Digester, digest, watched_tensors
from fxckpt.journal.layout import layer_label, record_layout
from fxckpt.journal.length import Trial, choose, describe
from fxckpt.journal.looks import Looks, Moves
from fxckpt.journal.machine import Where, adds_up, machine
from fxckpt.journal.made import Made
from fxckpt.journal.repeatable import WAY_OUT, why_not, why_not_now, why_not_there
from fxckpt.journal.shown import Later, Shown
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.landing import Landing, Link, Waiting
from fxckpt.saving.plan import Layout
from fxckpt.store.record import CUDA

log: logging.Logger = logging.getLogger("fxckpt")

_LAYOUTS = 8  # that are kept: they differ in which gradients there are, and in what changed outside

_PATIENCE = 3  # checkpoints in a row that could not be records, before somebody is told
_DISAGREED = 3  # times that ranks did not agree whether a step is a record, with none between, before there is no journal


@dataclass(frozen=True)
class _Before:
    """Where a chain stood before its last checkpoint was taken, and what that had: should it be replaced by another one of the
    same boundary, that one has it."""

    taken: InFlight
    base: Landing | None
    tail: list[Landing]
    number: int
    key: object
    made: list[Made]
    moves: Moves


class Chain:
    """The last checkpoint of a run with the records behind it. ``steps``: from one checkpoint to the next; 1: no journal.
    ``trial``: they are to be chosen, and so many until then. ``together``: how many ranks write the store. Each of these decides
    by itself, and all alike: where one does not, that step is in no checkpoint, and the next one is a full one on all."""

    def __init__(
        self,
        steps: int,
        update: str | None,
        steppers: Sequence[Stepper],
        engine: Engine | None,
        changed_outside: set[str],
        make_sources: Callable[[Sequence[torch.Tensor]], Sources | None],
        devices: Devices,
        later: Later,
        trial: Trial | None = None,
        together: int = 1,
    ):
        self.steps: int = steps
        self._together = together
        self.trial: Trial | None = trial
        self._update, self._steppers, self._engine = update, steppers, engine
        self._changed_outside, self._make_sources = changed_outside, make_sources
        self._base: Landing | None = None  # None: the next one is a full one
        self._tail: list[Landing] = []  # the base and records that may not have ended, the last one at the end
        self._number = 0  # of the last record on its base
        self._key: object = None  # what the base was bound to
        self._begun = self._ended = 0  # steps that were made
        self._made: list[Made] = []  # since the last one was taken
        self._moves = Moves()  # of what changed outside of them
        self._why: str | None = None  # why these are in no record
        self._unfit = False  # nor are they, for a reason that a full one tells
        self._before: _Before | None = None
        self._looks = Looks(steppers)
        self._records = 0
        self._layouts: dict[Any, Layout] = {}
        self._sums = adds_up(plain_class(each.opt).__name__ for each in steppers)
        self._where = Where(steppers, devices)
        self._shown = Shown(steppers, update, later, devices.is_on_one)
        self._digester = None if engine is None else Digester(engine, make_sources)
        self._said: set[str] = set()
        self._refused = 0  # checkpoints in a row that could not be records
        self._off: str | None = None
        self._under_way: list[tuple[Landing, bool]] = []  # that may not have ended, and which of them are records
        self._disagreed = 0  # see ``_DISAGREED``

    def start(self) -> None:
        """Say at once what will not be journalled."""
        if self.steps > 1:
            off = why_not(self._steppers, self._where.given(), self._together)
            if self.trial is not None and self._together > 1:
                off = 'journal="auto" goes by what each rank measures, and all need the same number'
            if off is not None:
                self._turn_off(off)

    @property
    def length(self) -> int:
        """Steps from one full checkpoint to the next."""
        return self.steps if self._off is None else 1

    def _turn_off(self, why: str) -> None:
        """Each step is a full checkpoint from here on."""
        self._off, self.trial = why, None
        self._say(why)

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.warning("fxckpt: no journal: %s; %s", why, WAY_OUT)

    def stop(self) -> None:
        """The live tensors become others: the next one is a full one."""
        self._base, self._before, self._layouts = None, None, {}
        self._made, self._moves = [], Moves()
        self._looks.forget()
        self._shown.forget()
        if self._digester is not None:
            self._digester.forget()

    # -- steps -------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """A step begins. If it does not end, or goes another way than ours, nobody knows what it did."""
        self._begun += 1

    def begins(self, stepper: Stepper, refused: str | None, taken: bool) -> None:
        """Its update is about to run. ``refused``: why it cannot be in a record; ``taken``: a checkpoint is taken with it."""
        if self.length < 2:
            return
        self._take_back()
        gradients, index = stepper.gradients(), self._steppers.index(stepper)
        why = self._why or refused or why_not_now(stepper, gradients, self._together) or self._why_not_with(index)
        why = why or why_not_there(self._steppers, self._where.now(), self._together)
        if why is None and (device := self._where.device()) is not None:
            self._shown.begins(index, gradients, device)
            if self._shown.refused is not None:
                self._turn_off(self._shown.refused)
                return
        if why is not None or self._base is None:
            self._why, self._made = why, []  # nothing needs their gradients
            return
        if not taken:
            self._moves.add(self._looks.moved([index]))
        copied = () if taken else self._changed_outside if self._where.device() is None else None
        try:
            self._made.append(Made(index, stepper, gradients, copied, self._records))
        except StateError:  # a setting of a group that cannot be stored: the full one fails of it, and says so
            self._unfit = True

    def updated(self) -> None:
        """The update has run."""
        self._shown.updated()

    def _why_not_with(self, index: int) -> str | None:
        """Why a step of this optimizer cannot be in one record with those that were made."""
        if any(each.index == index for each in self._made):
            return f"{type(self._steppers[index].opt).__name__} makes several steps from one checkpoint to the next"
        if self._made and self._made[0].threads != torch.get_num_threads():
            return "the number of PyTorch's threads changes between the steps of two optimizers"
        return None

    def ends(self, stepper: Stepper) -> None:
        """Its update has run, and no checkpoint was taken with it."""
        if self.length > 1:
            self._ended += 1
            self._looks.at(self._steppers.index(stepper))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def next(self, full: Layout, stepper: Stepper | None) -> tuple[Layout, Link] | None:
        """The layout and link of a record of the steps that were made, that of ``stepper`` being about to update; None where a
        full checkpoint is due."""
        if self.length < 2 or self._do_not_agree():
            return None
        self._take_back()
        self._refused = 0 if self._why is None else self._refused + 1
        if self._why is not None and self._refused >= _PATIENCE:
            self._say(self._why)
        if self._why is not None or self._unfit or not self._may_go_on(full, stepper) or not self._as_they_were(stepper):
            return None
        self._moves.add(self._looks.moved())
        self._changed_outside |= self._moves.unseen
        if self._moves.of("counts") or self._moves.of("frozen"):  # these are copied with the buffers from now on
            self._changed_outside |= set(self._moves.of("frozen"))
            return None
        outside = {i for i, each in enumerate(full.layers) if {e.key for e in each.entries} & self._changed_outside}
        whole = {number for number in {*self._moves.layers, *outside} if full.layers[number].kind == "update"}
        layout = self._layout(full, frozenset(whole), frozenset[str]().union(*(each.present for each in self._made)))
        return layout, self._link(full, layout, stepper)

    def _do_not_agree(self) -> bool:
        """Is there no journal any more, since the ranks take other steps for records, again and again?"""
        for landing, is_record in self._under_way:
            if landing.unlike:
                self._disagreed += 1
            elif is_record and landing.generation is not None:
                self._disagreed = 0
        self._under_way = [each for each in self._under_way if each[0].generation is None and not each[0].failed]
        if self._disagreed < _DISAGREED:
            return False
        self._turn_off("the ranks do not agree on which steps can be records of it")
        return True

    def _may_go_on(self, full: Layout, stepper: Stepper | None) -> bool:
        """Is there an unbroken chain up to the step before these, and room for one record more?"""
        self._tail = [each for each in self._tail if each.generation is None or each is self._tail[-1]]
        whole = self._base is not None and not self._base.failed and not any(each.failed for each in self._tail)
        ended = self._ended + (stepper is not None) == self._begun
        return whole and ended and self._key == self._bound(full) and self._looks.there() and self._number + 1 < self.steps

    def _as_they_were(self, stepper: Stepper | None) -> bool:
        """Are the gradients of the other steps what these were given? Those that are not are copied in memory from now on."""
        others = [each for each in self._made if stepper is None or self._steppers[each.index] is not stepper]
        changed = set[str]().union(*(each.changed() for each in others))
        self._changed_outside |= changed
        return not changed

    def _bound(self, full: Layout) -> object:
        """Changes with the tensors that a checkpoint has. Another one in a frozen one's place was never looked at. (The last look
        keeps those alive that it saw, so none of a new one's identity was one of these.)"""
        fixed = tuple(
            (layer.name, layer.kind, tuple((e.key, layer.kind == "frozen" and id(e.tensor)) for e in layer.entries))
            for layer in full.layers
            if layer.kind in ("update", "frozen")
        )
        return tuple(s.bindings.number for s in self._steppers), fixed

    def _layout(self, full: Layout, whole: frozenset[int], present: frozenset[str]) -> Layout:
        """Made once for the same gradients and changes."""
        key = id(full), whole, present
        found = self._layouts.get(key)
        if found is None or found.full is not full:
            assert self._engine is not None
            found = record_layout(self._engine, full, self._steppers, whole, present, self._make_sources)
            kept = _LAYOUTS + self._together  # of each rank whose part is checksummed as well there is one
            self._layouts = {**dict(list(self._layouts.items())[1 - kept :]), key: found}
        return found

    def _link(self, full: Layout, layout: Layout, stepper: Stepper | None) -> Link:
        """What the record says beside its bytes."""
        assert self._base is not None
        number, made = self._number + 1, self._made
        threads = made[0].threads if made else torch.get_num_threads()
        groups, order = [each.groups for each in made], tuple(each.index for each in made)
        device = self._where.device()
        made_by = machine(self._sums, device)
        link = Link(self._base, self._tail[-1], number, self._update, groups, made_by, threads, order)
        if device is not None:
            link.device, link.refused = CUDA, self._shown.wait
        for each in made:
            link.strides |= each.strides
            link.tensors |= each.tensors
        updated = layout.number("gradients")
        if updated:
            chosen = updated[number % len(updated)]
            link.watched = chosen, self._label(full, chosen)
        of = {each.index: each for each in made}
        for index, other in enumerate(self._steppers):
            if other is not stepper:
                mine = (n for n in other.executor.arranged.numbers if layout.layers[n].kind == "gradients")
                link.waiting |= {n: of[index].waiting(n) if index in of else Waiting([]) for n in mine}
        return link

    def _label(self, full: Layout, number: int) -> str:
        """What a digest calls this layer."""
        [owner] = [i for i, each in enumerate(self._steppers) if number in each.executor.arranged.numbers]
        boxes = {e.key: box_of(e.tensor) for e in full.layers[number].entries if e.key == e.owner}
        parts = {key: (box.offset, box.shape) for key, box in boxes.items() if box is not None and not box.is_whole}
        return layer_label(owner, full.layers[number].name, parts)

    def taken(self, pending: InFlight | None, full: Layout | None, to_close: bool) -> None:
        """The step has ended, or everything was handed over at a boundary: ``pending`` is what was taken, None if nothing could
        be. ``to_close``: more steps may come before it closes, and then another one replaces it."""
        if self.length < 2:
            return
        if pending is None or full is None:
            self.stop()
            return
        before = _Before(pending, self._base, [*self._tail], self._number, self._key, self._made, self._moves)
        self._before = before if to_close else None
        if pending.link is None:
            self._base, self._number, self._tail, self._key = pending.landing, 0, [], self._bound(full)
        else:
            self._number, self._records = pending.link.number, self._records + 1
        self._tail.append(pending.landing)
        if self._together > 1:
            self._under_way.append((pending.landing, pending.link is not None))
        self._made, self._moves, self._why, self._unfit = [], Moves(), None, False
        self._try(pending)
        self._looks.all(full)
        self._ended = self._begun

    def _take_back(self) -> None:
        """If the last one was replaced before it closed, what it had is for the next one."""
        before, self._before = self._before, None
        if before is None:
            return
        if not before.taken.replaced:
            self._before = before
            return
        self._base, self._tail, self._number, self._key = before.base, before.tail, before.number, before.key
        before.moves.add(self._moves)
        self._made, self._moves = [*before.made, *self._made], before.moves

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
        if pending.link is not None and (moves := self._looks.moved()).layers:
            kinds = dict(enumerate(layer.kind for layer in pending.layout.layers))
            keys = [key for number, found in moves.layers.items() for key in found if kinds.get(number) != "update"]
            if changed := [key for key in keys if key not in (pending.guard.in_forward or ())]:
                raise pending.guard.changed(changed, self._looks.nbytes(changed))
        if self._before is not None and self._before.taken is pending:
            self._before = None  # it closes, and nothing replaces it

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
