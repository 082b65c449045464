"""One run: its optimizers, one store, and the parts that step, capture, emit and close."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import cast

import torch

from fxckpt.compat import cuda
from fxckpt.compat.optimizers import mark_stepped
from fxckpt.config import AUTO, Config
from fxckpt.engine import Engine
from fxckpt.errors import SetupError
from fxckpt.journal.chain import Chain
from fxckpt.journal.length import Trial
from fxckpt.optim.stepper import Stepper
from fxckpt.ranks.replication import Replication
from fxckpt.run import extra_state
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.capture import Capture
from fxckpt.run.clock import RunStatus, StepClock
from fxckpt.run.closing import Closing
from fxckpt.run.emitting import Emitter
from fxckpt.run.hooks import watch_scalers
from fxckpt.run.loops import Loops
from fxckpt.run.model_config import config_of
from fxckpt.run.one_graph import OneGraph, Step
from fxckpt.run.stepping import Stepping
from fxckpt.saving import tracing
from fxckpt.saving.inventory import trained_by
from fxckpt.saving.listeners import Listeners
from fxckpt.saving.saver import Saver
from fxckpt.saving.stores import CheckpointStore
from fxckpt.store.record_pool import records_that_fit

log: logging.Logger = logging.getLogger("fxckpt")

live_runs: weakref.WeakSet[Run] = weakref.WeakSet()
"""The runs that ``compile_step`` made and that are still alive: a run lives as long as its optimizers do."""


class Run:
    """What one ``compile_step`` call registers. The user's handle on it is ``opt.ckpt``."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        directory: str,
        model: torch.nn.Module | None,
        extras: Sequence[extra_state.Extra],
        config: Config,
        engine: Engine | None,
        store: CheckpointStore,
        devices: cuda.Devices,
        step: Step,
        replication: Replication | None = None,
    ):
        self._together = list(optimizers) if len(optimizers) > 1 else []  # a run goes on until the last of them is dropped
        self.directory: str = directory
        self.config: Config = config
        self.engine: Engine | None = engine
        self.store: CheckpointStore = store
        self.clock: StepClock = StepClock()
        self.status: RunStatus = RunStatus(engine is not None)
        self.saver: Saver = Saver(
            engine, store, max_async=config.max_async, every=config.every, keep=config.keep, replication=replication
        )
        self.saver.about.config = config_of(model)
        self.listeners: Listeners = Listeners()
        self.saver.reporter.listeners = weakref.ref(self.listeners)
        self.emitter: Emitter = Emitter(cast(Engine, engine), self.saver, devices, config.on_layer)
        self.emitter.ordinals |= devices.all_of(trained_by(optimizers))
        self.arrangement: Arrangement = Arrangement(model, optimizers, self.emitter, config)
        emitter = self.emitter
        self.chain: Chain = Chain(
            config.first_journal, config.update, self.arrangement.steppers, engine, emitter.changed_outside, emitter.sources,
            devices, emitter.later, self._trial() if config.journal == AUTO else None, store.part[1],
        )  # fmt: skip
        emitter.chain = self.chain
        self.capture: Capture = Capture(extras, self.arrangement, self.clock)
        self.closing: Closing = Closing(self.capture, self.arrangement, self.clock, self.status)
        self.stepping: Stepping = Stepping(self.arrangement, self.closing, self.clock, self.status, config)
        self.one_graph: OneGraph = OneGraph(self.arrangement, self.closing, self.status, step, self.stepping.in_graph)
        self.loops: Loops = Loops(self.clock, self.stepping.boundary, self.capture.look, self.arrangement.have_gradients)
        self.capture.loops = self.loops
        self.steppers: list[Stepper] = self.arrangement.steppers  # one for each optimizer, in their order
        self.arrangement.hooks.listener = weakref.ref(self.closing)
        watch_scalers((each.live for each in extras), optimizers, self.stepping.attempt_skipped)
        self.handle: Callable[[], object] = lambda: None  # a weak reference to the user's, once there is one
        self.late_owners: object = None  # what a load left for modules that the compiler has not shown yet; kept here only
        self.tracing: tracing.Tracing | None = tracing.from_environment(self.saver.flights, engine, self.emitter.number)
        if engine is not None:
            self.capture.start()
            self.chain.whether.start()
        live_runs.add(self)
        gone = weakref.finalize(self, _end, self.saver, self.arrangement, self.capture)
        gone.atexit = False  # at exit, shutdown has run already

    def _trial(self) -> Trial:
        """What ``journal="auto"`` measures."""
        root, keep = self.store.root, self.config.keep
        return Trial(self.config.restore_seconds, lambda nbytes: records_that_fit(root, keep, nbytes))

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """In the order in which the user gave them."""
        return self.arrangement.optimizers

    def flush(self, timeout: float | None = None) -> None:
        """Close the step, and wait for the checkpoints in flight; from inside an iteration of a loop with boundaries, or inside
        ``opt.step()`` (a signal's handler, a hook), for those of steps before it. The checkpoint of an iteration that was left
        before its end goes. Nothing once it was shut down."""
        if not self.status.active:
            return
        self.closing.refuse_inside("flush()")
        if not self.clock.in_iteration:
            self.closing.left()
        self.stepping.rest(timeout)
        self.saver.flush(timeout, unclosed=not self._before_its_end())

    def _before_its_end(self) -> bool:
        """Is a step under way, or an iteration, whose checkpoint can be closed only when it goes on?"""
        return self.clock.in_iteration or self.closing.occupied() or self.stepping.in_the_middle()

    def shutdown(self, timeout: float | None = None, *, unfinished: bool = False) -> None:
        """Finish what was started, then stop. Later steps train on without checkpoints.

        ``unfinished``: the script ends, perhaps between ``opt.step()`` and ``scheduler.step()``, so the checkpoint of a step that
        has not closed is dropped: it will be made again. That of an iteration before its boundary is dropped, too.
        """
        if not self.status.active:
            return
        closing = self.closing
        closing.refuse_inside("shutdown()")
        self.stepping.leave_backward("the run was shut down before opt.step()")
        try:
            if unfinished or self.clock.in_iteration or self.clock.interrupted:
                closing.drop("the script ended before the step closed")
            self.stepping.rest(timeout)
        finally:
            self.status.stopped = True
            unclosed = not self._before_its_end()
            try:
                if self.tracing is not None:
                    self.saver.flush(timeout, unclosed)
            finally:
                try:
                    if self.tracing is not None:
                        self.tracing.__exit__()
                finally:
                    self.saver.stop(timeout, unclosed)
                    self._together.clear()  # no checkpoint needs the others any more,
                    self.capture.let_go()  # nor a scheduler, which holds its optimizer

    def end(self, failed: bool) -> None:
        """The process ends. ``failed``: with an exception. Where nobody said that the last step is complete, it must look so."""
        if failed:
            self.saver.flights.leave()
        self.shutdown(unfinished=failed or (self.closing.open is not None and self.capture.plain.unfinished()))

    def forked(self) -> None:
        """In a forked child: no lock is waited for that a thread of the parent may have held, and nothing of it is under way."""
        self.closing.forget()
        self.capture.noting = threading.RLock()
        self.saver.flights.forget()

    def dropped(self) -> None:
        """Nobody refers to an optimizer of it any more, so no step will follow: as at the end of the process. In the thread that
        commits (the garbage collector runs anywhere) it is left to ``Saver.abandon``, as that cannot wait for itself."""
        if self.status.stopped or self.saver.loop.is_current():  # stopped: at the end of the process, when modules are gone
            return
        try:
            complete = len(self.optimizers) > 0
        except ReferenceError:  # the garbage collector takes them, and no state can be read any more
            complete = False
        try:
            self.end(failed=not complete)
        except Exception as error:
            log.error("fxckpt: the optimizer is gone, and the end of its run failed: %s", error)

    def prepare_load(self) -> None:
        """Live tensors are about to be replaced: drop a checkpoint whose step has not closed, and wait for the others."""
        self.stepping.leave_backward("another state was loaded before opt.step()")
        if not self.clock.attempts:  # what the script set until now, the next process sets, too
            self.capture.values.begin(self.arrangement.model)
        self.closing.drop("load() replaces the state")
        self.saver.flush(None)

    def continue_from(self, step: int, updates: int, iteration: int) -> None:
        """A load put the state of this step into the live tensors: the run goes on from there."""
        self.clock.attempts, self.clock.iteration = step, iteration
        self.clock.applied.set(updates)
        self.stepping.schedule.started(step, self.saver.stall_seconds())
        for stepper in self.steppers:
            stepper.halfway, stepper.accumulated = False, True  # its gradients may wait for a step
            stepper.bindings.invalidate()
            if step:
                mark_stepped(stepper.opt)
        self.capture.restart()
        self.chain.stop()
        self.saver.tally.last_handed_over = self.saver.tally.last_committed = step  # durable: it was just read

    def go_on_from(self, step: int, updates: int, iteration: int) -> None:
        """Somebody else put the state of this step into the live tensors. What is committed here is what it was before."""
        self.stepping.leave_backward("another state was loaded before opt.step()")
        self.closing.drop("another state was loaded, by other means than fxckpt.load()")
        tally = self.saver.tally
        before = tally.last_handed_over, tally.last_committed
        self.continue_from(step, updates, iteration)
        tally.last_handed_over, tally.last_committed = before

    def mark_loaded(self, directory: str | os.PathLike[str], generation: int | None) -> None:
        """What comes next continues this checkpoint of ``directory``; None: there was none to load. What is loaded from another
        store than the run's own begins a lineage here, and does not stand in for what lies here and was not loaded."""
        if os.path.realpath(directory) == os.path.realpath(self.directory):
            self.store.mark_loaded(generation)


def _in_child() -> None:
    for run in list(live_runs):
        run.forked()


os.register_at_fork(after_in_child=_in_child)


def _end(saver: Saver, arrangement: Arrangement, capture: Capture) -> None:
    """The optimizers are gone. Their state is to go with them, and not wait for the garbage collector: circles are cut."""
    saver.abandon()
    capture.loops = None
    capture.values.begin(None)
    arrangement.release()


def the_run() -> Run:
    """The one live run. Raises SetupError if there is none, or several (listing them)."""
    runs = sorted((run for run in live_runs if not run.status.stopped), key=lambda run: run.emitter.number)
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise SetupError("there is no run: call fxckpt.compile_step(optimizer) first, or say which directory to load")
    listed = "\n".join(f"  {run.directory!r}: {', '.join(type(o).__name__ for o in run.optimizers)}" for run in runs)
    raise SetupError(f"{len(runs)} runs are live; pass optimizer= (or dir=) to say which:\n{listed}")
