"""One ``opt.step()``: is a checkpoint due, what runs the update, and what is emitted of it.

With several optimizers the last one of the list leads: a checkpoint is taken at its step, of all of them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from fxckpt.compat.optimizers import sets_up_state
from fxckpt.compat.tensors import set_grad_mode
from fxckpt.config import Config
from fxckpt.errors import SaveFailed, SetupError, StoreError
from fxckpt.optim.stepper import Stepper
from fxckpt.optim.strategy import Arguments, EvaluatedClosure, own_step
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.clock import RunStatus, Schedule, StepClock
from fxckpt.run.closing import Closing
from fxckpt.saving import tracing
from fxckpt.saving.in_flight import InFlight

log: logging.Logger = logging.getLogger("fxckpt")


class Stepping:
    """Makes the steps of a run's optimizers, with a checkpoint where one is due, and the saves that a user asks for."""

    def __init__(self, arrangement: Arrangement, closing: Closing, clock: StepClock, status: RunStatus, config: Config):
        self._arrangement, self._closing = arrangement, closing
        self._emitter, self._saver = arrangement.emitter, arrangement.emitter.saver
        self._clock, self._status, self._config = clock, status, config
        self.schedule: Schedule = Schedule(config.every)
        self._stepper_of = {id(stepper.opt): stepper for stepper in arrangement.steppers}
        self._leader = arrangement.steppers[-1]
        self._announcer = Announcer(arrangement, config.max_async)
        self._said_order = False
        self._store_checked = False

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
            self._saver.trainer.thread = threading.current_thread()
            self._saver.trainer.progress_ticks += 1
            return self._step(opt, closure)

    def _step(self, opt: torch.optim.Optimizer, closure: Callable | None) -> Any:
        """One attempt, with the clock of steps around it. What it does when nothing is to be done costs each step: little, and
        as few calls as can be, for after a backward pass all of this code is cold."""
        if self._status.partially_loaded is not None:
            self._status.refuse_mixture()
        if not (self._store_checked or self._status.stopped):
            self._check_store()
        stepper = self._stepper_of[id(opt)]
        leads = stepper is self._leader
        if leads or not self._clock.in_iteration:
            self._before_step()
        stepper.stepped = True
        if len(self._stepper_of) > 1:
            self._check_order(stepper, leads)
        if not opt.state and sets_up_state(opt):
            self._emitter.fence_all()
            return own_step(opt, closure)
        if self._found_inf(opt):
            if leads:
                self._clock.attempts += 1
            return None
        started, tracer = time.monotonic_ns(), self._saver.flights.tracer
        try:
            loss = self._advance(stepper, closure, leads)
        except BaseException as error:
            self._closing.abort(f"opt.step() raised {type(error).__name__}")
            for pending in self._saver.flights.under_way():  # what was not waited for must not change unseen
                pending.guard.watch_again()
            stepper.strategy.abandon()
            raise
        if tracer is not None:
            tracer.add(f"opt.step() {self._clock.attempts}", tracing.STEPS, started, step=self._clock.attempts)
        return loss

    def _check_store(self) -> None:
        """Raises StoreNotLoaded before the first checkpoint would join others that were never looked at."""
        self._saver.store.require_loaded()
        self._store_checked = True

    def _before_step(self) -> None:
        """Close the step before this one, and raise what went wrong since, if the user asked for that."""
        if self._clock.in_iteration:
            self._closing.give_up("opt.step() ran again before the turn of fxckpt.steps ended")
        self._closing.close_step()
        if self._config.on_error == "raise":
            self._saver.tally.raise_unreported()

    def attempt_skipped(self) -> None:
        """A scaler found an inf, and did not call the step of the optimizer that leads."""
        self._before_step()
        self._clock.attempts += 1

    def _check_order(self, stepper: Stepper, leads: bool) -> None:
        """With several optimizers: does the one that leads step after the others? Say so if not."""
        if not leads and self._closing.open is not None and self._clock.in_iteration:
            self._closing.give_up(f"{type(stepper.opt).__name__} stepped after it in the same turn")
        elif not leads or all(other.stepped for other in self._arrangement.steppers):
            return
        if not self._said_order:
            self._said_order = True
            log.warning(
                "fxckpt: checkpoints are taken at the step of the last optimizer of the list, the "
                f"{type(self._leader.opt).__name__}; another one has not stepped before it. If it steps later in the same "
                "iteration, its step is not in the checkpoint: put the optimizer that steps last at the end of the list"
            )

    def _found_inf(self, opt: torch.optim.Optimizer) -> bool:
        """Did a GradScaler that lets the optimizer decide (``_step_supports_amp_scaling``) find an inf? Then nothing runs.

        Where the answer is on a device, the kernels there read it, and the host never waits for it: a checkpoint of such
        a step holds the state as it was, and its record's ``updates`` is known when it is committed.
        """
        found = getattr(opt, "found_inf", None)
        return found is not None and not self._emitter.is_remote(found) and bool(found.item())

    def _advance(self, stepper: Stepper, closure: Callable | None, leads: bool) -> Any:
        """One update, with a checkpoint if one is due."""
        arrangement, emitter = self._arrangement, self._emitter
        opt, loss, due, copying = stepper.opt, None, leads and self._is_due(), emitter.engine.pending()
        if due:
            arrangement.look_for_names()
        arrangement.refresh(due or copying)
        scaled = getattr(opt, "grad_scale", None) is not None or getattr(opt, "found_inf", None) is not None
        strategy = stepper.whole_step if scaled or type(closure) is Arguments else stepper.strategy
        if closure is not None and strategy.calls_closure_first():
            with torch.enable_grad():
                loss = closure()
            arrangement.refresh()
            closure = EvaluatedClosure(closure, loss)
        # After the closure, whose forward may change what is being copied.
        emitter.look_for_changes(stepper.executor.arranged.numbers, arrangement.layout)
        own = strategy.own_part(closure)
        if own is not None:
            emitter.fence_all()
            stepper.halfway = True
            loss = own()
            arrangement.refresh()
        if arrangement.unsaid or own is not None:
            self._announcer.announce()
        enabled = torch.is_grad_enabled()
        set_grad_mode(False)
        try:
            pending = self._begin() if due else None
            stepper.halfway = True
            emitted = strategy.run(emitter.number if copying or pending is not None else None)
            stepper.halfway = False
            # What a closure left inside a whole step of a class of its own, its next step may read before all else (SAM).
            stepper.accumulated = own is not None and closure is not None and not stepper.stock
            if leads:
                self._clock.attempts += 1
                found = getattr(opt, "found_inf", None)
                skipped = emitter.later(found) if emitter.is_remote(found) and not self._status.stopped else None
                self._clock.applied.add(skipped)
            if pending is not None:
                self._emit_rest(pending, stepper if emitted else None)
        finally:
            set_grad_mode(enabled)
        if emitter.callback_error is not None:
            self._raise_callback_error()
        return loss

    def foreign_step_begins(self, opt: torch.optim.Optimizer) -> None:
        """A step begins that did not come through ``step``. As before any own step, what is being copied must be done."""
        if not self._status.active:
            return
        with self._closing.between_steps:
            stepper, self._saver.trainer.thread = self._stepper_of[id(opt)], threading.current_thread()
            self._status.refuse_mixture()
            if not self._store_checked:
                self._check_store()
            if stepper is self._leader or not self._clock.in_iteration:
                self._before_step()
            self._arrangement.refresh()
            self._emitter.fence_all()
            stepper.stepped = stepper.halfway = True

    def foreign_step_ended(self, opt: torch.optim.Optimizer) -> None:
        """It counts, and if a checkpoint is due, everything is handed over as it is now."""
        if not self._status.active:
            return
        with self._closing.between_steps, torch.no_grad():
            stepper = self._stepper_of[id(opt)]
            leads = stepper is self._leader
            if due := leads and self._is_due():
                self._arrangement.look_for_names()
            self._arrangement.refresh(due)
            pending = self._begin() if due else None
            stepper.halfway, stepper.accumulated = False, not stepper.stock
            if leads:
                self._clock.attempts += 1
                self._clock.applied.add()
            if pending is not None:
                self._emit_rest(pending, None)
            self._raise_callback_error()

    def _is_due(self) -> bool:
        """Does the step that is about to run begin a checkpoint? Ask once a step: the schedule counts."""
        if self._status.stopped:
            return False
        stalled = 0.0 if self.schedule.waits else self._saver.stall_seconds()  # what every=N does not ask costs a look
        return bool(self._status.ending) or self.schedule.due(self._clock.attempts + 1, stalled)

    def _begin(self) -> InFlight | None:
        """Begin the checkpoint of the step that is about to run."""
        step = self._clock.attempts + 1
        flights = self._saver.flights
        if not self.schedule.waits and not self._status.ending and len(flights.under_way()) >= flights.max_async:
            self._saver.tally.skipped += 1
            return None
        try:
            pending = self._saver.begin(step, self._arrangement.current_layout())
        except (SaveFailed, StoreError, OSError) as error:
            self._saver.tally.note_failure(step, error)  # raised, if at all, at the next step: this one is half done
            pending = None
        self.schedule.started(step, self._saver.stall_seconds())
        if pending is not None:
            pending.guard.turn, self._emitter.current = self._clock.in_iteration, pending
        return pending

    def _emit_rest(self, pending: InFlight, stepped: Stepper | None) -> None:
        """The other optimizers' layers, and what is captured at the end of ``opt.step()``."""
        for stepper in self._arrangement.steppers:
            if stepper is not stepped:
                for number, tensors in stepper.executor.arranged.handed_over:
                    self._emitter.emit(number, tensors)
        self._closing.take(pending)

    def _raise_callback_error(self) -> None:
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
        with self._closing.between_steps:
            pending = self._hand_everything_over(name)
        self._saver.flights.wait_for(pending)
        if pending.error is not None:
            self._saver.tally.forget(pending.error)
            raise pending.error
        self.schedule.started(self._clock.attempts, self._saver.stall_seconds())

    def _hand_everything_over(self, name: str | None) -> InFlight:
        """Emit all layers as they are now, and close."""
        self._status.refuse_mixture()
        if any(stepper.halfway for stepper in self._arrangement.steppers):
            raise SetupError(
                "opt.step() was left by an exception in its middle: some layers are updated and some are not, which is no step "
                "to save. fxckpt.load() goes back to the last one that is; opt.step() goes on from here."
            )
        self._closing.close_step()
        if not self._store_checked:
            self._check_store()
        self._arrangement.look_for_names()
        self._arrangement.refresh()
        try:
            layout = self._arrangement.current_layout()
            pending = self._emitter.current = self._saver.begin(self._clock.attempts, layout, name=name)
            pending.guard.turn = self._clock.in_iteration
            with torch.no_grad():
                self._emit_rest(pending, None)
            self._raise_callback_error()
        except BaseException:
            self._closing.abort("save() failed")
            raise
        self._closing.close_step()
        return pending


class Announcer:
    """Says what runs a step, once for each way it runs, and what snapshots may take."""

    def __init__(self, arrangement: Arrangement, max_async: int):
        self._arrangement, self._max_async = arrangement, max_async
        self._described: list[tuple[int, str]] = []  # the bindings that were described last
        self._said: set[str] = set()

    def announce(self) -> None:
        """Say what was not said yet."""
        steppers = self._arrangement.steppers
        bound = [(s.bindings.number, s.describe()) for s in steppers]
        self._arrangement.unsaid = False
        if bound == self._described:
            return
        if not self._described and (size := sum(t.nbytes for t in self._arrangement.inventory.buffers.values())) >> 20:
            self._say(f"snapshots of the model's buffers take at most {size * self._max_async >> 20} MiB more")
        self._described = bound
        for i, (_, line) in enumerate(bound):
            if line:
                self._say(line, of=i)
        tensors = [t for s in steppers for _, ts in s.executor.arranged.handed_over for t in ts]
        remote = self._arrangement.emitter.is_remote
        if size := sum(t.nbytes for t in tensors if remote(t) and not t.is_contiguous()) * self._max_async:
            what = "tensors that are not in row-major order are copied on their device first"
            self._say(f"{what}, which takes at most {size / 2**20:.1f} MiB there")

    def _say(self, line: str, of: int = -1) -> None:
        """``of``: the number of the optimizer that it is about; two of one class are two lines."""
        if (key := f"{of} {line}") not in self._said:
            self._said.add(key)
            log.info("fxckpt: %s", line)
