"""One restoring by all ranks, in phases: each comes to the end of one before any begins the next, or all hear who could not."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fxckpt.compat.ranks import has_host_group, host_group
from fxckpt.ranks import Agreement, Key, key_of

log: logging.Logger = logging.getLogger("fxckpt")


class Elsewhere(Exception):
    """Another rank could not go on: ``Phases`` knows which, and why."""


class Phases:
    """Of one rank. ``number``: of the restoring, in its load. ``failed``: (rank, why) of those that cannot load at all;
    ``damaged``: of those that can choose anew, as all then do, but ``broken``. ``group``: by which they send each other what they
    read; None where they cannot."""

    def __init__(self, agreement: Agreement, number: int):
        self.rank: int = agreement.rank
        self.world: int = agreement.world
        self.group: Any = None
        self.failed: list[tuple[int, str]] = []
        self.damaged: list[tuple[int, str]] = []
        self.broken = set[Key]()
        self._agreement, self._topic = agreement, f"restore/{number}"
        self._phase = 0
        self._hears = True  # until somebody could not go on, or is dead

    def all(self, value: Any = None) -> list[Any]:
        """This rank came so far. What all say here (JSON), in their order. Raises Elsewhere if one cannot go on, RanksDisagree
        if one is dead."""
        found = self._exchange("", (), value)
        if not self._hears:
            raise Elsewhere
        return found

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Two phases, behind which they can send for this block, if all of them can: where there is no way to, each reads for
        itself."""
        with ExitStack() as stack:
            group = None
            if all(self.all(has_host_group())):
                try:
                    group = stack.enter_context(host_group())
                except (RuntimeError, ValueError) as error:
                    log.warning("fxckpt: rank %d reads for itself, as no group of gloo can be made: %s", self.rank, error)
            self.group = group if all(self.all(group is not None)) else None
            yield

    def give_up(self, why: str, broken: Iterable[Key] = ()) -> None:
        """This rank cannot go on: the others hear of it where they are next. Raises RanksDisagree if one is dead."""
        if self._hears:
            self._exchange(why, broken, None)

    def _exchange(self, why: str, broken: Iterable[Key], value: Any) -> list[Any]:
        self._phase += 1
        ours, self._hears = self._hears, False  # if this raises, nobody listens any more
        said = self._agreement.exchange(f"{self._topic}/{self._phase}", [why, sorted(broken), value])
        self.failed = [(rank, each) for rank, (each, keys, _) in enumerate(said) if each and not keys]
        self.damaged = [(rank, each) for rank, (each, keys, _) in enumerate(said) if keys]
        self.broken = {key_of(key) for _, keys, _ in said for key in keys}
        self._hears = ours and not self.failed and not self.damaged
        return [each for *_, each in said]
