"""Updates inside the backward: which layers are armed, and what each op of a compiled backward does then.

A layer is *armed* for one backward only if nothing could tell the difference: its gradient is final where the op stands (the
passes say so), the region ran forward once since the last step and no other one holds its parameters, and the loop has not
touched a gradient between backward and ``opt.step()`` in the steps before (``Habit``). Armed or not, the same kernels run on the
same numbers, so nothing of this need be the same after a restart.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxckpt.compat.dynamo import untraced
from fxckpt.compat.placing import call_at_end_of_backward
from fxckpt.compat.tensors import backward_under_way
from fxckpt.errors import SetupError
from fxckpt.graph import ops
from fxckpt.graph.backward.region import Region
from fxckpt.graph.model.book import traces
from fxckpt.graph.model.layers import layer_name
from fxckpt.graph.step_graph import Standing
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.spent import SpentGradient
from fxckpt.optim.stepper import Stepper
from fxckpt.run.arming import ADDED_UP, against_all, against_at_step, against_now
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.begins import INSTEAD, Begins
from fxckpt.run.clock import RunStatus
from fxckpt.run.habit import NEEDED, Habit
from fxckpt.run.in_graph import InGraph
from fxckpt.run.regions import Seen, watched
from fxckpt.saving.inventory import trained_by

log: logging.Logger = logging.getLogger("fxckpt")

_PATIENCE = 5  # steps, before it is said that nothing is armed


class InBackward:
    """Decides at the beginning of each region's backward, and takes what its ops bring. ``open``: a step was begun in this
    backward, which ``opt.step()`` ends; ``complete``: the backward is.

    ``step`` holds this, and is to be a weak reference.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        status: RunStatus,
        layer: str | Callable[[str], str],
        step: Begins,
    ):
        self.open: bool = False
        self.complete: bool = False
        self.standing: Standing = Standing()  # see StepGraph.standing
        self.in_graph: InGraph = InGraph(arrangement, status, step, self.standing)
        self.number: int = arrangement.emitter.number
        self._arrangement, self._status, self._layer = arrangement, status, layer
        self._step = step
        self._habit = Habit()
        self._bound = -1  # the binding that the habit is of
        self._thread = threading.current_thread()
        self._ran: list[Seen] = []  # the regions whose forward ran since the last step
        self._task: int | None = None  # the backward under way, or the last one
        self._backwards = 0  # since the last step
        self._why_none: str | None = None  # why nothing is armed in this backward
        self._now: Seen | None = None  # the region whose backward is under way
        self._layer_of: list[int] = []  # by a parameter's index ...
        self._arranged: object = None  # ... in this arrangement
        self._armed: dict[int, int] = {}  # layers of the step that is open, and how many gradients each still lacks
        self._gradients: list[torch.Tensor | None] = []
        self._rest_is_gone: str | None = None  # why what a backward began cannot be ended any more, until another backward
        self._came: dict[int, None] = {}  # the layers of the last backward, in the order of their last gradients
        self._consumed: dict[int, BoundParam] = {}  # by index, of the step that is open
        self._spent: dict[int, SpentGradient] = {}
        self._steps = 0
        self._said: set[str] = set()
        for stepper in arrangement.steppers:
            stepper.executor.standing = self.standing
        traces.placers.add(self)

    @property
    def stepper(self) -> Stepper:
        """The only optimizer of the run, where anything is armed at all."""
        return self._arrangement.steppers[0]

    # ---- what the compiler asks ------------------------------------------------------------------------------------------

    def layer_of(self, names: dict[int, str], tensor: torch.Tensor) -> tuple[str, str] | None:
        """See ``graph.backward.region.LayerOf``."""
        if not any(tensor is p for p in trained_by(self._arrangement.optimizers)):
            return None
        name = names.get(id(tensor), "?")
        return name, layer_name(name, self._layer)

    def watched(self, region: Region, inner: Callable[..., Any]) -> Callable[..., Any]:
        """See ``Placer``."""
        return watched(region, inner, weakref.ref(self))

    def around(self, region: Region, inner: Callable[..., Any]) -> Callable[..., Any]:
        """See ``Placer``. What is compiled must not keep a run."""
        return self.in_graph.around(region, inner)

    # ---- what a region does ----------------------------------------------------------------------------------------------

    def watches(self) -> bool:
        """See ``Watcher``; the others below as well."""
        return self._status.enabled

    def forward_begins(self) -> None:
        """An update that was made in a backward is to be seen only behind the step."""
        if self.open and backward_under_way() is None:
            if self.complete:
                raise SetupError(
                    "a forward ran between backward() and opt.step(), when the backward had updated layers already: it would see "
                    f"parameters that no loop without updates in the backward shows. {INSTEAD}"
                )
            self.leave("the backward was left by an exception")

    def forward_ended(self, seen: Seen) -> None:
        """Its backward may come next."""
        if seen not in self._ran:
            self._ran.append(seen)

    def region_begins(self, seen: Seen) -> None:
        """The backward of a region begins: listen to its ops, and begin the step here if a layer of it is armed."""
        self._now = self._rest_is_gone = None
        ops.listen(None)
        if not self._status.active:
            return
        task = backward_under_way()
        if task != self._task:
            self._task, self._backwards = task, self._backwards + 1
            self._why_none, self._came = against_all(self._arrangement, self._thread, self._backwards), {}
            self._habit.backward_begins(self.stepper.opt.param_groups)
        seen.against = against_now(seen, self._ran) if self._bind(seen) else "its parameters are not those of the optimizer"
        if seen.against or (self.open and self._backwards > 1):
            return
        self._now = seen
        ops.listen(self._take)
        if not self.open and self._why_none is None and any(self._ready(m) for m in seen.members.values()):
            self._open()

    def region_ended(self, seen: Seen, gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...] | None:
        """Its gradients go on to autograd: none in place of one that was used up. Autograd must not touch those, for they have no
        memory; and whoever looks for ``param.grad`` finds what says so."""
        ops.listen(None)
        self._now = None
        if not self.open or not self._consumed:
            return None
        for member in seen.members.values():
            if member.index in self._consumed:
                member.param.grad = self._spent_of(member)
        return tuple(None if g is not None and _is_emptied(g) else g for g in gradients)

    def _take(self, gradients: Sequence[torch.Tensor], inputs: Sequence[int], token: str, layer: int) -> None:
        """An op: these gradients are final, and nobody reads their parameters any more."""
        seen = self._now
        if seen is None or token != seen.region.token:
            return
        for index, gradient in zip(inputs, gradients):
            member = seen.members[index]
            place = self._layer_of[member.index]
            self._came.pop(place, None)
            self._came[place] = None
            if not self.open or place not in self._armed:
                self._habit.note(member, place, gradient)
                continue
            self._gradients[member.index] = gradient
            self._armed[place] -= 1
            if not self._armed[place]:
                self._update(place)

    def _update(self, place: int) -> None:
        """All gradients of an armed layer are there."""
        used = self.stepper.executor.use_up(place, self._gradients)
        self._consumed.update((member.index, member) for member in used)
        del self._armed[place]

    # ---- what decides ----------------------------------------------------------------------------------------------------

    def _bind(self, seen: Seen) -> bool:
        """Which parameters of the optimizer the region's are; False if they are not bound now."""
        bindings, arranged = self.stepper.bindings, self.stepper.executor.arranged
        if self._arranged is not arranged:
            self._bound, self._arranged, self._spent = bindings.number, arranged, {}
            self._habit.bind(len(arranged.owned))
            self._layer_of = [0] * len(bindings.members)
            for place, owned in enumerate(arranged.owned):
                for member in owned:
                    self._layer_of[member.index] = place
        if seen.bound != bindings.number:
            by_id = {id(m.param): m for m in bindings.members}
            found = zip(seen.at, map(by_id.get, seen.region.ids))
            seen.members, seen.bound = {index: m for index, m in found if m is not None}, bindings.number
        return len(seen.members) == len(seen.at)

    def _ready(self, member: BoundParam) -> bool:
        """Is the layer of this parameter to be armed?"""
        return self._habit.clean[self._layer_of[member.index]] >= NEEDED

    def _open(self) -> None:
        """Begin the step."""
        executor = self.stepper.executor
        mask = executor.prepared.made_for
        if not isinstance(mask, list) or len(mask) != len(executor.arranged.members):
            return
        self.open, self.complete, self._consumed = True, False, {}
        self._gradients = self._step.begin(mask)
        call_at_end_of_backward(untraced(self._completed))
        if executor.arranged is not self._arranged:
            return  # bound anew at this step: all of it is left to opt.step()
        for place, owned in enumerate(executor.arranged.owned):
            lacks = sum(mask[m.index] for m in owned)
            if self._habit.clean[place] >= NEEDED and lacks:
                self._armed[place] = lacks

    def _completed(self) -> None:
        """The backward is over."""
        self.complete = True

    def _spent_of(self, member: BoundParam) -> SpentGradient:
        """What stands for the gradient of this parameter, the same one at every step."""
        found = self._spent.get(member.index)
        if found is None:
            found = self._spent[member.index] = SpentGradient(member.param, self._names()[self._layer_of[member.index]])
        return found

    def _names(self) -> list[str]:
        """The layers' names."""
        return [layer.name for layer in self.stepper.executor.arranged.graph.layers]

    # ---- what opt.step() does --------------------------------------------------------------------------------------------

    def consumed(self) -> dict[int, BoundParam]:
        """The parameters that the backward has updated, by index. Raises SetupError if the loop did something that the step must
        not have missed."""
        if self._habit.settings_changed(self.stepper.opt.param_groups):
            raise SetupError(
                "a setting of the optimizer was changed between backward() and opt.step(): layers that were updated inside the "
                f"backward had the old one. Change it before the backward. {INSTEAD}"
            )
        if self.stepper.bindings.stale():
            raise SetupError(
                "parameters or state of the optimizer were replaced between backward() and opt.step(), when the backward had "
                f"updated layers already. {INSTEAD}"
            )
        for member in self._consumed.values():
            if member.param.grad is not self._spent.get(member.index):
                raise SetupError(
                    f"the gradient of {member.name!r} was replaced between backward() and opt.step(), when the backward had "
                    f"updated it already. {INSTEAD}"
                )
        return self._consumed

    def refuse_rest(self) -> None:
        """Raises SetupError if ``opt.step()`` would make the rest of a step that was left behind a whole backward: what that had
        updated already, it would not."""
        why, self._rest_is_gone = self._rest_is_gone, None
        if why is not None:
            raise SetupError(
                f"{why}, when the backward had updated layers already, whose gradients are used up: make another backward before "
                f"opt.step(). {INSTEAD}"
            )

    def observe(self, unusual: str | None) -> None:
        """``opt.step()`` begins, or ends what the backward began: what was seen of the loop decides what is armed next.
        ``unusual``: this step was called in a way that is never armed."""
        self._steps += 1
        habit, armed = self._habit, self._consumed if self.open else {}
        why = unusual or self._why_none or (ADDED_UP if self._backwards > 1 else None)
        if why is None and habit.settings_changed(self.stepper.opt.param_groups):
            why = "a setting of the optimizer is changed between backward and opt.step()"
        owned = self.stepper.executor.arranged.owned
        if self._bound != self.stepper.bindings.number or not self._backwards:
            why = why or "no backward of a region that was compiled for this run was seen"
        if len(habit.clean) != len(owned):
            habit.bind(len(owned))
        regions = {self._layer_of[m.index]: seen for seen in self._ran for m in seen.members.values() if self._layer_of}
        for place, members in enumerate(owned):
            if any(m.index in armed for m in members):
                habit.why[place] = ""
                continue
            region = regions.get(place)
            habit.judge(place, members, why or (against_at_step(region) if region is not None else None))
        self._tell()

    def _tell(self) -> None:
        """Keep what stands in the way of each layer, and say once what became of it."""
        names, habit = self._names(), self._habit
        waiting = "its gradients must be seen untouched in two steps first"
        self.standing.clear()
        self.standing.whole = False
        for place in [*self._came, *(place for place in range(len(names)) if place not in self._came)]:
            self.standing[names[place]] = habit.why[place] or ("" if habit.clean[place] >= NEEDED else waiting)
        if self._steps == _PATIENCE:
            late = {name: why for name, why in self.standing.items() if why}
            where = f"{len(names) - len(late)} of {len(names)} layers are updated inside the backward"
            some = next(iter(late.items()), None)
            log.log(
                logging.INFO if some is None else logging.WARNING,
                "fxckpt: %s%s", where, "" if some is None else f"; not {some[0]!r}: {some[1]} (opt.ckpt.graph.why tells of each)",
            )  # fmt: skip

    def ended(self) -> None:
        """The step is over, made inside the backward or not, or was left."""
        ops.listen(None)
        self.open = self.complete = False
        self._armed, self._gradients, self._consumed, self._now = {}, [], {}, None
        for seen in self._ran:
            seen.forwards, seen.against = 0, ""
        self._ran, self._backwards, self._task = [], 0, None
        self._habit.step_ended()

    def leave(self, why: str) -> None:
        """The step that is open will not be ended: nothing of it is to be kept."""
        if not self.open:
            return
        self._rest_is_gone = why if self.complete else None
        for member in self._consumed.values():
            if isinstance(member.param.grad, SpentGradient):
                member.param.grad = None
        self.ended()
        self._habit.all_in_the_way(why)
        self._step.left(why)


def _is_emptied(gradient: torch.Tensor) -> bool:
    """Was its memory given back?"""
    return bool(gradient.numel()) and gradient.layout is torch.strided and not gradient.untyped_storage().nbytes()
