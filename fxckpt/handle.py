"""``opt.ckpt``: what a user can ask of a run."""

from __future__ import annotations

import os
import signal
from typing import Any

from fxckpt.errors import SetupError
from fxckpt.graph.step_graph import StepGraph
from fxckpt.run.run import Run
from fxckpt.run.signals import Finisher
from fxckpt.saving.tracing import Tracing


class Handle:
    """A run's handle. All optimizers of a run share it."""

    def __init__(self, run: Run):
        self._run = run

    def save(self, name: str | None = None) -> None:
        """Take a full checkpoint of the state as it is now and wait until it is durable. Called in another thread than the one
        that trains, it waits for the end of an ``opt.step()``; buffers and random generators are as that thread finds them,
        which gradients exist is as when a step closed last, what they have accumulated is not stored, and of several
        optimizers each may have made another step.

        With ``name`` it goes to ``named/<name>/`` and is never recycled. Raises SaveFailed if it could not be written.
        """
        self._run.save(name)

    def flush(self, timeout: float | None = None) -> None:
        """Close the step, and return once every checkpoint that was started is durable. Call it where the step is complete,
        in the thread that trains, or a scheduler's state may be that of the step before; another thread waits for the end
        of an ``opt.step()``.

        Raises the first failure that was not raised yet, TimeoutError after ``timeout`` seconds.
        """
        if self._run.active:
            self._run.flush(timeout)

    def shutdown(self, timeout: float | None = None) -> None:
        """``flush``, then stop; training goes on without checkpoints. Also runs at exit. Idempotent."""
        self._run.shutdown(timeout)

    def end_step(self) -> None:
        """Say that the state after the last ``opt.step()`` is complete (schedulers stepped, counters counted)."""
        self._run.closing.end_step()

    def finish_on_signal(self, number: int = signal.SIGTERM) -> None:
        """When this signal comes, finish the checkpoint of the current step, or take one of the next, and then do what would
        have been done: call the handler that was installed before, or end the process. A second signal does not wait.

        Call it in the main thread, after installing a handler of your own; SetupError elsewhere. For schedulers that announce
        a preemption with SIGTERM, half a minute before SIGKILL.
        """
        Finisher(self._run, number)

    def note(self, **metrics: float) -> None:
        """Attach metrics to the record of the checkpoint whose step closes next; ``keep_best`` looks at them.

            opt.ckpt.note(loss=loss.item(), accuracy=0.93)

        Numbers, or tensors with one element (their value is read at once). A name that is noted again replaces the value
        before it. Raises SetupError for anything else.
        """
        self._run.capture.note(metrics)

    @property
    def graph(self) -> StepGraph:
        """The StepGraph of the run's (first) optimizer. Raises SetupError before its first step."""
        return self.graphs[0]

    @property
    def graphs(self) -> list[StepGraph]:
        """The StepGraph of each optimizer of the run."""
        return self._run.graphs()

    @property
    def directory(self) -> str:
        """The store."""
        return self._run.directory

    def statistics(self) -> dict[str, Any]:
        """Counters of the run; steps are ``opt.step()`` attempts, times in seconds, sizes in bytes.

        ``last_handed_over_step``: all its bytes are copied and its state is closed. ``last_committed_step``: it is
        durable. Both are None before the first; after ``load`` they are the step that was loaded, until a later one is.
        """
        run, tally = self._run, self._run.saver.tally
        engine = run.engine.statistics() if run.engine is not None else {}
        return {
            "steps": run.clock.attempts,
            "checkpoints_started": tally.started,
            "checkpoints_committed": tally.committed,
            "checkpoints_skipped": tally.skipped,
            "checkpoints_failed": tally.failed,
            "last_handed_over_step": tally.last_handed_over,
            "last_committed_step": tally.last_committed,
            "bytes_written": int(engine.get("bytes_written", 0)),
            "stall_seconds": tally.wait_seconds + engine.get("stall_seconds", 0.0),
            "copy_seconds": engine.get("copy_seconds", 0.0),
            "write_seconds": engine.get("write_seconds", 0.0),
            "staging_bytes": int(engine.get("staging_bytes", 0)),
            "layers": sum(len(stepper.layers) for stepper in run.steppers),
            "last_error": None if tally.last_error is None else str(tally.last_error),
        }

    def trace(self, path: str | os.PathLike, beside: str | os.PathLike | None = None) -> Tracing:
        """``with opt.ckpt.trace("trace.json"):`` records what happens inside, for Perfetto; see ``fxckpt/saving/tracing.py``.

        ``beside``: a Chrome trace that torch.profiler exports inside the ``with``, to be shown in the same picture.
        """
        run = self._run
        if run.engine is not None and not run.active:
            raise SetupError("this run takes no checkpoints: there is nothing to trace")
        return Tracing(run.saver.flights, run.engine, path, beside)

    def __repr__(self) -> str:
        found = self.statistics()
        return (
            f"<fxckpt run in {self._run.directory!r}: step {found['steps']}, last committed "
            f"{found['last_committed_step']}, {found['checkpoints_failed']} failed>"
        )
