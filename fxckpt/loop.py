"""``fxckpt.steps``: a training loop whose iterations are the exact boundaries of steps."""

from __future__ import annotations

from collections.abc import Iterator

from fxckpt.checkpointed import Checkpointed
from fxckpt.run.run import the_run


def steps(n: int, *, optimizer: Checkpointed | None = None) -> Iterator[int]:
    """Count the iterations of a training loop from where the loaded checkpoint stands up to ``n``.

        fxckpt.load()
        for step in fxckpt.steps(1000):
            ...

    The end of each iteration is the exact boundary of a step: everything is captured there, random state and loaders too.
    With gradient accumulation, or a scaler that skips, iterations are not optimizer steps; this counts iterations.

    Args:
        n: iterations of the whole training, those before the restart included.
        optimizer: one of the run's optimizers, where several runs are live.

    Returns:
        An iterator over the numbers of the iterations, from 0 in a new run.

    Raises:
        SetupError: no run is live, or several are and ``optimizer`` does not say which.
    """
    run = optimizer.ckpt._run if optimizer is not None else the_run()
    clock = run.clock
    clock.counts_iterations = True
    while clock.iteration < n:
        clock.in_iteration, attempts, whole = True, clock.attempts, False
        try:
            yield clock.iteration
            whole = True
        finally:
            # One that was left by a `break` or an exception counts if its update was made, which the next one must not
            # make again.
            clock.iteration += whole or clock.attempts != attempts
            clock.in_iteration = False
        run.closing.close_step()  # not after a `break` or an exception: there it ended somewhere in its middle
