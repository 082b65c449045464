"""Updates inside the graph of a whole step: each layer's as soon as its gradient is final there, behind a norm, too.

The graph holds all that changes a gradient before the step, so nothing of the loop need be watched: what ``opt.step()`` is given
is what the op of the layer brings. Whether a step is made so depends on the run alone. The piece of the graph that stands before
the step brings the layers, the first of them begins the step, and ``opt.step()`` behind the piece ends it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxckpt.compat.optimizers import has_pre_hooks
from fxckpt.compat.tensors import hooks_of
from fxckpt.graph import ops
from fxckpt.graph.backward.region import Region
from fxckpt.graph.step_graph import Standing
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.spent import SpentGradient
from fxckpt.optim.strategy import SplitStep
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.begins import Begins
from fxckpt.run.clock import RunStatus

log: logging.Logger = logging.getLogger("fxckpt")


_PATIENCE = 5  # steps, before it is said which layers are updated there


class InGraph:
    """What the ops of a whole step's graph bring. ``open``: they began a step, which ``opt.step()`` ends; ``complete``: the piece
    before the step has run; ``now``: a piece runs, or has run, whose step was not made yet.

    ``step`` holds this, and is to be a weak reference.
    """

    def __init__(self, arrangement: Arrangement, status: RunStatus, step: Begins, standing: Standing):
        self.open: bool = False
        self.complete: bool = False
        self.now: Region | None = None
        self._arrangement, self._status, self._step, self._standing = arrangement, status, step, standing
        self._thread = threading.current_thread()
        self._members: dict[int, BoundParam] = {}  # by the inputs of the region
        self._place_of: dict[int, int] = {}  # the layer of a parameter, by its index
        self._mask: list[bool] = []  # which parameters the step is given gradients of
        self._why = ""  # nothing is updated in the graph, for this reason
        self._armed: dict[int, int] = {}  # the layers of the step that is open, and how many gradients each still lacks
        self._came: dict[int, None] = {}  # the layers that were updated in it, in order
        self._gradients: list[torch.Tensor | None] = []
        self._consumed: dict[int, BoundParam] = {}
        self._spent: dict[int, SpentGradient] = {}
        self._steps = 0

    # ---- what the compiled function does -------------------------------------------------------------------------------

    def around(self, region: Region, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled piece before the step, with its ops listened to. What is compiled must not keep a run."""
        this = weakref.ref(self)

        def run(*args: Any) -> Any:
            inside = this()
            return inner(*args) if inside is None else inside._run(region, inner, args)

        return run

    def _run(self, region: Region, inner: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Once."""
        self._begins(region, [args[each.index] for each in region.bound])
        try:
            return inner(*args)
        except BaseException:
            self.leave("the compiled function was left by an exception")
            raise
        finally:
            self.complete = True
            ops.listen(None)

    def given_back(self, params: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """What is to stand at the parameters as gradients: in place of one that was used up, what says so."""
        spent = {id(member.param): self._spent_of(member) for member in self._consumed.values()}
        return [spent.get(id(param), gradient) for param, gradient in zip(params, gradients)]

    def _begins(self, region: Region, params: Sequence[torch.Tensor]) -> None:
        """A piece begins: listen to its ops, if a step may be made in it."""
        ops.listen(None)
        self.leave("the compiled function was left by an exception")
        self.now, self.complete, self._came = region, False, {}
        self._why = self._against(region, params)
        if not self._why:
            ops.listen(self._take)

    def _against(self, region: Region, params: Sequence[torch.Tensor]) -> str:
        """What speaks against updates in the graph, now. ``params``: what it was given as the region's parameters."""
        [stepper] = self._arrangement.steppers
        members = stepper.bindings.members
        if not self._status.active:
            return "the run takes no checkpoints"
        if not isinstance(stepper.strategy, SplitStep):
            return "its step is not one that is traced and split into layers"
        if any(m.param.device.type != "cpu" for m in members):
            return "parameters are on a device"
        if threading.current_thread() is not self._thread:
            return "the compiled function runs in another thread than compile_step did"
        if any(map(hooks_of, (m.param for m in members))):
            return "there are hooks on parameters, which see gradients"
        if has_pre_hooks(stepper.opt):
            return "there are hooks in front of opt.step()"
        if stepper.bindings.stale():
            return "the optimizer has made no step with these tensors yet"
        by_id = {id(m.param): m for m in members}
        found = zip(region.bound, map(by_id.get, map(id, params)))
        self._members = {each.index: member for each, member in found if member is not None}
        stepped = {m.index for at, m in self._members.items() if at in region.stepped}
        self._mask = [m.index in stepped for m in members]
        if len(stepped) != len(region.stepped):
            return "its parameters are not those of the optimizer"
        if any(m.program is None for m in members if m.index in stepped):
            return "the optimizer has made no step with these tensors yet"
        return ""

    def _take(self, gradients: Sequence[torch.Tensor], inputs: Sequence[int], token: str, layer: int) -> None:
        """An op: these gradients are final, and nobody reads their parameters any more."""
        if self.now is None or token != self.now.token:
            return
        if not self.open:
            self._open()
        for index, gradient in zip(inputs, gradients):
            member = self._members[index]
            place = self._place_of.get(member.index)
            if place not in self._armed:
                continue
            self._gradients[member.index] = gradient
            self._armed[place] -= 1
            if not self._armed[place]:
                self._update(place)

    def _open(self) -> None:
        """Begin the step."""
        executor = self._arrangement.steppers[0].executor
        mask, before = self._mask, executor.arranged
        self.open, self._consumed, self._armed = True, {}, {}
        self._gradients = self._step.begin(mask)
        if executor.arranged is not before:
            return  # bound anew at this step: all of it is left to opt.step()
        self._place_of = {m.index: place for place, owned in enumerate(executor.arranged.owned) for m in owned}
        lacks = {place: sum(mask[m.index] for m in owned) for place, owned in enumerate(executor.arranged.owned)}
        self._armed = {place: count for place, count in lacks.items() if count}

    def _update(self, place: int) -> None:
        """All gradients of a layer are there."""
        used = self._arrangement.steppers[0].executor.use_up(place, self._gradients)
        self._consumed.update((member.index, member) for member in used)
        del self._armed[place]
        self._came[place] = None

    def _spent_of(self, member: BoundParam) -> SpentGradient:
        """What stands for the gradient of this parameter, the same one at every step."""
        found = self._spent.get(member.index)
        if found is None or found.shape != member.param.shape:
            names = {m.index: layer for layer, owned in zip(self._names(), self._owned()) for m in owned}
            found = self._spent[member.index] = SpentGradient(member.param, names[member.index])
        return found

    def _names(self) -> list[str]:
        return [layer.name for layer in self._arrangement.steppers[0].executor.arranged.graph.layers]

    def _owned(self) -> list[list[BoundParam]]:
        return self._arrangement.steppers[0].executor.arranged.owned

    # ---- what opt.step() does ------------------------------------------------------------------------------------------

    def consumed(self) -> dict[int, BoundParam]:
        """The parameters that were updated already, by index."""
        return self._consumed

    def refuse_rest(self) -> None:
        """Nothing is left over: what leaves a step leaves all of it."""

    def observe(self, unusual: str | None) -> None:
        """``opt.step()`` ends the step, or makes it: keep where each layer was updated."""
        why = unusual or self._why or "its gradient is used behind the step, too, or there is no place for it in the graph"
        names = self._names()
        self._standing.clear()
        self._standing.whole = True
        for place in [*self._came, *(place for place in range(len(names)) if place not in self._came)]:
            self._standing[names[place]] = "" if place in self._came else why
        self._steps += 1
        if self._steps == _PATIENCE:
            late = [name for name in names if self._standing[name]]
            where = f"{len(self._came)} of {len(names)} layers are updated inside the graph of the whole step"
            level, not_all = (logging.WARNING, f"; not {late[0]!r}: {why}") if late else (logging.INFO, "")
            log.log(level, "fxckpt: %s%s", where, not_all)

    def ended(self) -> None:
        """The step is over, or was left."""
        self.open = self.complete = False
        self.now, self._armed, self._gradients, self._consumed = None, {}, [], {}

    def leave(self, why: str) -> None:
        """The step that is open will not be ended."""
        if not self.open:
            self.now = None
            return
        for member in self._consumed.values():
            if isinstance(member.param.grad, SpentGradient):
                member.param.grad = None
        self.ended()
        self._step.left(why)
