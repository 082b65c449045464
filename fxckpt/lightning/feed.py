"""A training loader as Lightning iterates over it, whose passes are those of ``fxckpt.batches``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Feed:
    """Stands in for one loader among a Trainer's.

    Lightning makes an iterator for each epoch and leaves it without asking it for its end; after a resume it makes two before the
    first batch. So a pass is closed when the next one begins, and while ``waiting`` none is begun: ``go_on`` does that, when all
    else is as the checkpoint has it.
    """

    def __init__(self, loader: Any, begin: Callable[[Any], Iterator[Any]], waiting: bool):
        self.loader: Any = loader
        self.waiting: bool = waiting
        self._begin = begin
        self._pass: Any = None

    def __iter__(self) -> Iterator[Any]:
        self.close()
        if not self.waiting:
            self._pass = self._begin(self.loader)
        return _Items(self)

    def go_on(self) -> None:
        """Begin the pass that was asked for while it waited."""
        self.waiting = False
        self._pass = self._begin(self.loader)

    def next(self) -> Any:
        """The next batch of the pass."""
        return next(self._pass)

    def close(self) -> None:
        """The pass is over, wherever it stands."""
        given, self._pass = self._pass, None
        if given is not None:
            given.close()

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        """What others ask a loader for: its sampler, its data set. Not its state, which is ours to keep, and nothing private: an
        iterator inside, that Lightning would shut down."""
        if name.startswith("_") or name in ("state_dict", "load_state_dict"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)


class _Items(Iterator[Any]):
    """The batches of whichever pass the feed is in."""

    def __init__(self, feed: Feed):
        self._feed = feed

    def __next__(self) -> Any:
        return self._feed.next()
