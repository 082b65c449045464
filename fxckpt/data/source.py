"""What feeds training, and goes on in the middle of a pass with the bits of the uninterrupted run."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from fxckpt.errors import SetupError

log: logging.Logger = logging.getLogger("fxckpt")
_EVERY = 10.0  # seconds between two lines of progress

_OVER = (
    "a pass over a {} goes on that is over: an epoch has ended since its last batch, or a new pass was begun. A resumed run "
    "begins a new one there, with other batches. Ask for fxckpt.batches(loader) anew in each epoch; where passes and epochs are "
    "of different lengths, loop over fxckpt.steps(n) and draw from fxckpt.batches in its turns"
)


class Source(ABC):
    """One loader over all its passes.

    Attributes:
        position: batches handed out in the current pass.
        exhausted: the current pass has ended by itself.
        passes: how many were begun in this process.
    """

    def __init__(self, loader: Any):
        self.loader: Any = loader
        self.position: int = 0
        self.exhausted: bool = False
        self._running = False
        self._saved: dict[str, Any] | None = None
        self.passes: int = 0

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Is this state of a loader like this one?"""
        return not self._misfits(state)

    def _misfits(self, state: Mapping[str, Any]) -> list[str]:
        """What differs from the loader that the state is of."""
        mine, theirs = self._fingerprint(), state["loader"]
        names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        return [f"{name}: {theirs.get(name)} then, {mine.get(name)} now" for name in names if not self._may_differ(name, state)]

    def begin(self) -> Iterator[Any]:
        """The next pass; or, once after :meth:`load_state_dict`, the rest of the pass that the state is of: nothing, if that was
        exhausted. The random generators of the process are then as before the call.

        Raises:
            SetupError: the rest cannot be the one of the uninterrupted run.
        """
        saved, self._saved, self.passes = self._saved, None, self.passes + 1
        going_on = saved is not None and bool(saved["running"])
        self._running, self.exhausted, self.position = True, False, 0
        if going_on:
            assert saved is not None
            self.position, self.exhausted = saved["position"], saved["exhausted"]
        items = self._begin(saved, going_on)
        return iter(()) if self.exhausted else self._handed_out(items, self.passes)

    def finish(self) -> None:
        """The pass is over: it was exhausted, or the loop left it. The next :meth:`begin` starts a new one."""
        self._saved = None if self._running else self._saved
        self._running, self.exhausted, self.position = False, False, 0

    def state_dict(self) -> dict[str, Any]:
        """The state between two batches: plain values, numpy arrays, and what a data set or sampler has as its own.

        Raises:
            SetupError: no state brings back the bits of the uninterrupted run; the message says why, and the way out.
        """
        if self._saved is not None:  # loaded, and not gone on with yet
            return self._saved
        common = {"position": self.position, "exhausted": self.exhausted, "running": self._running}
        return {"loader": self._fingerprint(), **common, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state of the same loader in another process.

        Raises:
            SetupError: it is of a loader that differs in what decides the order of batches; the message lists what.
        """
        if wrong := self._misfits(state):
            raise SetupError(
                f"the checkpoint is of another loader than this {type(self.loader).__name__}, so its batches cannot be those of "
                f"the uninterrupted run ({'; '.join(wrong)}). Make the loader as before"
            )
        self._saved = dict(state)
        self.position, self.exhausted, self._running = state["position"], state["exhausted"], state["running"]
        self._loaded(self._saved)

    def __len__(self) -> int:
        return len(self.loader)

    def _handed_out(self, items: Iterator[Any], number: int) -> Iterator[Any]:
        """Count the batches that the loop gets in this pass; the last one is not kept while the next is made."""
        for item in items:
            if number != self.passes or not self._running:
                raise SetupError(_OVER.format(type(self.loader).__name__))
            self.position += 1
            yield item
            del item
        if number == self.passes:
            self.exhausted = True

    @abstractmethod
    def _begin(self, saved: dict[str, Any] | None, going_on: bool) -> Iterator[Any]:
        """The batches. ``saved``: the state that was loaded; ``going_on``: it is of the middle of a pass, else of between two."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What is in a state beside position and fingerprint. Nothing in it changes later."""

    @abstractmethod
    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same in a process that goes on."""

    def _may_differ(self, name: str, state: Mapping[str, Any]) -> bool:
        """May an entry of the fingerprint differ all the same?"""
        return False

    @abstractmethod
    def _loaded(self, state: dict[str, Any]) -> None:
        """A state was loaded; what a loop may change before the next pass is put back now."""


def length_of(value: Any) -> int | None:
    """``len``, where there is one."""
    try:
        return len(value)
    except TypeError:
        return None


def read_again(items: Iterator[Any], count: int, what: str) -> None:
    """Take and drop the first items, and say what that costs."""
    log.info(
        "reading %d batches of %s again, up to where training stopped: it has no state_dict() and load_state_dict()", count, what
    )
    told = time.monotonic()
    for at in range(count):
        next(items, None)
        if time.monotonic() - told > _EVERY:
            told = time.monotonic()
            log.info("%d of %d batches are read again", at + 1, count)
