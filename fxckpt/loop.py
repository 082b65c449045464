"""``steps``, ``epochs`` and ``batches``: loops whose iterations end at an exact boundary, where a checkpoint is of one instant.

Only what a loop asks for its next item knows the instant between two iterations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Generic, TypeVar

from fxckpt.checkpointed import Checkpointed
from fxckpt.data.source import Source
from fxckpt.run.loops import Level
from fxckpt.run.run import Run, the_run

T = TypeVar("T")


def _run_of(optimizer: Checkpointed | None) -> Run:
    return optimizer.ckpt._run if optimizer is not None else the_run()


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
    loops = _run_of(optimizer).loops
    level, clock = loops.level("steps"), loops.clock
    clock.counts_iterations = True
    loops.begin_outermost(level)
    if clock.iteration >= n:
        loops.warn_if_over("steps", n)
    loops.settle("steps")
    while clock.iteration < n:
        with level:
            yield clock.iteration
        loops.boundary(level)  # not after a `break` or an exception: there it ended somewhere in its middle
    loops.end_outermost()


def epochs(n: int | None = None, *, optimizer: Checkpointed | None = None) -> Iterator[int]:
    """Count the epochs of a training from the one that the loaded checkpoint is of up to ``n``.

        fxckpt.load()
        for epoch in fxckpt.epochs(90):
            for x, y in fxckpt.batches(loader):
                ...
            scheduler.step()

    A run that resumes in an epoch goes on in it: ``batches`` gives what is left, and what stands behind it runs then. The end of
    an epoch is a boundary, too.

    Args:
        n: epochs of the whole training, those before the restart included; None: without end.
        optimizer: one of the run's optimizers, where several runs are live.

    Returns:
        An iterator over the numbers of the epochs, from 0 in a new run.

    Raises:
        SetupError: as ``steps``.
    """
    loops = _run_of(optimizer).loops
    level, clock = loops.level("epochs"), loops.clock
    loops.begin_outermost(level)
    if n is not None and clock.epoch >= n:
        loops.warn_if_over("epochs", n)
        loops.settle("epochs")
    while n is None or clock.epoch < n:
        loops.begin_epoch()
        with level:
            yield clock.epoch
        loops.end_epoch()
        loops.boundary(level)
    loops.end_outermost()


def batches(loader: Iterable[T], *, optimizer: Checkpointed | None = None) -> Batches[T]:
    """Go over a loader, or after a load over what is left of the pass that the checkpoint was taken in.

    An iteration ends when the loop asks for the next batch, before that is drawn: the instant that a checkpoint is of. Inside
    another iteration (of ``steps``, or of another ``batches``) it makes no boundary of its own, but its place is stored.
    No batch of a ``DataLoader`` over a map-style data set is read twice.

    Args:
        loader: a ``torch.utils.data.DataLoader``, or any iterable. One that has neither indices to skip nor a ``state_dict``
            is read again up to its place.
        optimizer: one of the run's optimizers, where several runs are live.

    Returns:
        An iterable with the loader's length. ``enumerate(fxckpt.batches(loader), opt.ckpt.batch)`` counts on after a load.

    Raises:
        SetupError: as ``steps``; a loader whose order is chance; another loader than the checkpoint is of; steps in two loops
            over batches of one epoch.
    """
    return Batches(loader, _run_of(optimizer))


class Batches(Generic[T]):
    """What ``batches`` returns: an iterable over the batches of a pass."""

    def __init__(self, loader: Iterable[T], run: Run):
        self._loader, self._run = loader, run

    def __len__(self) -> int:
        """The number of batches of a whole pass. Raises TypeError if the loader does not know."""
        if not isinstance(self._loader, Sized):
            raise TypeError(f"a {type(self._loader).__name__} has no length")
        return len(self._loader)

    def __iter__(self) -> Iterator[T]:
        loops = self._run.loops
        level = loops.level("batches")
        source, rest = loops.begin(self._loader, level)  # here, as a loader's iterator draws when it is made
        generator = self._pass(level, source, rest, source.passes)
        loops.passed_by(source, generator)
        return generator

    def _pass(self, level: Level, source: Source, rest: Iterator[T], number: int) -> Iterator[T]:
        """The batches of the source's pass of that number; each iteration ends when the next one is asked for."""
        loops = self._run.loops
        loops.lead(source, level)
        try:
            for batch in rest:
                with level:
                    yield batch
                loops.boundary(level)
        finally:
            if level.leads:
                loops.pass_over()
            elif source.passes == number:
                source.finish()  # the next loop over it begins anew, and so does that of a resumed run
