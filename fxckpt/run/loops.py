"""Where the loops of a script stand: epochs, iterations, passes over loaders. Their ends are what a checkpoint is of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

from fxckpt.data.source import Source
from fxckpt.errors import SetupError
from fxckpt.run.clock import StepClock
from fxckpt.run.extra_state import random_state, set_random_state
from fxckpt.run.loaders import Loaders

log: logging.Logger = logging.getLogger("fxckpt")

_HEADS = 2  # epochs whose head is looked at
_ENDS = 64  # loops that are over, of which it is known where the generators stood


class WayBack(Protocol):
    """What a script does again on its way to the loop that a checkpoint was taken in, undone there."""

    def generators(self) -> None:
        """Put the random generators where the checkpoint has them: no run that was not interrupted draws here."""

    def keep(self) -> None:
        """Note the optimizers' settings: what changes from here on is done again."""

    def undo(self, where: str) -> None:
        """Put settings back as they were noted, and plain values and schedulers in ``extra=`` as the checkpoint has them; say it
        where something had changed."""


class Level:
    """One loop of the script, over ``"epochs"``, ``"steps"`` or ``"batches"``; ``with level:`` is around each iteration's body.

    ``leads``: the ends of its iterations are boundaries, since no other loop but one over epochs is around it; known when it
    ``begins``. ``first``: no loop went over the same loader in this epoch. ``stepped``: an attempt was made in the iteration.
    ``untouched``: the first iteration, and perhaps more, left neither a gradient nor a step; None before its end.
    """

    def __init__(self, kind: str, running: list[Level], clock: StepClock):
        self.kind: str = kind
        self.leads: bool = False
        self.first: bool = True
        self.stepped: bool = False
        self.untouched: bool | None = None
        self._running, self._clock = running, clock
        self._attempts = 0  # before this iteration

    def begins(self) -> None:
        """Its first iteration is asked for."""
        self.leads = all(level.kind == "epochs" for level in self._running)

    def has_stepped(self) -> bool:
        """Was an attempt made since the iteration began?"""
        return self._clock.attempts != self._attempts

    def __enter__(self) -> None:
        try:
            self._leave()
            self._attempts = self._clock.attempts
            self._running.append(self)
            self._clock.in_iteration = True
            self._clock.uncounted = self._counts() or self._clock.uncounted
        except BaseException:  # Ctrl-C: there is no ``__exit__`` then
            self._left(interrupted=True, whole=False)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            amid = self in self._running  # else it was left long ago, and its generator is let go of now
            self._left(interrupted=kind is not None if amid else self._clock.interrupted, whole=kind is None)
        except BaseException:  # Ctrl-C came here: once more, to its end
            self._left(interrupted=True, whole=kind is None)
            raise

    def _counts(self) -> bool:
        """Is it iterations of this loop that ``clock.iteration`` counts?"""
        return self.leads and self.kind != "epochs"

    def _left(self, interrupted: bool, whole: bool) -> None:
        """The body was left, ``whole`` at its end. One that was left by a ``break`` or an exception counts if its update was
        made, which the next one must not make again."""
        self._leave()
        self._clock.in_iteration = bool(self._running)
        self._clock.interrupted = interrupted
        self.stepped = self.has_stepped()
        if self._counts() and self._clock.uncounted:
            self._clock.uncounted, self._clock.iteration = False, self._clock.iteration + (whole or self.stepped)

    def _leave(self) -> None:
        """Its iteration is over, and with it those of loops inside, which a ``break`` or an exception may have left behind."""
        if self in self._running:
            del self._running[self._running.index(self) :]


class Loops:
    """The loops of one run. ``rest`` is called where one leads and its iteration has ended: everything is at rest then.

    A loader is known by its place among those that a script asks for in an epoch, which is the same in another process.
    """

    def __init__(
        self,
        clock: StepClock,
        rest: Callable[[], None],
        look: Callable[[], Mapping[tuple[str, str], object]],
        gradients: Callable[[], bool],
    ):
        """``look``: marks of what a checkpoint has; ``gradients``: do any wait for a step?"""
        self.clock: StepClock = clock
        self._rest, self._look, self._gradients = rest, look, gradients
        self._running: list[Level] = []  # those whose bodies run now, outermost first
        self._resting = False
        self._inside: str | None = None  # in which kind of loop the last boundary was
        self._loaders: Loaders = Loaders()
        self._elsewhere: list[Any] = []
        self._leading: Source | None = None  # the loader whose iterations are boundaries, or were last
        self._trained: Level | None = None  # the loop over batches in which this epoch's steps are made
        self._head: Mapping[tuple[str, str], object] | None = None  # how all looked when the epoch began
        self._heads = _HEADS  # epochs of which that is looked at
        self._epoch_random: Any = None  # the generators when the epoch began
        self._restored_batch = 0
        self._back: WayBack | None = None  # to what was loaded, until a boundary
        self._told_ahead = False
        self._outermost = 0  # loops that had none around them, until now
        self._restored_outermost: int | None = None  # the number of the one that the loaded checkpoint was taken in
        self._ends: dict[int, Any] = {}  # the generators at the end of each: what lies behind it draws from there

    # -- iterations ----------------------------------------------------------------------------------------------------

    def level(self, kind: str) -> Level:
        """A loop of this kind."""
        return Level(kind, self._running, self.clock)

    def boundary(self, level: Level) -> None:
        """An iteration of this loop has ended, by itself. Raises SetupError at the first step in a second loop over batches in
        one epoch: a run that resumes in it would do once more what the script does before it."""
        if not level.leads:
            return
        if level.stepped and level.kind == "batches" and self._trained is not level:
            if self._trained is not None or not level.first:
                self.clock.interrupted = True
                raise SetupError(
                    "two loops over fxckpt.batches in one epoch, and the second one trains: a resumed run could not tell what "
                    "lies between them has been done. Make each pass an epoch, `for epoch in fxckpt.epochs(n): for batch in "
                    "fxckpt.batches(loader): ...`, and go over a loader without fxckpt.batches where nothing is trained."
                )
            self._trained = level
        if level.kind == "batches" and not self._told_ahead:
            self._look_for_what_reads_ahead(level)
        self._inside, self._back, self._resting = level.kind, None, True
        try:
            self._rest()
        finally:
            self._resting = False

    def _look_for_what_reads_ahead(self, level: Level) -> None:
        """Say it where the first batch of a pass was let go by, and a later one was trained on: who asks for a batch before the
        one at hand was used makes a boundary too early."""
        if level.untouched is None:
            level.untouched = not (level.stepped or self._gradients())
        elif level.untouched and level.stepped:
            self._told_ahead, level.untouched = True, False
            log.warning(
                "fxckpt: a second batch was asked for before anything was trained on the first. If something around "
                "fxckpt.batches reads ahead, a resumed run loses what it has read: put fxckpt.batches around it, as in "
                "`fxckpt.batches(Prefetcher(loader))`"
            )

    # -- epochs and loaders ---------------------------------------------------------------------------------------------

    def begin_outermost(self, level: Level) -> None:
        """A loop with none around it begins, be it that all of it was done before a restart."""
        level.begins()
        if self._running:
            return
        self._outermost += 1
        if self._back is not None and self._outermost == 1:
            self._back.keep()

    def end_outermost(self) -> None:
        """It is over, here or before the restart."""
        if self._running:
            return
        if self._back is None:
            self._ends = dict([*self._ends.items(), (self._outermost, random_state())][-_ENDS:])
        elif self._outermost in self._ends and self._outermost != self._restored_outermost:
            set_random_state(self._ends[self._outermost])

    def begin_epoch(self) -> None:
        """An epoch begins, or goes on after a load: then its head runs again, with the random numbers that it drew."""
        self._loaders.begin_epoch()
        if self._back is not None and self._inside not in ("epochs", None):
            if self._outermost > 1:
                self._back.undo("between two loops")
            self._back.keep()
            if self._epoch_random is not None:
                set_random_state(self._epoch_random)
        else:
            self.settle("epochs")
            self._epoch_random = random_state()
        if self._heads:
            self._head = self._look()

    def end_epoch(self) -> None:
        """An epoch is over, with what follows its passes."""
        self.clock.epoch += 1
        if self._leading is not None:
            self._leading.finish()
        self._leading, self._trained, self._restored_batch = None, None, 0
        self._loaders.end_epoch()

    def begin(self, loader: Any, level: Level) -> tuple[Source, Iterator[Any]]:
        """A loop over a loader begins: its source, and the batches of the pass, or of what is left of it after a load."""
        source, level.first, restored = self._loaders.ask(loader, self.clock.iteration if self._in_a_turn() else None)
        level.begins()
        if level.leads and self._leading is source:
            source.finish()  # a pass was left by a `break`, and no epoch ended
        if restored and level.leads:
            self._head = None  # what is put back here did not change in this epoch's head
            self._put_back("at the head of an epoch" if self._running else "between two loops")
        return source, source.begin()

    def _in_a_turn(self) -> bool:
        """Does the body of a loop run that is no loop over epochs?"""
        return any(each.kind != "epochs" for each in self._running)

    def passed_by(self, source: Source, generator: Any) -> None:
        """This generator gives the batches of the pass that was begun."""
        self._loaders.begun(source, generator, bool(self._running) and not self._in_a_turn())

    def lead(self, source: Source, level: Level) -> None:
        """The first batch of a pass is asked for. Raises SetupError if the head of the epoch made a step."""
        resumed = self._back is not None and self._inside == "batches"
        self.begin_outermost(level)
        if not level.leads:
            return
        self.clock.thread = threading.get_ident()
        if self._running and self._running[-1].has_stepped() and self._trained is None:
            self.clock.interrupted = True
            raise SetupError(
                "a step was made in an epoch before its loop over fxckpt.batches: a run that resumes there makes it again. "
                "Make it behind the loop, or in an epoch of its own."
            )
        if resumed:
            self._trained = level
        self._leading, self._back = source, None
        if self._running and (self._trained is None or resumed):
            self._check_head()

    def pass_over(self) -> None:
        """No batch of a pass that leads is asked for any more."""
        self.clock.thread = None

    def _check_head(self) -> None:
        """Say what the head of an epoch changes: a run that resumes behind it does that again."""
        head, self._head = self._head, None
        if head is None:
            return
        self._heads -= 1
        now = self._look()
        if changed := [name for kind, name in head if (kind, name) in now and now[kind, name] != head[kind, name]]:
            self._heads = 0
            log.warning(
                "fxckpt: %s changed in an epoch before its loop over fxckpt.batches: a run that resumes in that loop changes it "
                "again. Do that behind the loop, at the end of the epoch",
                ", ".join(map(repr, changed)),
            )

    @property
    def batch(self) -> int:
        """How many batches of the leading pass are behind."""
        if self._leading is None:
            return self._restored_batch
        return self._leading.position - any(level.kind == "batches" and level.leads for level in self._running)

    def unknown_loaders_matter(self) -> bool:
        """May the batches come from a loader that no loop over ``batches`` knows?"""
        return self._leading is None

    # -- in a record ----------------------------------------------------------------------------------------------------

    def loaders(self) -> list[Any]:
        """What ``fxckpt.batches`` was asked to go over, and what others go over."""
        return [*self._loaders.known(), *self._elsewhere]

    def kept_elsewhere(self, loader: Any) -> None:
        """Somebody else's loop goes over this loader, and keeps its place among the extras."""
        self._elsewhere.append(loader)

    def state_dict(self) -> dict[str, Any]:
        """Where all loops stand. ``amid``: in the middle of an iteration, which no resumed run can go on with."""
        batch = self._restored_batch if self._leading is None else self._leading.position
        return {
            "epoch": self.clock.epoch,
            "batch": batch,
            "inside": self._inside,
            "amid": bool(self._running) and not self._resting,
            "outermost": self._outermost or self._restored_outermost,
            "ends": self._ends,
            "random": self._epoch_random,
            "sources": self._loaders.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], back: WayBack) -> None:
        """Go on from there. A pass that is under way cannot be rewound: where a script goes back to an older checkpoint inside
        of one, its data go on."""
        if any(level.kind != "steps" for level in self._running):
            return
        self._loaders = Loaders(state["sources"])
        self._restored_batch, self._epoch_random = state["batch"], state.get("random")
        self.clock.epoch, self._inside, self._back = state["epoch"], state["inside"], back
        self._outermost, self._restored_outermost, self._ends = 0, state.get("outermost"), dict(state.get("ends", {}))
        self._leading, self._trained = None, None

    def settle(self, kind: str) -> None:
        """A loop of this kind begins, or was over before it began: is it the one that the loaded checkpoint was taken in?"""
        if self._inside in (kind, None) and self._restored_outermost in (self._outermost, None):
            self._put_back("between two loops")

    def _put_back(self, where: str) -> None:
        """Where training goes on, everything is as the checkpoint has it: what a script does behind ``load()``, the run that was
        not interrupted did not do here. ``where``: what lies between."""
        if self._back is None:
            return
        self._back.generators()
        if self._running or self._outermost > 1:
            self._back.undo(where)

    def warn_if_over(self, kind: str, n: int) -> None:
        """A loop up to ``n`` has nothing to do, in a process that was not resumed."""
        if self._back is None:
            log.warning(
                "fxckpt: fxckpt.%s(%d) has nothing left to do: it counts up to a number of the whole training, and so many are "
                "complete already",
                kind,
                n,
            )
