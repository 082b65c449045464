"""When the next checkpoint is due."""

from __future__ import annotations

import time

MINIMUM_INTERVAL = 60.0  # seconds between checkpoints of every="auto": a disk has a write endurance
STALL_BUDGET = 0.01  # of training time, for "auto" and "continuous"


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
        self._stall_before: float | None = None

    def due(self, step: int, stall_seconds: float) -> bool:
        """Is a checkpoint due at this step? ``stall_seconds`` is the run's total so far."""
        if isinstance(self.every, int):
            return step // self.every > self.last_step // self.every
        since = time.monotonic() - self.last_time
        if self._stall_before is not None:
            self.last_cost = max(self.last_cost / 2, stall_seconds - self._stall_before)
        return since >= self.interval and self.last_cost <= STALL_BUDGET * max(since, 1e-3)

    def started(self, step: int, stall_seconds: float) -> None:
        """A checkpoint of this step was begun (or, with ``load``, found)."""
        self.last_step, self.last_time, self._stall_before = step, time.monotonic(), stall_seconds
