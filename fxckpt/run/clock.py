"""The counts of a run, when a checkpoint is due, and what may be done at this moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fxckpt.errors import SetupError

MINIMUM_INTERVAL = 60.0  # seconds between checkpoints of every="auto": a disk has a write endurance
STALL_BUDGET = 0.01  # of training time, for "auto" and "continuous"


class Applied:
    """How many updates were made, where a device may decide that one is skipped (``found_inf`` on it).

    Counting never waits: what is not known yet is resolved where the number is needed.
    """

    def __init__(self) -> None:
        self._known = 0
        self._waiting: list[Callable[[], torch.Tensor]] = []

    def add(self, skipped: Callable[[], torch.Tensor] | None = None) -> None:
        """One more attempt; ``skipped`` gives 1 where the device skipped it."""
        if skipped is None:
            self._known += 1
            return
        self._waiting.append(skipped)
        if len(self._waiting) > 64:
            done, self._waiting = self._waiting[:-32], self._waiting[-32:]  # iterations behind: nothing to wait for
            self._known += sum(not bool(flag().item()) for flag in done)

    def set(self, count: int) -> None:
        """Start over from ``count``."""
        self._known, self._waiting = count, []

    def promise(self) -> Callable[[], int]:
        """A function that gives the number as of now, to be called later and perhaps in another thread."""
        known, waiting = self._known, tuple(self._waiting)
        return lambda: known + sum(not bool(flag().item()) for flag in waiting)


@dataclass
class StepClock:
    """Where training stands. ``attempts``: calls of the leading ``opt.step()``; ``applied``: those that changed parameters;
    ``iteration``, ``epoch``: those of ``fxckpt.steps``, ``batches`` and ``epochs`` that are complete; ``counts_iterations``: the
    script asked for iterations by ``fxckpt.steps``; ``in_iteration``: one is under way, and only its end closes a step;
    ``interrupted``: the last one was left by a ``break`` or an exception, so what its step began has no boundary yet;
    ``uncounted``: the iteration under way will count in ``iteration``; ``thread``: the one that asks for batches, while a pass
    runs whose iterations are boundaries."""

    attempts: int = 0
    applied: Applied = field(default_factory=Applied)
    iteration: int = 0
    epoch: int = 0
    counts_iterations: bool = False
    in_iteration: bool = False
    interrupted: bool = False
    uncounted: bool = False
    thread: int | None = None

    def iteration_of(self, step: int) -> int:
        """The number of iterations that are complete when the step under way closes."""
        return self.iteration + self.uncounted if self.counts_iterations else step


class Schedule:
    """When the next checkpoint is due.

    Every N-th step: due when a multiple of N was reached since the last one. ``"auto"`` and ``"continuous"``: when the
    interval has passed and the stall that the last checkpoint caused, measured, stays under the budget over the time
    since. The first one is due at once under ``"continuous"``, after the interval under ``"auto"``.
    """

    def __init__(self, every: int | str):
        self.every = every
        self.waits: bool = not isinstance(every, str)  # wait for a free place in flight, or skip
        self.interval: float = MINIMUM_INTERVAL if every == "auto" else 0.0
        self.last_step: int = 0
        self.last_time: float = time.monotonic()
        self.last_cost: float = 0.0  # seconds of stall that the last checkpoint caused
        self.owed: bool = False  # one was begun and could not be finished: the next boundary takes another
        self._stall_before: float | None = None

    def due(self, step: int, stall_seconds: float) -> bool:
        """Is a checkpoint due at this step? ``stall_seconds`` is the run's total so far."""
        if self.owed:
            return True
        if isinstance(self.every, int):
            return step // self.every > self.last_step // self.every
        since = time.monotonic() - self.last_time
        if self._stall_before is not None:
            self.last_cost = max(self.last_cost / 2, stall_seconds - self._stall_before)
        return since >= self.interval and self.last_cost <= STALL_BUDGET * max(since, 1e-3)

    def started(self, step: int, stall_seconds: float) -> None:
        """A checkpoint of this step was begun (or, with ``load``, found)."""
        self.last_step, self.last_time, self._stall_before = step, time.monotonic(), stall_seconds
        self.owed = False


class RunStatus:
    """What the run may do: checkpoints end with ``shutdown`` and in a forked child, steps where a load left a mixture."""

    def __init__(self, enabled: bool):
        self.enabled: bool = enabled
        self.pid: int = os.getpid()
        self.stopped = False
        self.partially_loaded: str | None = None  # why the live tensors are a mixture that must not be trained
        # A signal came: the next checkpoint is the last. Told in any thread when its step has closed.
        self.ending: Callable[[], None] | None = None

    @property
    def active(self) -> bool:
        """Checkpoints are taken: the run was not shut down, and this is not a forked child."""
        return self.enabled and not self.stopped and os.getpid() == self.pid

    @contextmanager
    def loading_at_once(self) -> Iterator[None]:
        """Around the first and only reading of a checkpoint into a run that has not stepped, or one that other ranks may end.
        Should a chunk prove bad halfway, an older checkpoint overwrites all of the same tensors; if there is none, the run takes
        no step with the mixture."""
        self.partially_loaded = "one could not be read to its end, here or on another rank, and none was loaded after it"
        yield
        self.partially_loaded = None  # not if it was left by an exception

    def refuse_mixture(self) -> None:
        """Raises SetupError while the model holds parts of a corrupt checkpoint."""
        if self.partially_loaded is not None:
            what = f"the model holds parts of a corrupt checkpoint: {self.partially_loaded}"
            raise SetupError(f"{what}. Build the model, the optimizer and the run anew.")
