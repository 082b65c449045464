"""The other ranks of the job, as one run's checkpoints know them: what a record says of the job, and that a common step stays."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Mapping

from fxckpt.compat.ranks import default_store, rank, world_size
from fxckpt.errors import SetupError
from fxckpt.ranks import Ending, FirstStore, Key, Messages, OtherStore, Peers, named
from fxckpt.ranks.replication import Replication
from fxckpt.saving.stores import CheckpointStore
from fxckpt.store.about import Job, newest_life
from fxckpt.store.reader import Candidate, candidates
from fxckpt.store.record import Record

log: logging.Logger = logging.getLogger("fxckpt")


class Ranks:
    """Of one run; nothing in a job of one rank. ``window``: how many of the newest checkpoints each rank keeps for the others.
    ``every``: when they are due. ``replication``: to other ranks' disks, if anywhere; ends with this. Raises SetupError if they
    would not meet. Where all write one store, what is committed is common, and nobody need be asked."""

    def __init__(self, store: CheckpointStore, window: int, every: int | str, replication: Replication | None = None):
        self._store, self._window, self._every = store, window, every
        self.replication: Replication | None = replication
        self._job: Job | None = None
        self._peers: Peers | None = None
        self._ending: Ending | None = None
        self._number = self._count()  # of the run in its process, where all ranks make their runs in one order

    def check_schedule(self) -> None:
        """Raises SetupError if each rank would take its checkpoints at other steps."""
        if world_size() > 1 and isinstance(self._every, str):
            raise SetupError(
                f"every={self._every!r} has each rank take its checkpoints when its own disk allows, so at other steps than the "
                "others: no step would be common to all. Say every=N, a number of steps, on every rank"
            )

    def _count(self) -> int:
        """One more run of this rank; 0 where no process group is there yet."""
        if (found := default_store()) is None or world_size() == 1:
            return 0
        self.check_schedule()
        with named():
            return int(found[0].add(f"fxckpt/runs/{rank()}", 1))

    @property
    def common(self) -> int | None:
        """The newest step that all ranks are known to have committed."""
        return None if self._peers is None or self._peers.common is None else self._peers.common[0]

    def begin(
        self, job: Job, store: Messages, rank: int, world: int, loaded: tuple[Key, int | None] | None,
        safe: Mapping[Key, int | None] | None = None,
    ) -> None:  # fmt: skip
        """All ranks have agreed on what to load: this (None: nothing, or of another store), of this generation here (None: it is
        a replica). ``safe``: likewise, of which steps every rank has a replica, oldest first."""
        if isinstance(self._store, FirstStore | OtherStore):
            self._store.renew(job.life)
        self._begin(job, store, rank, world, loaded, safe)

    def _begin(
        self, job: Job, store: Messages, rank: int, world: int, loaded: tuple[Key, int | None] | None,
        safe: Mapping[Key, int | None] | None = None,
    ) -> None:  # fmt: skip
        """Talk of this life from now on."""
        self._fall_silent()
        self._job = job
        if self._store.part[1] > 1:
            return
        with named():
            mine = store.clone()  # the thread that trains may wait in its own connection
        if self.replication is not None:
            self.replication.begins(job.life)
        prefix, hold = f"fxckpt/common/{job.life}", self._store.hold
        self._peers = Peers(mine, rank, world, prefix, hold, self._window, loaded, self.replication, safe)
        self._peers.start()

    def _begin_unasked(self) -> None:
        """Nobody called ``load``: the ranks draw a life without waiting for each other. Raises RanksDisagree if the process
        group's store is gone: without a life, this checkpoint could be taken for one that another life wrote."""
        if (found := default_store()) is None:
            return
        self.check_schedule()
        with named():
            self._number = self._number or self._count()
            life = found[0].compare_set(f"fxckpt/life/{self._number}", "", uuid.uuid4().hex)
        left = [] if self.replication is None else candidates(self._store.root)  # by earlier lives, which this one gives up
        number = 1 + newest_life(each.record for each in left if isinstance(each, Candidate))
        self._begin(Job(life.decode(), number=number), found[0], rank(), world_size(), None)

    def described(self, record: Record) -> Record:
        """The record of a checkpoint that is about to be committed, with what it says of the job."""
        if self._job is None and world_size() > 1:
            self._begin_unasked()
        if self._job is None:
            return record
        job = dataclasses.replace(self._job, common=self.common)
        return dataclasses.replace(record, state={**record.state, **job.to_state()})

    def committed(self, record: Record, generation: int) -> None:
        """It was."""
        if self._peers is not None and self._job is not None:
            self._peers.committed((record.step, record.iteration, self._job.life), generation)

    def end_at(self, step: int) -> bool:
        """A signal has asked this rank to end: is the last checkpoint of this step? All ranks must take the same."""
        if self._ending is None and world_size() > 1 and (found := default_store()) is not None:
            self._ending = Ending(found[0], rank(), world_size(), f"fxckpt/end/{self._number}")
        return self._ending is None or self._ending.is_here(step)

    def stop(self) -> None:
        """Talk no more, and send none."""
        self._fall_silent()
        if self.replication is not None:
            self.replication.close()

    def _fall_silent(self) -> None:
        if self._peers is not None:
            self._peers.stop()
