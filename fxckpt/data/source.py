"""One loader over all its passes: Source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Source:
    """A loader, how far its current pass has come, and how a pass goes on in another process."""

    def __init__(self, loader: Iterable[Any]):
        self.loader: Iterable[Any] = loader
        self.position: int = 0
        self.exhausted: bool = False
        self._loaded: dict[str, Any] | None = None

    def begin(self) -> Iterator[Any]:
        """The batches of the next pass; after ``load_state_dict`` those that are left of the one that the state is of."""
        loaded, self._loaded = self._loaded, None
        self.position = 0 if loaded is None else loaded["position"]
        self.exhausted = loaded is not None and loaded["exhausted"]
        return iter(()) if self.exhausted else self._pass(self.position)

    def _pass(self, skipped: int) -> Iterator[Any]:
        for index, batch in enumerate(self.loader):
            if index >= skipped:
                self.position += 1
                yield batch
        self.exhausted = True

    def finish(self) -> None:
        """The pass is over: the next one starts anew."""
        self.position, self.exhausted = 0, False

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, between two batches."""
        return {"position": self.position, "exhausted": self.exhausted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next ``begin``."""
        self._loaded = state


def source_of(loader: Iterable[Any]) -> Source:
    """How this loader is resumed."""
    return Source(loader)
