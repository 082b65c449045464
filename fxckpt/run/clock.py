"""The counts of a run, and what it may do at this moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fxckpt.errors import SetupError


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
        else:
            self._waiting.append(skipped)
        if len(self._waiting) > 64:
            self._resolve(len(self._waiting) - 32)  # these are iterations behind: nothing to wait for

    def _resolve(self, count: int) -> None:
        done, self._waiting = self._waiting[:count], self._waiting[count:]
        self._known += sum(not bool(flag().item()) for flag in done)

    def set(self, count: int) -> None:
        """Start over from ``count``."""
        self._known, self._waiting = count, []

    def now(self) -> int:
        """The number; waits for the device if it must."""
        self._resolve(len(self._waiting))
        return self._known

    def promise(self) -> Callable[[], int]:
        """A function that gives the number as of now, to be called later and perhaps in another thread."""
        known, waiting = self._known, tuple(self._waiting)
        return lambda: known + sum(not bool(flag().item()) for flag in waiting)


@dataclass
class StepClock:
    """Where training stands. ``attempts``: calls of the leading ``opt.step()``; ``applied``: those that changed parameters;
    ``iteration``: iterations of ``fxckpt.steps``, which ``counts_iterations`` if it is used; ``in_iteration``: one is under
    way, and only its end closes a step."""

    attempts: int = 0
    applied: Applied = field(default_factory=Applied)
    iteration: int = 0
    counts_iterations: bool = False
    in_iteration: bool = False

    def iteration_of(self, step: int) -> int:
        """The number of iterations that are complete when the step under way closes."""
        return self.iteration + self.in_iteration if self.counts_iterations else step


class Ending(Protocol):
    """Whoever ends the process once a checkpoint is complete."""

    def step_closed(self) -> None:
        """The state of a step is complete, and its checkpoint on its way. Called in any thread."""


class RunStatus:
    """What the run may do: checkpoints end with ``shutdown`` and in a forked child, steps where a load left a mixture."""

    def __init__(self, enabled: bool):
        self.enabled: bool = enabled
        self.pid: int = os.getpid()
        self.stopped = False
        self.partially_loaded: str | None = None  # why the live tensors are a mixture that must not be trained
        self.ending: Ending | None = None  # a signal came: the next checkpoint that is complete is the last

    @property
    def active(self) -> bool:
        """Checkpoints are taken: the run was not shut down, and this is not a forked child."""
        return self.enabled and not self.stopped and os.getpid() == self.pid

    @contextmanager
    def loading_at_once(self) -> Iterator[None]:
        """Around the first and only reading of a checkpoint into a run that has not stepped. Should a chunk prove bad halfway,
        an older checkpoint overwrites all of the same tensors; if there is none, the run takes no step with the mixture."""
        self.partially_loaded = "a checkpoint proved corrupt while it was being loaded, and no other one could be loaded after it"
        yield
        self.partially_loaded = None  # not if it was left by an exception

    def refuse_mixture(self) -> None:
        """Raises SetupError while the model holds parts of a corrupt checkpoint."""
        if self.partially_loaded is not None:
            raise SetupError(
                f"the model holds parts of a corrupt checkpoint: {self.partially_loaded}. Build the model, the optimizer and "
                "the run anew."
            )
