"""The strategy for optimizers that are not of ``torch.optim``: split where that can be shown to change nothing.

Before each step the optimizer's own ``step()`` runs on stand-ins without memory, one for each *part*: parameters of one group
whose states and counts are alike. What it does in Python, advancing ``group["step"]`` or a ``state["step"]``, happens on a copy
of the optimizer and is taken over; what it asks of PyTorch becomes the parts' programs. So the numbers of every step are computed
by the optimizer's own code.

A program runs only after it was shown to be right:

* all parameters were rehearsed at once, and each asks for the same with the same numbers as its part's one stand-in;
* nothing else changed: no attribute, no module global, no class attribute, no random generator;
* in two steps the whole stock step left in each real tensor the bits that the programs left in a copy of it.

Whatever fails, then or later, makes the optimizer run its own step whole, for good.
"""

from __future__ import annotations

import functools
import logging

import torch

from fxckpt.compat.optimizers import plain_class
from fxckpt.graph.update.trace import MakesState, NotTraceable
from fxckpt.optim.bindings import BoundParam
from fxckpt.optim.executor import Executor
from fxckpt.optim.held import HeldWeakly
from fxckpt.optim.rehearsal import values
from fxckpt.optim.rehearsal.acting import Found, Stage
from fxckpt.optim.rehearsal.casting import Casting
from fxckpt.optim.rehearsal.parts import Mask, Partition
from fxckpt.optim.rehearsal.proofs import PROOFS, Proofs, compare_all
from fxckpt.optim.strategy import Closure, EvaluatedClosure, OwnPart, WholeStep, own_step

log: logging.Logger = logging.getLogger("fxckpt")


class RehearsedStep:
    """Rehearses each step, and runs it split once that is proven; whole until then, or for good."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer, executor: Executor):
        self.opt = opt
        self.executor: Executor = executor
        self.whole: str | None = None
        self.partition: Partition = Partition(opt)
        self.stage: Stage = Stage(opt)
        self.casting: Casting = Casting(opt)
        self.proofs: Proofs = Proofs(opt)
        self._excused: set[int] = set()  # parameters of which one step, which may be their first, could not be rehearsed
        self._closure_first: bool | None = None  # it calls its closure once, before all else
        self._pending: Found | None = None  # to be compared with the step that runs whole
        self._splits = False  # the step under way

    def refuse(self, reason: str) -> None:
        """Run whole from now on."""
        self.whole = reason
        log.debug("%s is not split: %s", plain_class(self.opt).__name__, reason)

    def _refuse_or_wait(self, error: Exception, mask: Mask) -> None:
        """Refuse, unless this may be somebody's first step: what makes states is another code than what uses them."""
        reason = str(error) if isinstance(error, NotTraceable) else f"rehearsing it failed: {type(error).__name__}: {error}"
        taking_part = [m for m, seen in zip(self.executor.arranged.members, mask) if seen is not None]
        new = {id(m.param) for m in taking_part if not m.state} - self._excused
        self._excused |= new
        if not new:
            self.refuse(reason)

    def calls_closure_first(self) -> bool:
        """Does the step call its closure once and before all else, so that it may as well have been called before?"""
        if self._closure_first is None and self.whole is None:
            members = self.executor.arranged.members
            stateful = [True if m.state else None for m in members]
            mask = stateful if any(stateful) else [True] * len(members)
            try:
                self.stage.act(self.partition.of(members, mask, False), True, not self.proofs.any())
            except MakesState:
                return False  # its first step, which is its own
            except Exception as error:
                self._refuse_or_wait(error, mask)
                return False
            self._closure_first = True
        return bool(self._closure_first) and self.whole is None

    def own_part(self, closure: Closure | None) -> OwnPart | None:
        """All of the step, unless a rehearsal proves that it can be split; what that did in Python is taken over."""
        self._pending = None
        known = closure is None or isinstance(closure, EvaluatedClosure)
        self._splits = known and self.whole is None and self._rehearse(closure is not None)
        return None if self._splits else functools.partial(self._run_whole, closure)

    def _rehearse(self, closure: bool) -> bool:
        """Rehearse the step that is about to run, and have its calls; False if it must run whole."""
        members = self.executor.arranged.members
        gradients = [m.param.grad for m in members]
        if any(g is not None and (g.layout != torch.strided or type(g) is not torch.Tensor) for g in gradients):
            return False
        shaped = self.partition.by_shape
        mask = [None if g is None else (g.dtype, g.stride() if shaped else None) for g in gradients]
        try:
            found = self._act(members, mask, closure)
            if not self.proofs.hold(found):
                compare_all(self.stage, self.partition, found, closure)
                self._pending = found
                return False
        except MakesState:
            return False
        except Exception as error:  # NotTraceable, or what nobody thought of: training goes on, and it is said
            self._refuse_or_wait(error, mask)
            return False
        self.casting.take_over(found)
        casts = self.casting.casts(found)
        if casts is not self.executor.prepared.made_for:
            self.executor.prepare(casts, {m.index: cast for cast in casts for m in cast.members})
        return True

    def _act(self, members: list[BoundParam], mask: Mask, closure: bool) -> Found:
        """One stand-in for each part; by shape if the step looks at shapes."""
        same = self.executor.untouched()
        while True:
            found = self.stage.act(self.partition.of(members, mask, same), closure, not self.proofs.any())
            if not found.by_shape or self.partition.by_shape:
                return found
            self.partition.by_shape, same = True, False

    def _run_whole(self, closure: Closure | None) -> object:
        """The optimizer's own step. Does it do what the programs would have done, if they are not proven yet?"""
        pending, self._pending, expected = self._pending, None, None
        if pending is not None:
            try:
                expected = self.proofs.foresee(pending, self.casting.casts(pending))
            except Exception as error:
                self.refuse(f"its operators cannot run again: {type(error).__name__}: {error}")
        returned = own_step(self.opt, closure)
        if pending is None or expected is None:
            return returned
        if not values.same(self.proofs.observe(pending), expected):
            self.refuse("a rehearsal of it does not end with the bits that its step ends with")
            return returned
        name, count = plain_class(self.opt).__name__, self.proofs.add(pending)
        log.debug("rehearsed %s: %d of %d comparisons with its own step done", name, count, PROOFS)
        return returned

    def run(self, number: int | None) -> bool:
        """The rehearsed calls, if the step is split."""
        if self._splits:
            self.executor.run(number, [p.grad for p in self.executor.arranged.params])
        return self._splits

    def abandon(self) -> None:
        """Forget what was to be compared."""
        self._pending = None

    def describe(self) -> str:
        """Which of the two it is, once it is known."""
        if self.whole is not None:
            return WholeStep(self.opt, self.whole).describe()
        layers = len(self.executor.arranged.graph.layers)
        return f"its own step, rehearsed on stand-ins, native, {layers} layers" if self.proofs.any() else ""
