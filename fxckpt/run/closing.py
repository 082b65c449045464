"""When a step is complete ("closes"), and what happens to its checkpoint then.

A step is complete later than ``opt.step()`` returns, because a scheduler, a scaler or an EMA changes after it: at the
boundary of an iteration of ``fxckpt.steps``, ``epochs`` or ``batches``. In a loop without boundaries it is when the first
gradient of the next backward arrives, at the next ``opt.step()``, or at ``flush``, ``save``, ``shutdown`` and ``end_step``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from fxckpt.compat.tensors import backward_under_way
from fxckpt.engine import is_owned
from fxckpt.errors import Cancelled, FxckptError, SetupError
from fxckpt.optim.stepper import Stepper
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.capture import Capture
from fxckpt.run.clock import RunStatus, StepClock
from fxckpt.saving.guard import WAY_OUT, Changed, Mixed
from fxckpt.saving.in_flight import InFlight


class Moved(Changed, Cancelled):
    """What was taken at the end of ``opt.step()`` is not of this instant, which is one that a checkpoint may be of."""


class Closing:
    """Holds the checkpoint whose layers were emitted and whose step has not closed yet: ``open``.

    ``between_steps`` is held by a step, and by what another thread may do only between two of them.
    """

    def __init__(self, capture: Capture, arrangement: Arrangement, clock: StepClock, status: RunStatus):
        self._capture, self._arrangement, self._clock, self._status = capture, arrangement, clock, status
        self._plain = capture.plain
        self._emitter, self._saver = arrangement.emitter, arrangement.emitter.saver
        self.between_steps: threading.RLock = threading.RLock()
        self.open: InFlight | None = None
        self._lock = threading.RLock()
        self._backward: int | None = None  # the one that the last step was made in
        self._capturable = False  # all that a checkpoint takes could be captured at least once

    def gradient_arrived(self, index: int) -> None:
        """The next backward has begun: what the step before it left is complete."""
        self._saver.trainer.progress_ticks += 1
        stepper = self._arrangement.steppers[index]
        if not stepper.accumulated or self._plain.watching or (self.open is not None and not self._clock.in_iteration):
            self._backward_began(stepper)

    def _backward_began(self, stepper: Stepper) -> None:
        """A backward that is captured as a CUDA graph leaves no gradient: its replays do, and the step closes at the next
        ``opt.step()``. To read ``extra=`` objects inside the capture would break it."""
        if self._emitter.ordinals and self._emitter.devices.capturing():
            return
        self.first_backward()
        if self.open is not None and not self._clock.in_iteration and backward_under_way() != self._backward:
            self.close_step(in_backward=True)
        stepper.accumulated = True

    def backward_in_graph(self) -> None:
        """The compiled function that makes the next step has come behind its backward: as ``gradient_arrived``, where autograd
        runs no hooks."""
        self._saver.trainer.progress_ticks += 1
        self.first_backward()
        if self.open is not None and not self._clock.in_iteration:
            self.close_step(in_backward=True)

    def first_backward(self) -> None:
        """The first turn since the start has come to its backward."""
        if self._plain.watching:
            self._plain.first_gradient(plain=not self._clock.in_iteration)

    def take(self, pending: InFlight) -> None:
        """All layers of this checkpoint were emitted: what is captured at the end of ``opt.step()`` is taken now, and the
        rest when the step closes."""
        pending.guard.note_versions()
        with self._lock:  # a backward that goes on in another thread closes it only when all is captured
            if not self._clock.in_iteration:
                try:
                    self._capture.early(pending)
                    self._plain.step_ended()
                except Exception as error:
                    self._not_captured(pending, error)
            self._emitter.current, self.open, self._backward = None, pending, backward_under_way()

    def close_step(self, in_backward: bool = False, at_rest: bool = False) -> bool:
        """The state after the last optimizer step is complete: capture what changes after it, and hand it over. False if its
        checkpoint had to be dropped, because something that was taken already has changed since. ``at_rest``: the caller can
        take another one of this instant then; else only what no backward changes is looked at.

        Whether a gradient exists is asked in the thread that trains, or by autograd itself (``in_backward``), for elsewhere a
        backward may be setting it at this moment. Another thread takes what was found there last.
        """
        if not at_rest:
            self.left()
        with self._lock:
            pending, self.open = self.open, None
            if pending is None or pending.given_up is not None or not self._status.active:
                return True
            try:
                if (name := self._capture.replaced(pending, at_rest)) is not None:
                    raise Moved(
                        f"{name!r} was replaced after opt.step(), and step {pending.step} has no place for what is there now"
                    )
                if not pending.captured:
                    self._capture.early(pending)
                elif at_rest and not self._capture.has_gone_on() and self._plain.moved():
                    raise Moved("the script went on after opt.step(), and another one is taken")
                elif in_backward:
                    self._plain.check(pending.step)
                self._check_unchanged(pending)
                self._capture.hand_over_rest(pending)
                _check_complete(pending)
                trains = self._saver.trainer.thread
                if in_backward or threading.current_thread() is trains or not trains.is_alive():
                    self._capture.look_at_gradients()
                record, tensors = self._capture.late(pending)
            except Changed as error:
                if at_rest:
                    pending.replaced = True
                    pending.give_up(str(error))
                else:
                    self._emitter.discard(pending, error)
                return False
            except Exception as error:
                if pending.given_up is None:  # else it ended meanwhile, for a reason of its own
                    self._not_captured(pending, error)
                return True
            except BaseException:
                pending.give_up("its state could not be captured")
                raise
            pending.close(record, tensors)
            self._capturable = True
        if (ending := self._status.ending) is not None:
            ending()
        return True

    def resting(self, timeout: float | None, do: Callable[[], None]) -> None:
        """Call ``do`` between two steps, from any thread that is not ``occupied``. Raises TimeoutError if a step does not end,
        after ``timeout`` seconds or, without one, after those for which training itself waits."""
        limit = 2 * self._saver.loop.stuck_after if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)
        try:
            if not self.between_steps.acquire(timeout=limit):
                raise TimeoutError(f"opt.step() has not ended after {limit:.3g} s")
            do()
        finally:
            try:  # noqa: SIM105  nothing comes before this call that could be interrupted: the lock would stay taken
                self.between_steps.release()
            except RuntimeError:  # it was not had
                pass

    def occupied(self) -> bool:
        """Is this thread inside a step or a boundary, or closing one? Then a handler of a signal, or a hook, called."""
        return is_owned(self.between_steps) or is_owned(self._lock)

    def refuse_inside(self, what: str, hooks: bool = True) -> None:
        """Raises SetupError if this thread is at an instant that it cannot wait at: what it waits for may need what it holds.
        ``hooks``: ``on_layer`` may do it, for it is called where nothing of that kind is held."""
        if self.occupied() and not (hooks and self._emitter.calling):
            raise SetupError(
                f"{what} was called inside opt.step() or the end of a step, as by a signal's handler: this thread cannot wait "
                "for itself. Call opt.ckpt.finish_on_signal() instead, which takes the checkpoint when the step is complete; "
                f"or have the handler set a flag, and call {what} in the loop"
            )

    def forget(self) -> None:
        """In a forked child: what is open is the parent's, and so are the threads that may have had the locks."""
        self.between_steps, self._lock, self.open = threading.RLock(), threading.RLock(), None

    def give_up(self, why: str) -> None:
        """The iteration went on where its checkpoint cannot follow; the boundary takes another."""
        if self.open is not None:
            self.open.replaced = True
            self.open.give_up(why)
            self.open = None

    def left(self) -> None:
        """If an iteration was left before its end, its checkpoint goes; what follows is no part of it."""
        if self._clock.interrupted:
            self.give_up("its iteration was left before its end")
            self._clock.interrupted = False

    def drop(self, why: str) -> None:
        """Tensors are about to be replaced: wait for copies, and drop a checkpoint whose step has not closed."""
        with self._lock:
            pending, self.open = self.open, None
        if pending is not None:
            pending.give_up(why)
        self._emitter.fence_all()

    def abort(self, why: str) -> None:
        """An exception inside a step: its checkpoint is dropped, its fences are released."""
        self._emitter.current = None
        self.reap(why)

    def reap(self, why: str) -> None:
        """Give up checkpoints that nobody would ever close: Ctrl-C came before the one that was begun was known here, or when it
        was not ``open`` any more. Between two steps, or at the end of one."""
        for pending in self._saver.flights.under_way():
            if pending is not self.open and not pending.closed.is_set():
                pending.give_up(why)

    def first_boundary(self) -> None:
        """What the first iteration changed, the next ones will: it is copied in memory from the first checkpoint on."""
        self._emitter.changed_outside |= self._capture.moving()

    def changes_in_forward(self) -> frozenset[str] | None:
        """The parameters that a forward was seen to change; None if the first turn was not seen."""
        if self._plain.changed is None:
            return None
        return frozenset(name for kind, name in self._plain.changed if kind == "parameter")

    def _not_captured(self, pending: InFlight, error: Exception) -> None:
        """An object of ``extra=`` raised, or has state that cannot be stored. At the first checkpoint that is a wrong setup, and
        raised; once it could be captured it is a failed save, of which training does not die."""
        if self._capturable:
            pending.fail(error)
        pending.give_up(f"its state could not be captured: {error}")
        if not self._capturable:
            raise error
        self._saver.tally.note_failure(pending.step, error)

    def _check_unchanged(self, pending: InFlight) -> None:
        """Raises Changed if a tensor that was handed over was changed or replaced since."""
        if replaced := [name for stepper in self._arrangement.steppers for name in stepper.bindings.replaced()]:
            what = f"{replaced[0]!r} or its state was replaced after opt.step(), before the step closed"
            how = f"is discarded (opt.ckpt.end_step() closes it in time). {WAY_OUT}"
            raise Mixed(f"{what}; the checkpoint of step {pending.step} {how}")
        numbers = pending.layout.number
        pending.guard.compare([*numbers("update"), *numbers("frozen"), *numbers("gradients")])
        if self._emitter.chain is not None:
            self._emitter.chain.check_closed(pending)


def _check_complete(pending: InFlight) -> None:
    """All layers were emitted; a dropped op would go unseen otherwise."""
    if (emitted := pending.copy.emitted()) != (planned := len(pending.layout.layers)):
        what = f"step {pending.step}: {emitted} of {planned} layers were emitted"
        raise FxckptError(f"{what}; was dead code elimination run on the StepGraph?")
