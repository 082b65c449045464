"""What a run that is to be killed begins with: it sends itself SIGKILL in the N-th backward, or a moment after it.

``KILL_AT="7 0.01"``: 10 ms after the seventh backward began, and no later than in the ninth. Without it nothing is killed, and
the numbers of backwards and checkpoints are told at the end. Backwards are what all training loops have; a moment later the run
is in a step, a checkpoint, an evaluation or between two of them.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import threading
import time
from typing import Any

import numpy as np
import torch

from fxckpt.run.run import live_runs


class Backwards:
    """Counts the calls of ``Tensor.backward``, and ends the process at one of them."""

    def __init__(self) -> None:
        at, seconds = os.environ.get("KILL_AT", "0 0").split()
        self.calls, self.at, self.seconds = 0, int(at), float(seconds)

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            threading.Thread(target=self.die, args=(self.seconds,), daemon=True).start()
        if self.at and self.calls == self.at + 2:
            self.die()

    def die(self, seconds: float = 0) -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)


def begin() -> None:
    """In the run: count backwards from here on. The generators that a script does not seed are the same in all runs."""
    counted, backward = Backwards(), torch.Tensor.backward

    def counted_backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        counted.count()
        backward(self, *args, **kwargs)

    torch.Tensor.backward = counted_backward  # type: ignore[method-assign, assignment]
    random.seed(0)
    np.random.seed(0)
    atexit.register(_tell, counted)


def _tell(counted: Backwards) -> None:
    """At the end: how many backwards were made, and how many checkpoints came of them."""
    print(f"BACKWARDS {counted.calls}")
    for run in live_runs:
        run.flush()
        tally = run.saver.tally
        print(f"CHECKPOINTS {tally.committed} {tally.failed + tally.skipped}")


def kills(chance: random.Random, times: int, backwards: int) -> list[str]:
    """``KILL_AT`` of so many lives, one after the other, of a loop that makes so many backwards: random, the last in its second
    half, and all before its end, even if none had to be made again."""
    last = chance.randrange(backwards // 2, backwards - 3)
    points = [*sorted(chance.sample(range(1, last), times - 1)), last]
    return [f"{point - before} {chance.uniform(0, 0.03):.4f}" for before, point in zip([0, *points], points)]
