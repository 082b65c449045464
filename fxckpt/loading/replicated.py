"""Where a rank finds a checkpoint of its own at a load: in its store, among the replicas on its disk, or on another's disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from fxckpt.errors import FxckptError
from fxckpt.loading.target import Target
from fxckpt.ranks import Key, Said, holders
from fxckpt.ranks.replication import Replication
from fxckpt.store.about import known_as, order_of
from fxckpt.store.journaled import Loadable
from fxckpt.store.reader import Candidate

log: logging.Logger = logging.getLogger("fxckpt")

Kept = tuple[int, int, int, str, bool, int, int]
"""As ``ranks.choice.Kept`` reads it."""


def replication_of(target: Target, directory: str, name: str | None) -> Replication | None:
    """What knows of replicas, where the run's own directory is loaded from; named saves have none."""
    if target.run is None or name is not None or os.path.realpath(directory) != os.path.realpath(target.run.directory):
        return None
    return target.run.saver.ranks.replication


def kept_here(replication: Replication | None, step: int | None, is_amid: Callable[[Candidate], bool]) -> list[Kept]:
    """All that lies on this disk, of this ``step`` if one is asked for, as the others are to know it."""
    found = [] if replication is None else replication.here()
    return [
        (rank, *known_as(each.record), is_amid(each), *order_of(each.record))
        for rank, each in found
        if step in (None, each.record.step)
    ]


class Places:
    """Of one rank, in one load. ``mine``: what its store has; ``said``: what all ranks have."""

    def __init__(self, mine: Mapping[Key, Loadable], said: Sequence[Said], rank: int, replication: Replication | None):
        self._mine, self._said, self._rank, self._replication = mine, said, rank, replication

    def first_good(self, key: Key, verify: Callable[[Loadable], str]) -> tuple[Loadable | None, str]:
        """The first place where this rank's checkpoint verifies, and why the last one of the others did not, if none does."""
        why = "it is nowhere"
        for found, whence in self._look(key):
            if not isinstance(found, str) and not (why := verify(found)):
                if whence:
                    log.warning("fxckpt: rank %d's own store has no good checkpoint of step %d: its replica is loaded, %s",
                                self._rank, key[0], whence)  # fmt: skip
                return found, ""
            if whence:
                why = found if isinstance(found, str) else why
                log.error("fxckpt: the replica of step %d, %s, cannot be loaded: %s", key[0], whence, why)
        return None, why

    def _look(self, key: Key) -> Iterator[tuple[Loadable | str, str]]:
        """What is found or why not, and where it was if that is not the store."""
        if (own := self._mine.get(key)) is not None:
            yield own, ""
        if self._replication is None:
            return
        if (here := self._replication.replica(key)) is not None:
            yield here, "on the same disk"
        for other in holders(self._said, self._rank, key):
            if other != self._rank:
                yield self._fetched(other, key), f"from rank {other}"

    def _fetched(self, other: int, key: Key) -> Candidate | str:
        """Or why it could not be."""
        assert self._replication is not None
        try:
            return self._replication.fetch(other, key)
        except (FxckptError, OSError) as error:
            return str(error)
