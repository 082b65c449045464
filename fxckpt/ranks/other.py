"""The store of a rank other than 0 where all ranks write into one directory: it writes its part, and rank 0 commits it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

from fxckpt.engine.plan import FileId
from fxckpt.errors import RanksDisagree, SaveFailed, StoreNotLoaded
from fxckpt.ranks.briefs import Brief
from fxckpt.ranks.rendezvous import Rendezvous, given_up
from fxckpt.ranks.words import Committed, Done, GivenUp, Key
from fxckpt.store import names
from fxckpt.store.dtypes import Tensor
from fxckpt.store.files import make_directories, replace_file, write_tensors
from fxckpt.store.folder import Folder
from fxckpt.store.layout import FileLayout
from fxckpt.store.lock import DirectoryLock
from fxckpt.store.parts import part_of
from fxckpt.store.pool import Pool
from fxckpt.store.record import Record
from fxckpt.store.record_pool import RecordPool
from fxckpt.store.slot import Slot
from fxckpt.store.slots import not_loaded

log: logging.Logger = logging.getLogger("fxckpt")


class PartSlot:
    """One checkpoint of this rank: a directory of its own, whose files rank 0 moves into the checkpoint's. ``give_back`` is
    called once rank 0 is through with it."""

    error: Exception | None = None

    def __init__(self, slot: Slot, name: str | None, root: str, rendezvous: Rendezvous, give_back: Callable[[PartSlot], None]):
        self.slot: Slot = slot
        self.name: str | None = name
        self.path: str = slot.path  # where it is written, then where it was committed
        self.generation: int | None = None
        self.key: Key | None = None  # by which the others know it, once it has begun
        self.handed_over: bool = False  # rank 0 may take its files
        self._root, self._others, self._give_back = root, rendezvous, give_back

    @property
    def below(self) -> int:
        return self.slot.below

    def was_replaced(self) -> bool:
        return self.slot.was_replaced()

    def recall(self, token: Hashable) -> Mapping[str, Mapping[int, int]]:
        """Nothing: its files are those of another checkpoint, which rank 0 gave back."""
        return {}

    def waited(self, file: str) -> FileId | None:
        return None

    def opened(self, inodes: Mapping[str, int]) -> None:
        self.slot.opened(inodes)

    def remember(self, token: Hashable, chunks: Mapping[str, Mapping[int, int]], chunk_bytes: int) -> None: ...

    def ended(self, timeout: float) -> bool:
        """Has rank 0 committed it? Raises Cancelled if it gave it up."""
        assert self.key is not None
        if (word := self._others.heard(self.key, [0], timeout).get(0)) is None:
            return False
        self.handed_over = False
        self._others.forget(self.key)
        if isinstance(word, GivenUp):
            raise given_up(0, word)
        assert isinstance(word, Committed)
        self.generation, self.path = word.generation, os.path.join(self._root, word.entry)
        self._give_back(self)
        return True


class OtherStore:
    """``directory`` is rank 0's store, ``found`` the number of checkpoints that an earlier life left there. This rank writes in
    ``ranks/NNNNN``, which has a lock of its own: nobody of an earlier life may be writing there any more."""

    hands_over = False

    def __init__(self, directory: str, rendezvous: Rendezvous, *, max_async: int, fresh: bool, found: int):
        self.root: str = os.path.abspath(directory)
        self.part: tuple[int, int] = (rendezvous.rank, rendezvous.world)
        self._others, self._found, self._loaded = rendezvous, found, fresh
        self._own = os.path.join(self.root, names.RANKS, names.rank_name(rendezvous.rank))
        self._pool = Pool(self._own, 1, max_async)
        self._records = RecordPool(self._own, 1, max_async, 0)
        self._given: set[PartSlot] = set()
        self._lock: DirectoryLock | None = None

    def open(self) -> None:
        """Take this rank's directory. Idempotent. Raises StoreLocked, OSError."""
        if self._lock is not None:
            return
        make_directories(self._own)
        folder = self._pool.folder = self._records.folder = Folder.open(self._own)
        self._lock = DirectoryLock(folder)
        try:
            self._lock.hold()
            for name in filter(names.is_slot, folder.entries()):
                # Not written in place again: a power cut may have left a file its name here beside the one in a checkpoint.
                folder.remove_tree(name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
            self._pool.folder.close()
            self._others.leave()

    def require_loaded(self) -> None:
        if self._found and not self._loaded:
            raise StoreNotLoaded(not_loaded(self.root, self._found))

    def mark_loaded(self, generation: int | None) -> None:
        self._loaded = True

    def renew(self, life: str) -> None:
        """All ranks have agreed on what to load."""
        self._others.renew(life)

    def hold(self, generations: Collection[int]) -> Collection[int]:
        return ()

    def reserve(self, files: Mapping[str, int], journal: bool = False) -> None:
        self.require_loaded()

    def acquire(self, name: str | None = None, journal: bool = False) -> PartSlot:
        """A directory to write in. Rank 0 gives the checkpoint, or the record of the ``journal``, its name."""
        self.require_loaded()
        self._check_place()
        slot = (self._records if journal else self._pool).take()
        try:
            with slot.reporting():
                _take_spares(slot.held())
                slot.prepare()
            given = PartSlot(slot, name, self.root, self._others, self._through_with)
            self._given.add(given)
            return given
        except BaseException:
            self._return(slot, bad=False)
            raise

    def _check_place(self) -> None:
        """Its directory may have been removed, or moved away with the store and the store made anew. Raises SaveFailed."""
        assert self._lock is not None
        try:
            os.stat(self.root)  # where there is no store any more, this is no place to make one
            make_directories(self._own)
            if not os.path.samestat(os.stat(self._own), os.fstat(self._pool.folder.fd)):
                self._pool.folder.move_to(self._own)
                self._lock.renew()
        except OSError as error:
            raise SaveFailed("open", self._own, None, error.errno) from error

    def reclaim(self, known: Collection[PartSlot]) -> None:
        for given in self._given.difference(known):
            self.abandon(given, bad=False)
        slots = [each.slot for each in self._given]
        for slot in [*self._pool.others(slots), *self._records.others(slots)]:
            self._return(slot, bad=False)

    def _pool_of(self, slot: Slot) -> Pool:
        """The one that it was taken from."""
        return self._records if self._records.is_busy(slot) else self._pool

    def begin(self, slot: PartSlot, checkpoint: int, files: Sequence[FileLayout], step: int) -> None:
        slot.key = self._others.begins(step, slot.name)

    def not_begun(self, step: int, name: str | None, why: str) -> Callable[[], None]:
        return self._others.missed(step, name, why)

    def missing(self, slot: PartSlot, timeout: float) -> Sequence[int]:
        return ()

    def commit(self, slot: PartSlot, record: Record, state_tensors: Mapping[str, Tensor]) -> None:
        """Make this rank's part durable, and tell rank 0 where it is. Raises SaveFailed, RanksDisagree."""
        rank, world = self.part
        record = dataclasses.replace(record, rank=rank, world_size=world, parts=())
        assert slot.key is not None
        with slot.slot.reporting():
            folder = slot.slot.held()
            extra = write_tensors(folder, record.state_file, state_tensors)
            record = dataclasses.replace(record, files=(*record.files, extra))
            for file in record.files:
                slot.slot.check_written(file)
            part, raw = part_of(record)
            # Edge W: before rank 0 is told, which makes no byte of it durable but the names.
            replace_file(folder, part.name, raw, durable=True)
        slot.handed_over = True
        self._others.say(slot.key, Done(slot.slot.entry, len(raw), part.sha256, Brief.of(record)))

    def abandon(self, slot: PartSlot, *, bad: bool, why: str = "") -> None:
        """Give it up, and say so. Where rank 0 may be taking its files still, its directory is left alone as long as this process
        lives. Idempotent."""
        if slot not in self._given:
            return
        self._given.discard(slot)
        if slot.handed_over:
            self._pool_of(slot.slot).release(slot.slot)
            return
        self._return(slot.slot, bad)
        if slot.key is not None:
            try:
                self._others.say(slot.key, GivenUp(why))
            except RanksDisagree as error:
                log.debug("rank 0 cannot be told: %s", error)

    def _through_with(self, slot: PartSlot) -> None:
        """Rank 0 has taken its files, and put those of another checkpoint in their place."""
        self._given.discard(slot)
        self._return(slot.slot, bad=False)

    def _return(self, slot: Slot, bad: bool) -> None:
        """It can be written again."""
        pool = self._pool_of(slot)
        with pool.moves:
            if not pool.release(slot):
                return
            slot.forget()
            if bad or slot.suspect:
                pool.condemn(slot)
            else:
                pool.recycle(slot)

    def read_back(self, busy: Callable[[], bool]) -> None:
        """Rank 0 does."""


def _take_spares(folder: Folder) -> None:
    """Files that rank 0 gave back, which are written again, are called as before."""
    for name in folder.entries():
        base = name.removesuffix(names.SPARE)
        if base != name and folder.find(base) is None:
            folder.rename(name, base)
        elif base != name:
            folder.remove_tree(name)
