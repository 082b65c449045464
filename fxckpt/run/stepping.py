"""One ``opt.step()``, and one boundary: is a checkpoint due, what runs the update, and what is emitted of it.

In a loop with boundaries a checkpoint is begun in the step that is likely the last of its iteration, so that its layers are
copied as early as can be; where that was a wrong guess, or something changed after it, all is handed over at the boundary.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch

from fxckpt.compat.optimizers import sets_up_state
from fxckpt.compat.tensors import set_grad_mode
from fxckpt.config import Config
from fxckpt.errors import Diverged, SaveFailed, SetupError, StoreError
from fxckpt.journal.chain import Chain
from fxckpt.optim.stepper import Stepper
from fxckpt.optim.strategy import Arguments, EvaluatedClosure, Strategy, own_step
from fxckpt.run.announcer import Announcer
from fxckpt.run.armed_step import ArmedStep
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.clock import RunStatus, Schedule, StepClock
from fxckpt.run.closing import Closing
from fxckpt.run.in_graph import InGraph
from fxckpt.run.who_steps import WhoSteps
from fxckpt.saving import tracing
from fxckpt.saving.flights import Tally
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.plan import Layout

log: logging.Logger = logging.getLogger("fxckpt")


class Stepping:
    """Makes the steps of a run's optimizers, with a checkpoint where one is due, and the saves that a user asks for."""

    def __init__(self, arrangement: Arrangement, closing: Closing, clock: StepClock, status: RunStatus, config: Config):
        self._arrangement, self._closing = arrangement, closing
        self._emitter, self._saver = arrangement.emitter, arrangement.emitter.saver
        self._chain = cast(Chain, self._emitter.chain)
        self._clock, self._status, self._config = clock, status, config
        self.schedule: Schedule = Schedule(config.every)
        self.who_steps: WhoSteps = WhoSteps(arrangement.steppers, clock)
        self._stepper_of = {id(stepper.opt): stepper for stepper in arrangement.steppers}
        self._announcer = Announcer(arrangement, config.max_async)
        self._store_checked = False
        self._first = True  # no boundary has come
        self._foreign = (True, True)  # of a step that goes another way, what ``WhoSteps.attempt`` said
        self._skipped = 0  # the last step whose checkpoint was skipped
        self.in_backward: ArmedStep | None = None
        if config.updates == "in_backward" and arrangement.emitter.engine is not None:
            self.in_backward = ArmedStep(weakref.proxy(self), arrangement, closing, clock, status, config.layer)

    def step(self, opt: torch.optim.Optimizer, closure: Callable | None = None) -> Any:
        """What ``opt.step()`` runs, between its hooks. Returns what the closure returned."""
        if os.getpid() != self._status.pid or not self._status.enabled:
            return own_step(opt, closure)
        if self._emitter.ordinals and self._emitter.devices.capturing():
            raise SetupError(
                "opt.step() was called while a CUDA graph is captured: a replay runs no Python, so fxckpt would neither guard "
                "the copies of a checkpoint nor take one. Capture forward and backward, and call opt.step() outside."
            )
        if torch.is_inference_mode_enabled():  # state made in it could be changed nowhere else, and has no version counter
            with torch.inference_mode(False):
                return self.step(opt, closure)
        with self._closing.between_steps:
            self._saver.trainer.comes_by()
            return self._step(opt, closure)

    def _step(self, opt: torch.optim.Optimizer, closure: Callable | None) -> Any:
        """One attempt, with the clock of steps around it. What it does when nothing is to be done costs each step: little, and
        as few calls as can be, for after a backward pass all of this code is cold."""
        if self._status.partially_loaded is not None:
            self._status.refuse_mixture()
        if not (self._store_checked or self._status.stopped):
            self._check_store()
        stepper = self._stepper_of[id(opt)]
        if self.in_backward is not None and self.in_backward.ends(stepper, closure):
            return None
        if not opt.state and sets_up_state(opt):
            self._emitter.fence_all()
            return own_step(opt, closure)
        if self._clock.thread is not None and self._clock.thread != threading.get_ident():
            self._refuse_thread()
        alone = len(self._stepper_of) == 1 and not self._clock.in_iteration
        counts, begins = (True, True) if alone else self.attempt(opt)
        self.before_step()
        stepper.stepped = True
        if self._found_inf(opt):
            self._clock.attempts += counts
            return None
        started, tracer = time.monotonic_ns(), self._saver.flights.tracer
        try:
            loss = self._advance(stepper, closure, counts, begins)
        except BaseException as error:
            self.left(stepper, f"opt.step() raised {type(error).__name__}")
            if self.in_backward is not None:
                self.in_backward.ended()
            raise
        if tracer is not None:
            tracer.add(f"opt.step() {self._clock.attempts}", tracing.STEPS, started, step=self._clock.attempts)
        if self.in_backward is not None:
            self.in_backward.ended()
        return loss

    def left(self, stepper: Stepper, why: str) -> None:
        """A step is left in its middle: its checkpoint is dropped, and nothing waits for what it would have emitted."""
        self.schedule.owed |= self._emitter.current is not None  # the checkpoint that is dropped: another step takes it
        self._closing.abort(why)
        for pending in self._saver.flights.under_way():  # what was not waited for must not change unseen
            pending.guard.watch_again()
        stepper.strategy.abandon()

    def leave_backward(self, why: str) -> None:
        """If a backward began a step that nothing ended, it is left as by an exception in the middle of ``opt.step()``."""
        if self.in_backward is not None:
            self.in_backward.leave(why)

    def in_the_middle(self) -> bool:
        """Has a backward begun a step that ``opt.step()`` is to end?"""
        return self.in_backward is not None and self.in_backward.under_way()

    def in_graph(self) -> InGraph | None:
        """What takes the layers that the graph of a whole step brings; None where they are updated after the backward."""
        return None if self.in_backward is None else self.in_backward.armed.in_graph

    def _check_store(self) -> None:
        """Raises StoreNotLoaded before the first checkpoint would join others that were never looked at."""
        self._saver.store.require_loaded()
        self._store_checked = True

    def before_step(self) -> None:
        """Close the step before this one, or, before a boundary, give up its checkpoint, which this step changes; the boundary
        takes another. Raise what went wrong since, if the user asked for that."""
        if not self._clock.in_iteration:
            self._closing.close_step()
        elif self._closing.open is not None:
            self._closing.give_up("another step was made before the boundary")
            self.schedule.owed = True
        tally = self._saver.tally
        if tally.mixed:
            self._refuse_mixing(tally)
        if self._config.on_error == "raise" or isinstance(tally.unreported, Diverged):
            tally.raise_unreported()

    def _refuse_thread(self) -> None:
        """Raises SetupError: nobody waits between two batches for the step that was made of the first."""
        raise SetupError(
            "opt.step() is called in another thread than the one that asks fxckpt.batches for batches: what reads ahead in "
            "a thread of its own goes inside, `fxckpt.batches(Prefetcher(loader))`, so that a batch counts once it was used."
        )

    def _refuse_mixing(self, tally: Tally) -> None:
        """Raises SetupError if no checkpoint can be taken in this loop: the first two would have mixed iterations."""
        if len(tally.mixed) > 1 and not tally.committed and not self._clock.in_iteration:
            raise SetupError(f"no checkpoint can be taken in this loop: {tally.mixed[-1]}")

    def attempt(self, opt: torch.optim.Optimizer) -> tuple[bool, bool]:
        """See ``WhoSteps.attempt``; where an order is refused, the checkpoint that was begun in it goes."""
        try:
            return self.who_steps.attempt(opt)
        except SetupError:
            self._closing.give_up("the optimizers step in another order than their list says")
            raise

    def attempt_skipped(self, opt: torch.optim.Optimizer) -> None:
        """A scaler found an inf, and did not call this optimizer's step."""
        self.before_step()
        self._clock.attempts += self.attempt(opt)[0]

    def boundary(self) -> None:
        """Everything is at rest, and of one instant: close the checkpoint that was begun in this iteration, or take one if it is
        due, where none was begun or the one that was is not of this instant."""
        self._clock.interrupted = False
        stepped = self.who_steps.iteration_ended()
        if not stepped and self._closing.open is None and not self.schedule.owed:
            return
        with self._closing.between_steps:
            if self._first:
                self._first = False
                self._closing.first_boundary()
            if not self._closing.close_step(at_rest=True):
                self.schedule.owed = True
            if self._status.active and self.is_due(self._clock.attempts) and not self._arrangement.halfway():
                self._take_here(bounded=True)

    def take_at_boundary(self) -> None:
        """The boundary that comes next takes a checkpoint, due or not, unless there is one of this step."""
        self.schedule.owed |= not self.is_taken()

    def is_taken(self) -> bool:
        """With ``every=N``: is there a checkpoint of the last step, or does the boundary that comes next take one?"""
        step = self._clock.attempts
        return self.schedule.last_step == step or self.schedule.due(step, 0.0)

    def rest(self, timeout: float | None = None) -> None:
        """The user says that everything is at rest, in a loop without boundaries: a checkpoint that was begun is of this instant.
        In another thread than the one that trains it is what was taken at the step's end. In an iteration, and inside
        ``opt.step()``, it waits for its end. Raises TimeoutError as ``Closing.resting``."""
        if not self._clock.in_iteration and not self._closing.occupied() and not self.in_the_middle():
            self._closing.resting(timeout, self._rest)

    def _rest(self) -> None:
        """Between two steps."""
        trains = threading.current_thread() is self._saver.trainer.thread
        self._closing.reap("its step was interrupted")
        if not self._closing.close_step(at_rest=trains) and trains:
            self._take_here(bounded=False)

    def _take_here(self, bounded: bool) -> None:
        """A checkpoint of this very instant: all layers are handed over as they are, and the state with them. ``bounded``: it is
        a boundary."""
        self._arrangement.look_for_names()
        self._arrangement.refresh()
        pending = self.begin(self._clock.attempts)
        if pending is not None:
            pending.guard.bounded, pending.guard.in_forward = bounded, frozenset()
            with torch.no_grad():
                self.emit_rest(pending, None)
            self._taken(pending, self._arrangement.layout)
            self._closing.close_step(at_rest=True)

    def _found_inf(self, opt: torch.optim.Optimizer) -> bool:
        """Did a GradScaler that lets the optimizer decide (``_step_supports_amp_scaling``) find an inf? Then nothing runs.

        Where the answer is on a device, the kernels there read it, and the host never waits for it: a checkpoint of such
        a step holds the state as it was, and its record's ``updates`` is known when it is committed.
        """
        found = getattr(opt, "found_inf", None)
        return found is not None and not self._emitter.is_remote(found) and bool(found.item())

    def _advance(self, stepper: Stepper, closure: Callable | None, counts: bool, begins: bool) -> Any:
        """One update, and a checkpoint if it ``begins`` one and one is due. ``counts``: it is a step of the run."""
        arrangement, emitter = self._arrangement, self._emitter
        step = self._clock.attempts + counts
        opt, loss, due, copying = stepper.opt, None, begins and self.is_due(step), emitter.engine.pending()
        if due:
            arrangement.look_for_names()
        arrangement.refresh(due or copying)
        scaled = getattr(opt, "grad_scale", None) is not None or getattr(opt, "found_inf", None) is not None
        strategy = stepper.whole_step if scaled or type(closure) is Arguments else stepper.strategy
        if closure is not None and strategy.calls_closure_first():
            with torch.enable_grad():
                loss = closure()
            if due:
                arrangement.look_for_names()
            arrangement.refresh()
            closure = EvaluatedClosure(closure, loss)
        # After the closure, whose forward may change what is being copied.
        emitter.look_for_changes(stepper.executor.arranged.numbers, arrangement.layout)
        own = strategy.own_part(closure)
        self._chain.advance()
        if own is not None:
            emitter.fence_all()
            stepper.halfway = True
            loss = own()
            if due:
                arrangement.look_for_names()
            arrangement.refresh()
        if arrangement.unsaid or own is not None:
            self._announcer.announce()
        enabled = torch.is_grad_enabled()
        try:
            set_grad_mode(False)
            self._chain.begins(stepper, self._refused(stepper, strategy, own), due)
            pending = self.begin(step, stepper) if due else None
            stepper.halfway = True
            before = self._instant() if self._chain.whether.trial is not None else None
            emitted = strategy.run(emitter.number if copying or pending is not None else None)
            if before is not None and self._chain.whether.trial is not None:
                self._chain.whether.trial.updated(before, self._instant())
            stepper.halfway = False
            self._chain.updated()
            # What a closure left inside a whole step of a class of its own, its next step may read before all else (SAM).
            stepper.accumulated = own is not None and closure is not None and not stepper.stock
            if counts:
                self._clock.attempts += 1
                found = getattr(opt, "found_inf", None)
                skipped = emitter.later(found) if emitter.is_remote(found) and not self._status.stopped else None
                self._clock.applied.add(skipped)
            if pending is not None:
                self.emit_rest(pending, stepper if emitted else None)
            if due:
                self._taken(pending, self._arrangement.layout)
            else:
                self._chain.ends(stepper)
        finally:
            set_grad_mode(enabled)
        if emitter.callback_error is not None:
            self.raise_callback_error()
        return loss

    def _instant(self) -> tuple[float, float]:
        """Now, and how long training has waited by now."""
        return time.monotonic(), self._saver.stall_seconds()

    def foreign_step_begins(self, opt: torch.optim.Optimizer) -> None:
        """A step begins that did not come through ``step``. As before any own step, what is being copied must be done."""
        if not self._status.active:
            return
        with self._closing.between_steps:
            stepper, self._saver.trainer.thread = self._stepper_of[id(opt)], threading.current_thread()
            self._status.refuse_mixture()
            if not self._store_checked:
                self._check_store()
            if self.in_backward is not None:
                self.in_backward.made_another_way()
            self._foreign = self.attempt(opt)
            self.before_step()
            self._arrangement.refresh()
            self._emitter.fence_all()
            stepper.stepped = stepper.halfway = True
            self._chain.advance()

    def foreign_step_ended(self, opt: torch.optim.Optimizer) -> None:
        """It counts, and if a checkpoint is due, everything is handed over as it is now."""
        if not self._status.active:
            return
        with self._closing.between_steps, torch.no_grad():
            stepper, (counts, begins) = self._stepper_of[id(opt)], self._foreign
            step = self._clock.attempts + counts
            if due := begins and self.is_due(step):
                self._arrangement.look_for_names()
            self._arrangement.refresh(due)
            pending = self.begin(step) if due else None
            stepper.halfway, stepper.accumulated = False, not stepper.stock
            if counts:
                self._clock.attempts += 1
                self._clock.applied.add()
            if pending is not None:
                self.emit_rest(pending, None)
            if due:
                self._taken(pending, self._arrangement.layout)
            self.raise_callback_error()

    def _refused(self, stepper: Stepper, strategy: Strategy, own: object) -> str | None:
        """Why the step that is about to run cannot be a record of the journal, whatever came before it."""
        if strategy is not stepper.strategy:
            return "gradients are unscaled inside the step, or it takes arguments"
        if own is not None and strategy.whole is None:
            return "its own step updates some parameters, whose state or gradients it has to make"
        return None

    def is_due(self, step: int) -> bool:
        """Is a checkpoint of this step to be begun? Ask once a step: the schedule counts."""
        if self._status.stopped:
            return False
        stalled = 0.0 if self.schedule.waits else self._saver.stall_seconds()  # what every=N does not ask costs a look
        ends = self._status.ending is not None and self._saver.ranks.end_at(step)
        return ends or self.schedule.due(step, stalled)

    def begin(self, step: int, stepper: Stepper | None = None) -> InFlight | None:
        """Begin the checkpoint of this step, or a record of the journal; None if that fails, or if too many are in flight to
        begin one without waiting. ``stepper`` is about to make the step."""
        flights = self._saver.flights
        if not self.schedule.waits and not self._status.ending and len(flights.under_way()) >= flights.max_async:
            self._saver.tally.skipped += step != self._skipped
            self._skipped = step
            return None
        try:
            self._closing.reap("its step was interrupted")
            layout = self._arrangement.current_layout()
            record = self._chain.next(layout, stepper)
            pending = self._saver.begin(step, layout) if record is None else self._saver.begin(step, record[0], link=record[1])
        except (SaveFailed, StoreError, OSError) as error:
            self._saver.not_begun(step, error)  # raised, if at all, at the next step: this one is half done
            pending = None
        if pending is not None:
            pending.guard.bounded, pending.guard.in_forward = self._clock.in_iteration, self._changes_in_forward()
            self._emitter.current = pending
        self.schedule.started(step, self._saver.stall_seconds())
        return pending

    def _changes_in_forward(self) -> frozenset[str] | None:
        """See ``Guard.in_forward``."""
        return frozenset() if self._clock.in_iteration else self._closing.changes_in_forward()

    def emit_rest(self, pending: InFlight, stepped: Stepper | None) -> None:
        """The other optimizers' layers, and what is captured at the end of ``opt.step()``."""
        for stepper in self._arrangement.steppers:
            if stepper is not stepped:
                for number, tensors in stepper.executor.arranged.handed_over:
                    self._emitter.emit(number, tensors)
        self._closing.take(pending)

    def _taken(self, pending: InFlight | None, layout: Layout | None) -> None:
        """See ``Chain.taken``; whoever watches the run is told how far apart full checkpoints are."""
        self._chain.taken(pending, layout, self._clock.in_iteration)
        self._saver.about.journal = self._chain.whether.length

    def raise_callback_error(self) -> None:
        """Raise what ``on_layer`` raised, now that all layers were updated: half a step is nothing to go on from."""
        error, self._emitter.callback_error = self._emitter.callback_error, None
        if error is not None:
            self._closing.drop("on_layer raised")
            raise error

    def save(self, name: str | None) -> None:
        """A full checkpoint of the state as it is now, waited for; raises what made it fail. Nothing if all is turned off."""
        if not self._status.enabled:
            log.warning("fxckpt is off (FXCKPT_DISABLE=1): nothing is saved")
            return
        if not self._status.active:
            raise SetupError("this run takes no checkpoints: it was shut down or disabled, or this is a forked process")
        self._closing.refuse_inside("save()", hooks=False)  # a hook, too, is in the middle of a step
        with self._closing.between_steps:
            pending = self._hand_everything_over(name)
        self._saver.flights.wait_for(pending)
        if pending.error is not None:
            self._saver.tally.forget(pending.error)
            raise pending.error
        self.schedule.started(self._clock.attempts, self._saver.stall_seconds())
        self.schedule.owed = self._clock.in_iteration  # the boundary takes another, which a run can go on from

    def _hand_everything_over(self, name: str | None) -> InFlight:
        """Emit all layers as they are now, and close."""
        self._status.refuse_mixture()
        if self._arrangement.halfway():
            raise SetupError(
                "opt.step() was left by an exception in its middle: some layers are updated and some are not, which is no step "
                "to save. fxckpt.load() goes back to the last one that is; opt.step() goes on from here."
            )
        if self._clock.in_iteration:
            self._closing.give_up("save() takes another one")
        self._closing.close_step(at_rest=True)
        if not self._store_checked:
            self._check_store()
        self._arrangement.look_for_names()
        self._arrangement.refresh()
        try:
            self._closing.reap("its step was interrupted")
            layout = self._arrangement.current_layout()
            pending = self._emitter.current = self._saver.begin(self._clock.attempts, layout, name=name)
            pending.guard.bounded, pending.guard.in_forward = self._clock.in_iteration, frozenset()
            with torch.no_grad():
                self.emit_rest(pending, None)
            if name is None:
                self._taken(pending, layout)
            self.raise_callback_error()
        except BaseException:
            self._closing.abort("save() failed")
            raise
        self._closing.close_step(at_rest=True)
        return pending
