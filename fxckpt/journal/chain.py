"""Which checkpoints of a run are records of the journal: each builds on the one before it, and where that is in doubt comes a
full one.

A record has the steps that were made since the one before it, one of each optimizer at most. What changed outside of them is no
function of gradients. So the tensors of every layer are looked at when a step has ended, before the next one, and when the record
closes: a layer that was changed in between is stored whole in the next record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fxckpt.compat.cuda import Devices
from fxckpt.engine import Engine, Sources, Streams
from fxckpt.errors import StateError
from fxckpt.journal.length import Trial
from fxckpt.journal.links import Links
from fxckpt.journal.looks import Looks, Moves
from fxckpt.journal.machine import Where
from fxckpt.journal.made import Made
from fxckpt.journal.shown import Later, Shown
from fxckpt.journal.whether import Whether
from fxckpt.optim.stepper import Stepper
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.landing import Landing, Link
from fxckpt.saving.plan import Layout


@dataclass
class _Row:
    """A full checkpoint and the records behind it, and what was done since the last of these."""

    base: Landing | None = None  # None: the next one is a full one
    tail: list[Landing] = field(default_factory=list)  # the base and records that may not have ended, the last one at the end
    number: int = 0  # of the last record on its base
    key: object = None  # what the base was bound to
    made: list[Made] = field(default_factory=list)  # steps since the last one was taken
    moves: Moves = field(default_factory=Moves)  # what changed outside of them


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
        self._steppers, self._changed_outside = steppers, changed_outside
        self._row = _Row()
        self._before: tuple[InFlight, _Row] | None = None  # see ``_take_back``
        self._begun = self._ended = 0  # steps that were made
        self._why: str | None = None  # why those since the last one was taken are in no record
        self._unfit = False  # nor are they, for a reason that a full one tells
        self._records = 0
        self._looks = Looks(steppers)
        self._where = Where(steppers, devices)
        self._shown = Shown(steppers, update, later, devices.is_on_one)
        self._links = Links(update, steppers, engine, make_sources, together)
        self.whether: Whether = Whether(steps, steppers, self._where, self._shown, trial, together)

    def stop(self) -> None:
        """The live tensors become others: the next one is a full one."""
        self._row, self._before = replace(self._row, base=None, made=[], moves=Moves()), None
        self._looks.forget()
        self._shown.forget()
        self._links.forget()

    # -- steps -------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """A step begins. If it does not end, or goes another way than ours, nobody knows what it did."""
        self._begun += 1

    def begins(self, stepper: Stepper, refused: str | None, taken: bool) -> None:
        """Its update is about to run. ``refused``: why it cannot be in a record; ``taken``: a checkpoint is taken with it."""
        if self.whether.length < 2:
            return
        self._take_back()
        row, gradients, index = self._row, stepper.gradients(), self._steppers.index(stepper)
        why = self._why or refused or self._why_not_with(index) or self.whether.why_not(index, gradients)
        if self.whether.length < 2:
            return
        if why is not None or row.base is None:
            self._why, row.made = why, []  # nothing needs their gradients
            return
        if not taken:
            row.moves.add(self._looks.moved([index]))
        copied = () if taken else self._changed_outside if self._where.device() is None else None
        try:
            row.made.append(Made(index, stepper, gradients, copied, self._records))
        except StateError:  # a setting of a group that cannot be stored: the full one fails of it, and says so
            self._unfit = True

    def updated(self) -> None:
        """The update has run."""
        self._shown.updated()

    def _why_not_with(self, index: int) -> str | None:
        """Why a step of this optimizer cannot be in one record with those that were made."""
        made = self._row.made
        if any(each.index == index for each in made):
            return f"{type(self._steppers[index].opt).__name__} makes several steps from one checkpoint to the next"
        if made and made[0].threads != torch.get_num_threads():
            return "the number of PyTorch's threads changes between the steps of two optimizers"
        return None

    def ends(self, stepper: Stepper) -> None:
        """Its update has run, and no checkpoint was taken with it."""
        if self.whether.length > 1:
            self._ended += 1
            self._looks.at(self._steppers.index(stepper))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def next(self, full: Layout, stepper: Stepper | None) -> tuple[Layout, Link] | None:
        """The layout and link of a record of the steps that were made, that of ``stepper`` being about to update; None where a
        full checkpoint is due."""
        if self.whether.length < 2 or self.whether.disagreed():
            return None
        self._take_back()
        self.whether.refused(self._why)
        if self._why is not None or self._unfit or not self._may_go_on(full, stepper) or not self._as_they_were(stepper):
            return None
        row = self._row
        row.moves.add(self._looks.moved())
        self._changed_outside |= row.moves.unseen
        if row.moves.of("counts") or row.moves.of("frozen"):  # these are copied with the buffers from now on
            self._changed_outside |= set(row.moves.of("frozen"))
            return None
        outside = {i for i, each in enumerate(full.layers) if {e.key for e in each.entries} & self._changed_outside}
        whole = {number for number in {*row.moves.layers, *outside} if full.layers[number].kind == "update"}
        layout = self._links.layout(full, frozenset(whole), frozenset[str]().union(*(each.present for each in row.made)))
        assert row.base is not None
        link = self._links.make(layout, row.base, row.tail[-1], row.number + 1, row.made, self._where.device())
        if link.device is not None:
            link.refused = self._shown.wait
        self._links.wait_for(link, layout, row.made, stepper)
        return layout, link

    def _may_go_on(self, full: Layout, stepper: Stepper | None) -> bool:
        """Is there an unbroken chain up to the step before these, and room for one record more?"""
        row = self._row
        row.tail = [each for each in row.tail if each.generation is None or each is row.tail[-1]]
        whole = row.base is not None and not row.base.failed and not any(each.failed for each in row.tail)
        ended = self._ended + (stepper is not None) == self._begun
        room = row.number + 1 < self.whether.steps
        return whole and ended and row.key == self._bound(full) and self._looks.there() and room

    def _as_they_were(self, stepper: Stepper | None) -> bool:
        """Are the gradients of the other steps what these were given? Those that are not are copied in memory from now on."""
        others = [each for each in self._row.made if stepper is None or self._steppers[each.index] is not stepper]
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

    def taken(self, pending: InFlight | None, full: Layout | None, to_close: bool) -> None:
        """The step has ended, or everything was handed over at a boundary: ``pending`` is what was taken, None if nothing could
        be. ``to_close``: more steps may come before it closes, and then another one replaces it."""
        if self.whether.length < 2:
            return
        if pending is None or full is None:
            self.stop()
            return
        row = self._row
        self._before = (pending, replace(row, tail=[*row.tail])) if to_close else None
        if pending.link is None:
            self._row = _Row(pending.landing, [], 0, self._bound(full))
        else:
            self._row = _Row(row.base, row.tail, pending.link.number, row.key)
            self._records += 1
        self._row.tail.append(pending.landing)
        self._why, self._unfit = None, False
        self.whether.taken(pending)
        self._looks.all(full)
        self._ended = self._begun

    def _take_back(self) -> None:
        """If the last one was replaced by another one of the same boundary, before it closed, that one has what it had."""
        if self._before is None:
            return
        (taken, before), self._before = self._before, None
        if not taken.replaced:
            self._before = taken, before
            return
        before.moves.add(self._row.moves)
        self._row = replace(before, made=[*before.made, *self._row.made])

    def check_closed(self, pending: InFlight) -> None:
        """Raises Changed if a layer of which this record has gradients was changed since its step ended: the record is of the
        instant at which it closes. What a forward changes is of the next step."""
        if pending.link is not None and (moves := self._looks.moved()).layers:
            kinds = dict(enumerate(layer.kind for layer in pending.layout.layers))
            keys = [key for number, found in moves.layers.items() for key in found if kinds.get(number) != "update"]
            if changed := [key for key in keys if key not in (pending.guard.in_forward or ())]:
                raise pending.guard.changed(changed, self._looks.nbytes(changed))
        if self._before is not None and self._before[0] is pending:
            self._before = None  # it closes, and nothing replaces it

    def digest(self, pending: InFlight, layer: int, streams: Callable[[], Streams]) -> None:
        """This layer was updated: note how it looks, if it is this record's turn. What lies on a device is not waited for."""
        self._links.digest(pending, layer, streams)
