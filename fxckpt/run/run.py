"""One run: its optimizers, one store, and the parts that step, capture, emit and close.

What is captured when:

    during opt.step()   parameters and optimizer state, layer by layer (the ops of the StepGraph)     stepping, emitting
    at its end          buffers, random generators, data loaders                                      capture
    when it closes      schedulers, scalers and all other extras, param_groups, which gradients exist closing, capture
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from fxckpt.compat import cuda
from fxckpt.compat.modules import unwrap_model
from fxckpt.config import Config
from fxckpt.errors import SetupError
from fxckpt.graph.step_graph import StepGraph
from fxckpt.optim.stepper import Stepper
from fxckpt.run import extra_state
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.capture import Capture
from fxckpt.run.clock import RunStatus, StepClock
from fxckpt.run.closing import Closing
from fxckpt.run.emitting import Emitter
from fxckpt.run.hooks import watch_scalers
from fxckpt.run.stepping import Stepping
from fxckpt.saving import tracing
from fxckpt.saving.engines import CheckpointEngine
from fxckpt.saving.saver import Saver
from fxckpt.saving.stores import CheckpointStore

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
        extra: Mapping[str, Any] | None,
        config: Config,
        engine: CheckpointEngine | None,
        store: CheckpointStore,
        devices: cuda.Devices | None = None,
    ):
        extras = extra_state.extras(extra)  # raises for what has no state, before anything is taken
        self.optimizers: list[torch.optim.Optimizer] = list(optimizers)
        self.directory: str = directory
        self.config: Config = config
        self.engine: CheckpointEngine | None = engine
        self.store: CheckpointStore = store
        self.clock: StepClock = StepClock()
        self.status: RunStatus = RunStatus(engine is not None)
        self.saver: Saver = Saver(engine, store, max_async=config.max_async)
        self.emitter: Emitter = Emitter(cast(CheckpointEngine, engine), self.saver, devices or cuda.Devices(), config.on_layer)
        self.emitter.ordinals |= self.emitter.devices.all_of(
            p for opt in optimizers for g in opt.param_groups for p in g["params"]
        )
        self.arrangement: Arrangement = Arrangement(
            None if model is None else unwrap_model(model), self.optimizers, self.emitter, config
        )
        self.capture: Capture = Capture(extras, self.arrangement, self.emitter, self.clock)
        self.closing: Closing = Closing(self.capture, self.arrangement, self.emitter, self.saver, self.clock, self.status)
        self.stepping: Stepping = Stepping(
            self.arrangement, self.closing, self.emitter, self.saver, self.clock, self.status, config
        )
        self.arrangement.hooks.tell(self.closing)
        watch_scalers(extra, self.optimizers, self.stepping)
        self.late_owners: object = None  # what a load left for modules that the compiler has not shown yet; kept here only
        self.tracing: tracing.Tracing | None = tracing.from_environment(self.saver.flights, engine, self.number)
        live_runs.add(self)
        weakref.finalize(self, Saver.abandon, self.saver).atexit = False  # at exit, shutdown has run already

    # -- what it is about --------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """What the ops of its StepGraphs know it by; runs of a process count up."""
        return self.emitter.number

    @property
    def model(self) -> torch.nn.Module | None:
        """The model that was given, without wrappers."""
        return self.arrangement.model

    @property
    def steppers(self) -> list[Stepper]:
        """One for each optimizer, in their order."""
        return self.arrangement.steppers

    @property
    def active(self) -> bool:
        """Checkpoints are taken: the run was not shut down, and this is not a forked child."""
        return self.status.active

    def trained(self) -> set[int]:
        """The ids of the parameters of its optimizers."""
        return {id(p) for opt in self.optimizers for group in opt.param_groups for p in group["params"]}

    def graphs(self) -> list[StepGraph]:
        """The StepGraph of each optimizer, written anew if something was replaced."""
        with self.closing.between_steps:
            self.arrangement.refresh()
            return [stepper.graph for stepper in self.steppers]

    # -- what its handle asks of it ----------------------------------------------------------------------------------

    def save(self, name: str | None) -> None:
        """A full checkpoint of the state as it is now, waited for; raises what made it fail. Nothing if all is turned off."""
        if self.engine is None:
            log.warning("fxckpt is off (FXCKPT_DISABLE=1): nothing is saved")
            return
        if not self.active:
            raise SetupError("this run takes no checkpoints: it was shut down or disabled, or this is a forked process")
        self.stepping.save(name)

    def flush(self, timeout: float | None = None) -> None:
        """Close the step, and wait for the checkpoints in flight; from inside ``opt.step()`` (a signal's handler, a hook) for
        those of steps before it."""
        self.closing.end_step(timeout)
        self.saver.flush(timeout, unclosed=not self.closing.inside_a_step())

    def shutdown(self, timeout: float | None = None, *, unfinished: bool = False) -> None:
        """Finish what was started, then stop. Later steps train on without checkpoints.

        ``unfinished``: an exception ended the script, perhaps between ``opt.step()`` and ``scheduler.step()``, so the
        checkpoint of a step that has not closed is dropped; the one before it is complete.
        """
        if not self.active:
            return
        closing = self.closing
        try:
            if unfinished:
                closing.drop("the script ended with an exception before the step closed")
            closing.end_step(timeout)
        finally:
            self.status.stopped = True
            try:
                if self.tracing is not None:
                    self.saver.flush(timeout, unclosed=not closing.inside_a_step())
            finally:
                if self.tracing is not None:
                    self.tracing.__exit__()
                self.saver.stop(timeout, unclosed=not closing.inside_a_step())

    # -- what a load asks of it --------------------------------------------------------------------------------------

    def prepare_load(self) -> None:
        """Live tensors are about to be replaced: drop a checkpoint whose step has not closed, and wait for the others."""
        self.closing.drop("load() replaces the state")
        self.saver.flush(None)

    def continue_from(self, step: int, updates: int, iteration: int) -> None:
        """A load put the state of this step into the live tensors: the run goes on from there."""
        self.clock.attempts, self.clock.iteration = step, iteration
        self.clock.applied.set(updates)
        self.stepping.schedule.started(step, self.saver.stall_seconds())
        for stepper in self.steppers:
            stepper.halfway, stepper.accumulated = False, True  # its gradients may wait for a step
            stepper.invalidate()
        self.saver.tally.last_handed_over = self.saver.tally.last_committed = step  # durable: it was just read

    def mark_loaded(self, directory: str | os.PathLike[str], generation: int | None) -> None:
        """What comes next continues this checkpoint of ``directory``; None: there was none to load. What is loaded from another
        store than the run's own begins a lineage here, and does not stand in for what lies here and was not loaded."""
        if os.path.realpath(directory) == os.path.realpath(self.directory):
            self.store.mark_loaded(generation)


def the_run() -> Run:
    """The one live run. Raises SetupError if there is none, or several (listing them)."""
    runs = sorted((run for run in live_runs if not run.status.stopped), key=lambda run: run.number)
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise SetupError("there is no run: call fxckpt.compile_step(optimizer) first, or say which directory to load")
    listed = "\n".join(f"  {run.directory!r}: {', '.join(type(o).__name__ for o in run.optimizers)}" for run in runs)
    raise SetupError(f"{len(runs)} runs are live; pass optimizer= (or dir=) to say which:\n{listed}")
