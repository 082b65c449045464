"""Where the loops of a script stand: epochs, iterations, passes over loaders. Their ends are what a checkpoint is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from fxckpt.data import source_of
from fxckpt.data.source import Source
from fxckpt.errors import SetupError
from fxckpt.run.clock import StepClock


class Level:
    """One loop of the script, over ``"epochs"``, ``"steps"`` or ``"batches"``; ``with level:`` is around each iteration's body.

    ``leads``: the ends of its iterations are boundaries, since no other loop but one over epochs is around it. ``first``: no
    loop went over the same loader in this epoch. ``stepped``: an attempt was made in the iteration.
    """

    def __init__(self, kind: str, running: list[Level], clock: StepClock):
        self.kind: str = kind
        self.leads: bool = all(level.kind == "epochs" for level in running)
        self.first: bool = True
        self.stepped: bool = False
        self._running, self._clock = running, clock
        self._attempts, self._counted = 0, False  # attempts before this iteration; and was it counted?

    def __enter__(self) -> None:
        try:
            self._leave()
            self._attempts, self._counted = self._clock.attempts, False
            self._running.append(self)
            self._clock.in_iteration = True
        except BaseException:  # Ctrl-C: there is no ``__exit__`` then
            self._left(interrupted=True, whole=False)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._left(interrupted=kind is not None, whole=kind is None)
        except BaseException:  # Ctrl-C came here: once more, to its end
            self._left(interrupted=True, whole=kind is None)
            raise

    def _left(self, interrupted: bool, whole: bool) -> None:
        """The body was left, ``whole`` at its end. One that was left by a ``break`` or an exception counts if its update was
        made, which the next one must not make again."""
        self._leave()
        self._clock.in_iteration = bool(self._running)
        self.stepped = self._clock.attempts != self._attempts
        self._clock.interrupted = interrupted
        if self.leads and self.kind != "epochs" and not self._counted:
            self._counted, self._clock.iteration = True, self._clock.iteration + (whole or self.stepped)

    def _leave(self) -> None:
        """Its iteration is over, and with it those of loops inside, which a ``break`` or an exception may have left behind."""
        if self in self._running:
            del self._running[self._running.index(self) :]


class Loops:
    """The loops of one run. ``rest`` is called where one leads and its iteration has ended: everything is at rest then.

    A loader is known by its place among those that a script asks for in an epoch, which is the same in another process.
    """

    def __init__(self, clock: StepClock, rest: Callable[[], None]):
        self.clock: StepClock = clock
        self._rest = rest
        self._running: list[Level] = []  # those whose bodies run now, outermost first
        self._inside: str | None = None  # in which kind of loop the last boundary was
        self._sources: dict[int, Source] = {}
        self._used: set[int] = set()  # the places that were asked for in this epoch
        self._leading: Source | None = None  # the loader whose iterations are boundaries, or were last
        self._trained: Level | None = None  # the loop over batches in which this epoch's steps are made
        self._restored: dict[int, Any] = {}  # what a load left for loaders that were not seen yet
        self._restored_batch = 0
        self._settle: Callable[[], None] | None = None  # puts the random generators back where the checkpoint has them

    # -- iterations ----------------------------------------------------------------------------------------------------

    def level(self, kind: str) -> Level:
        """A loop of this kind begins."""
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
        self._inside, self._settle = level.kind, None
        self._rest()

    # -- epochs and loaders ---------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """An epoch is over, with what follows its passes."""
        self.clock.epoch += 1
        if self._leading is not None:
            self._leading.finish()
        self._leading, self._trained, self._restored_batch = None, None, 0
        self._used.clear()

    def begin(self, loader: Any, level: Level) -> tuple[Source, Iterator[Any]]:
        """A loop over a loader begins: its source, and the batches of the pass, or of what is left of it after a load."""
        place = self._place(loader)
        source = self._sources[place]
        level.first = place not in self._used
        self._used.add(place)
        if level.leads and self._leading is source:
            source.finish()  # a pass was left by a `break`, and no epoch ended
        if (state := self._restored.pop(place, None)) is not None:
            source.load_state_dict(state)
            if level.leads and self._inside == "batches" and self._leading is None:
                self._trained = level
                self.settle("batches")
        if level.leads:
            self._leading, self._settle = source, None
        return source, source.begin()

    def _place(self, loader: Any) -> int:
        """The loader's place; a new one takes that of one that is not asked for any more."""
        for place, source in self._sources.items():
            if source.loader is loader:
                return place
        place = next(i for i in range(len(self._used) + 1) if i not in self._used)
        self._sources[place] = source_of(loader)
        return place

    @property
    def batch(self) -> int:
        """How many batches of the leading pass are behind."""
        if self._leading is None:
            return self._restored_batch
        return self._leading.position - any(level.kind == "batches" and level.leads for level in self._running)

    def loaders(self) -> list[Any]:
        """What ``fxckpt.batches`` was asked to go over."""
        return [source.loader for source in self._sources.values()]

    # -- in a record ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where all loops stand. What a load left for loaders that were not asked for since is passed on."""
        sources = {**self._restored, **{place: source.state_dict() for place, source in self._sources.items()}}
        batch = self._restored_batch if self._leading is None else self._leading.position
        return {"epoch": self.clock.epoch, "batch": batch, "inside": self._inside, "sources": sources}

    def load_state_dict(self, state: Mapping[str, Any], settle: Callable[[], None]) -> None:
        """Go on from there; ``settle`` puts the random generators back where the checkpoint has them. A pass that is under way
        cannot be rewound: where a script goes back to an older checkpoint inside of one, its data go on."""
        if any(level.kind != "steps" for level in self._running):
            return
        self._restored, self._restored_batch = dict(state["sources"]), state["batch"]
        self.clock.epoch, self._inside, self._settle = state["epoch"], state["inside"], settle
        self._sources, self._used, self._leading, self._trained = {}, set(), None, None

    def settle(self, kind: str) -> None:
        """A loop of this kind begins. If it is the one that the loaded checkpoint was taken in, the generators are put back once
        more: what a script draws after ``load()``, the run that was not interrupted did not draw at this place."""
        if self._settle is not None and self._inside in (kind, None):
            self._settle()
