"""``opt.ckpt``: what a user can ask of a run, and the counters it answers with."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Mapping
from typing import TypedDict, TypeVar

import torch

from fxckpt.engine import EngineStatistics
from fxckpt.errors import SetupError
from fxckpt.graph.step_graph import StepGraph
from fxckpt.run.run import Run
from fxckpt.run.signals import Finisher
from fxckpt.saving.listeners import Committed, Failed
from fxckpt.saving.tracing import Tracing

NO_ENGINE: EngineStatistics = {
    "bytes_written": 0, "staging_bytes": 0, "staging_peak_bytes": 0,
    "copy_seconds": 0.0, "write_seconds": 0.0, "stall_seconds": 0.0,
}  # fmt: skip
"""Where fxckpt is off."""


OnCommit = TypeVar("OnCommit", bound=Callable[[Committed], object])
OnFailure = TypeVar("OnFailure", bound=Callable[[Failed], object])


class Statistics(TypedDict):
    """Counters of a run; steps are ``opt.step()`` attempts, times in seconds, sizes in bytes."""

    steps: int
    """Attempts so far, those that a scaler skipped included."""
    checkpoints_started: int
    checkpoints_committed: int
    records_committed: int
    """Of these, records of the journal."""
    checkpoints_skipped: int
    checkpoints_failed: int
    last_handed_over_step: int | None
    """All its bytes are copied and its state is closed. None before the first."""
    last_committed_step: int | None
    """It is durable. None before the first; after ``load`` the step that was loaded, until a later one is."""
    bytes_written: int
    stall_seconds: float
    """What the thread that trains has waited for copies and checkpoints."""
    copy_seconds: float
    write_seconds: float
    staging_bytes: int
    layers: int
    last_error: str | None
    replicas_sent: int
    """Of this rank's checkpoints, durable on another rank's disk (``replicas=1``)."""
    replicas_failed: int
    last_replicated_step: int | None
    """Up to which step the other rank has this one's. None before the first, and without ``replicas=1``."""
    replica_lag_steps: int
    """How many steps that is behind ``last_committed_step``."""


class Handle:
    """A run's handle. All optimizers of a run share it, and who has it keeps them."""

    def __init__(self, run: Run):
        self._run, self._kept = run, run.optimizers

    def save(self, name: str | None = None) -> None:
        """Take a full checkpoint of the state as it is now, and wait until it is durable.

        Called in another thread than the one that trains, it waits for the end of an ``opt.step()``. Buffers and random
        generators are then as that thread finds them, which gradients exist is as when a step closed last, and what they
        have accumulated is not stored; of several optimizers each may have made another step.

        Args:
            name: it goes to ``named/<name>/`` and is never recycled. Without one it is a checkpoint like all others. A run that
                went on from before a named save takes it again, in its place, as the same command does after a kill.

        Raises:
            SaveFailed: it could not be written. SetupError: a name that cannot be one, or the run was shut down.
            FxckptError: this run, or the checkpoint that it went on from, has one of that name.
        """
        self._check_thread("save")
        self._run.stepping.save(name)

    def flush(self, timeout: float | None = None) -> None:
        """Close the step, and return once every checkpoint that was started is durable.

        Call it where the step is complete, in the thread that trains, or a scheduler's state may be that of the step
        before; another thread waits for the end of an ``opt.step()``.

        Args:
            timeout: seconds to wait at most; None for as long as it takes.

        Raises:
            The first failure that was not raised yet, a SaveFailed or StoreError; TimeoutError after ``timeout``.
        """
        self._check_thread("flush")
        self._run.flush(timeout)

    def shutdown(self, timeout: float | None = None) -> None:
        """``flush``, then stop; training goes on without checkpoints. Also runs at exit. Idempotent.

        Args:
            timeout: seconds to wait at most for what is in flight; None for as long as it takes.

        Raises:
            What ``flush`` raises, after the run was stopped.
        """
        self._check_thread("shutdown")
        self._run.shutdown(timeout)

    def end_step(self) -> None:
        """Say that the state after the last ``opt.step()`` is complete (schedulers stepped, counters counted)."""
        self._run.stepping.rest()

    def finish_on_signal(self, number: int = signal.SIGTERM) -> None:
        """Have a signal end the run with a last checkpoint.

        When it comes, the checkpoint of the current step is finished, or one of the next is taken. Then what would have been
        done is done: the handler that was installed before is called, or the process ends. A second signal does not wait.
        For schedulers that announce a preemption with SIGTERM, half a minute before SIGKILL.

        Args:
            number: the signal.

        Raises:
            SetupError: not in the main thread. Install a handler of your own before you call this.
        """
        Finisher(self._run, number)

    def note(self, **metrics: float | torch.Tensor) -> None:
        """Attach metrics to the record of the checkpoint whose step closes next; ``keep_best`` looks at them.

            opt.ckpt.note(loss=loss.item(), accuracy=0.93)

        Args:
            metrics: numbers, or tensors with one element (their value is read at once). A name that is noted again
                replaces the value before it.

        Raises:
            SetupError: anything else.
        """
        self._run.capture.note(metrics)

    def on_commit(self, callback: OnCommit) -> OnCommit:
        """Have a function called with a :class:`~fxckpt.Committed` for each checkpoint that is durable from now on.

            @opt.ckpt.on_commit
            def log(done: fxckpt.Committed) -> None:
                writer.add_scalar("checkpoint/seconds", done.seconds, done.step)

        It is called on the thread that commits, one checkpoint after the other, while training goes on: keep it short, for the
        next commit waits for it, and lock what it shares with the training thread. ``flush`` and ``save`` return after the calls
        for what they waited for; inside a callback they, and ``shutdown``, raise SetupError. What it raises is logged the first
        time, and costs no checkpoint. Under ``writer="mock"`` it is called for each checkpoint that would have been written.

        Args:
            callback: takes one argument; what it returns is ignored.

        Returns:
            ``callback``, so that this can decorate it.
        """
        self._run.listeners.add(Committed, callback)
        return callback

    def on_failure(self, callback: OnFailure) -> OnFailure:
        """Have a function called with a :class:`~fxckpt.Failed` for each checkpoint that fails from now on.

        It is called as by ``on_commit``. A checkpoint that was dropped because another takes its place is no failure.

        Args:
            callback: takes one argument; what it returns is ignored.

        Returns:
            ``callback``, so that this can decorate it.
        """
        self._run.listeners.add(Failed, callback)
        return callback

    def _check_thread(self, method: str) -> None:
        """Raises SetupError on the thread that commits, which cannot wait for itself."""
        if self._run.saver.loop.is_current():
            raise SetupError(
                f"opt.ckpt.{method}() waits for the thread that commits, and was called on it, by a callback of on_commit or "
                "on_failure: note what is to be done, and do it in the thread that trains"
            )

    @property
    def graph(self) -> StepGraph:
        """The StepGraph of the run's first optimizer. Raises SetupError before its first step.

        ``print`` it, ``draw("graph.svg")`` it, or ask for its ``table()``.
        """
        return self.graphs[0]

    @property
    def graphs(self) -> list[StepGraph]:
        """The StepGraph of each optimizer of the run, in the order of the list. Raises SetupError before their first step."""
        run = self._run
        with run.closing.between_steps:
            run.arrangement.refresh()  # written anew if something was replaced
            return [stepper.executor.arranged.graph for stepper in run.steppers]

    @property
    def epoch(self) -> int:
        """The number of the epoch of ``fxckpt.epochs`` that is under way; after ``load`` that of the checkpoint."""
        return self._run.clock.epoch

    @property
    def batch(self) -> int:
        """Batches of the pass over ``fxckpt.batches`` that are behind. After ``load`` those of the checkpoint's pass, so that
        ``enumerate(fxckpt.batches(loader), opt.ckpt.batch)`` counts on."""
        return self._run.loops.batch

    def state_dict(self) -> dict[str, int]:
        """Where the run stands: ``step``, ``updates`` and ``iteration``, as in :class:`~fxckpt.Restored`.

        For another way of saving beside this one: ``accelerator.register_for_checkpointing(opt.ckpt)``.
        """
        clock = self._run.clock
        return {"step": clock.attempts, "updates": clock.applied.promise()(), "iteration": clock.iteration_of(clock.attempts)}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Say that the state of that step was put into model and optimizer by other means, and train on from there.

        Args:
            state_dict: what :meth:`state_dict` gave.

        Raises:
            SetupError: it is something else.
        """
        wanted = ("step", "updates", "iteration")
        if not all(isinstance(state_dict.get(name), int) for name in wanted):
            raise SetupError(f"this is no state of opt.ckpt: it needs the numbers {', '.join(wanted)}")
        self._run.go_on_from(*(state_dict[name] for name in wanted))

    @property
    def directory(self) -> str:
        """The absolute path of the store."""
        return self._run.directory

    def statistics(self) -> Statistics:
        """The run's counters so far. Cheap, and allowed from any thread."""
        run, tally = self._run, self._run.saver.tally
        engine = run.engine.statistics() if run.engine is not None else NO_ENGINE
        replicas = run.saver.ranks.replication
        sent, failed, last = (0, 0, None) if replicas is None else replicas.tally.counts()
        return {
            "steps": run.clock.attempts,
            "checkpoints_started": tally.started,
            "checkpoints_committed": tally.committed,
            "records_committed": tally.records,
            "checkpoints_skipped": tally.skipped,
            "checkpoints_failed": tally.failed,
            "last_handed_over_step": tally.last_handed_over,
            "last_committed_step": tally.last_committed,
            "bytes_written": engine["bytes_written"],
            "stall_seconds": tally.wait_seconds + engine["stall_seconds"],
            "copy_seconds": engine["copy_seconds"],
            "write_seconds": engine["write_seconds"],
            "staging_bytes": engine["staging_bytes"],
            "layers": sum(len(stepper.executor.arranged.graph.layers) for stepper in run.steppers),
            "last_error": None if tally.last_error is None else str(tally.last_error),
            "replicas_sent": sent,
            "replicas_failed": failed,
            "last_replicated_step": last,
            "replica_lag_steps": 0 if replicas is None else max((tally.last_committed or 0) - (last or 0), 0),
        }

    def trace(self, path: str | os.PathLike[str], beside: str | os.PathLike[str] | None = None) -> Tracing:
        """Record what happens inside ``with opt.ckpt.trace("trace.json"):``, for Perfetto or chrome://tracing.

        Args:
            path: the file to write at the end of the ``with``.
            beside: a Chrome trace that torch.profiler exports inside the ``with``, to be shown in the same picture.

        Returns:
            A context manager. On entry it raises SetupError if the run is being traced already.
        """
        run = self._run
        if run.engine is not None and not run.status.active:
            raise SetupError("this run takes no checkpoints: there is nothing to trace")
        return Tracing(run.saver.flights, run.engine, path, beside)

    def __repr__(self) -> str:
        found = self.statistics()
        return (
            f"<fxckpt run in {self._run.directory!r}: step {found['steps']}, last committed "
            f"{found['last_committed_step']}, {found['checkpoints_failed']} failed>"
        )


def handle_of(run: Run) -> Handle:
    """The one handle of this run; made anew where nobody has it."""
    found = run.handle()
    if not isinstance(found, Handle):
        found = Handle(run)
        run.handle = weakref.ref(found)
    return found
