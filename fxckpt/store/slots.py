"""``Store``: the one writer of a checkpoint directory, and the order in which a checkpoint becomes valid.

    acquire    1. a free ``.partial`` directory whose files nobody else can see
    (engine)   2. chunks written in place, each file ``fdatasync``'ed
    commit        ``state.safetensors`` likewise; files that are not in the record removed
               3. ``commit.json`` (temporary name, fsync, rename), fsync of the slot
               4. rename to ``step-N``, fsync of the root: now, and only now, it is committed
               5. what retention gives up becomes free: rename to ``.partial``, fsync of the root; no training waits here

Which operation must be durable before which is the table of edges in ``docs/format.md``; the comments name them. In every
state a crash can leave, a directory without a suffix verifies. ``test_power_cut.py`` takes each edge away in turn.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fxckpt.errors import Cancelled, Corrupt, NoCheckpoint, SaveFailed, SetupError, StoreError, StoreNotLoaded
from fxckpt.store import names
from fxckpt.store.dtypes import Tensor
from fxckpt.store.files import FOREIGN, make_directories, write_tensors
from fxckpt.store.folder import Folder
from fxckpt.store.identity import check_store, identify
from fxckpt.store.layout import FileLayout
from fxckpt.store.lock import DirectoryLock
from fxckpt.store.pool import Pool
from fxckpt.store.publishing import publish, seal
from fxckpt.store.read_back import OFF, SHARE, ReadBack
from fxckpt.store.reader import Candidate, candidates, directory_of, read_record, records
from fxckpt.store.record import FileRecord, Record
from fxckpt.store.record_pool import RecordPool
from fxckpt.store.retention import BAD, GOOD, UNKNOWN, CheckpointStatus, KeepBest, Lineage, Policy
from fxckpt.store.slot import Slot

log: logging.Logger = logging.getLogger("fxckpt")


class Store:
    """The writer of one directory. Thread-safe; a forked child cannot use it.

    ``keep`` good checkpoints stay, apart from named ones; up to ``max_async`` more are being written. ``keep_every``
    (steps), ``keep_minutes`` and ``keep_best`` (a metric) keep more: see ``retention.Policy``.
    ``fresh=True`` starts over in a store that has checkpoints: they go as the new ones become durable. ``read_back``: see
    ``read_back.ReadBack``. ``journal``: steps from one checkpoint to the next, with a record of the journal for each between.
    """

    hands_over = False  # this process commits
    part: tuple[int, int] = (0, 1)  # which of how many ranks writes through this one

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 2, max_async: int = 2, fresh: bool = False,
        keep_every: int | None = None, keep_minutes: float | None = None, keep_best: KeepBest = None, read_back: str = OFF,
        journal: int = 1,
    ):  # fmt: skip
        if keep < 1 or max_async < 1:
            raise SetupError(f"keep={keep} and max_async={max_async} must both be at least 1")
        self.root: str = os.path.abspath(os.fspath(directory))
        self.fresh: bool = fresh
        self.store_id: str = ""
        check_store(self.root)
        self._policy = Policy.make(keep, keep_every, keep_minutes, keep_best)
        self._pool = Pool(self.root, keep, max_async)
        self._records = RecordPool(self.root, keep, max_async, journal - 1)
        self._pool.before_giving_up = self._records.give_up_on
        share = SHARE if journal == 1 else SHARE / 2
        self._read_back, self._records_read_back = ReadBack(read_back, share), ReadBack(read_back, share)
        self._pid = os.getpid()
        self._lock: DirectoryLock | None = None
        self._lineage = Lineage()
        self.found: int = 0  # checkpoints that an earlier life left
        self._behind = range(0)  # generations of earlier lives that came behind what this one continues
        self._loaded = False

    def open(self) -> None:
        """Make the directory if need be, take its lock, and see what is there. Idempotent. Raises ``NotAStore``, ``StoreLocked``
        (naming the pid that has it) or ``OSError``."""
        self._check_owner()
        if self._lock is not None:
            return
        check_store(self.root)
        make_directories(self.root)
        self._real = os.path.realpath(self.root)
        folder = self._pool.folder = self._records.folder = Folder.open(self.root)
        lock = DirectoryLock(folder)
        # A store dropped without close() gives its lock back; at exit the kernel does, after the last write.
        self._finalizer = weakref.finalize(self, _let_go, lock, folder)
        self._finalizer.atexit = False
        try:
            lock.hold()
            self._lock = lock
            self._sync_what_is_there()
            found = candidates(self.root)
            self.store_id = identify(self._folder, [each.record for each in found if isinstance(each, Candidate)])
            self._adopt(found)
            if self.part[1] == 1:
                self.forget_ranks(1)
        except BaseException:
            self._finalizer()
            self._lock = None
            raise
        if self._pool.keep == 1:
            log.warning("keep=1: while no other checkpoint exists, one damaged block on the disk loses the run")

    def _sync_what_is_there(self) -> None:
        """Edge O: make the names durable that an earlier life was killed behind, before they are relied on. It may have renamed
        a checkpoint to ``slot-K.partial`` and not have synced that: a power cut could bring its name back over a slot that is
        being rewritten. And what is loaded stays loadable."""
        self._folder.sync()
        if (named := self._open_named()) is not None:
            named.sync()
            named.close()

    @property
    def _folder(self) -> Folder:
        """The root, held open."""
        return self._pool.folder

    def _open_named(self) -> Folder | None:
        """The directory of named saves; None if there is none. What has its name and is none is put aside."""
        try:
            return self._folder.enter(names.NAMED)
        except OSError as error:
            if error.errno not in FOREIGN and not isinstance(error, FileNotFoundError):
                raise
        self._folder.put_aside(names.NAMED)
        return None

    def _adopt(self, found: Sequence[Candidate | Corrupt]) -> None:
        """Take in what an earlier life left."""
        for slot in self._pool.adopt_slots():
            with suppress(Corrupt, NoCheckpoint):  # a commit that a crash stopped short of its rename: go on behind it
                self._lineage.newest = max(self._lineage.newest, read_record(slot.path).generation)
        self.found = len(found)
        for each in found:
            path, known = directory_of(each), CheckpointStatus(-1, None, BAD)
            if isinstance(each, Corrupt):
                log.warning("a checkpoint does not verify and will be given up: %s", each)
            else:
                self._lineage.adopt(each.record)
                known = self._standing(each.record, UNKNOWN)
                if each.record.store_id != self.store_id:
                    log.warning("%s is of another store: it can be loaded, and is never given up", path)
                    continue
            if os.path.dirname(path) == self.root:
                self._pool.adopt_checkpoint(os.path.basename(path), known)
        if (named := self._open_named()) is not None:
            for name in named.entries():
                if name.endswith(names.PARTIAL):  # a named save that never was
                    named.remove_tree(name)
            named.close()
        self._adopt_records()
        self._pool.since = self._lineage.newest if self.fresh else 0

    def _adopt_records(self) -> None:
        """Take in the journal that an earlier life left; what no checkpoint of it can be made with goes with the next one."""
        for slot in self._records.adopt_slots():
            with suppress(Corrupt, NoCheckpoint):
                self._lineage.newest = max(self._lineage.newest, read_record(slot.path).generation)
        for each in records(self.root):
            known = CheckpointStatus(-1, None, BAD)
            if isinstance(each, Corrupt):
                log.warning("a record of the journal does not verify and will be given up: %s", each)
            else:
                self._lineage.newest = max(self._lineage.newest, each.record.generation)
                known = CheckpointStatus(each.record.generation, each.record.parent, UNKNOWN)
                if each.record.store_id != self.store_id:
                    continue
            self._records.adopt_checkpoint(os.path.basename(directory_of(each)), known)

    def _standing(self, record: Record, trust: str) -> CheckpointStatus:
        """What retention has to know."""
        score = self._policy.score(record.metrics)
        return CheckpointStatus(record.generation, record.parent, trust, record.lasting is not None, score)

    def _check_owner(self) -> None:
        if os.getpid() != self._pid:
            raise Cancelled(f"the store {self.root} belongs to the parent process (pid {self._pid})")

    def _check_open(self) -> DirectoryLock:
        self._check_owner()
        if self._lock is None:
            raise StoreError(f"the store {self.root} is not open")
        return self._lock

    def _check_place(self) -> None:
        """That the directory is still the one that was opened, and ours. Raises ``StoreLocked``, ``SaveFailed``."""
        lock = self._check_open()
        try:
            if not os.path.samestat(os.stat(self.root), os.fstat(self._folder.fd)):  # moved away, and made anew
                check_store(self.root)
                self._folder.move_to(self._real)
            lock.renew()
        except OSError as error:
            raise SaveFailed("open", os.path.join(self.root, names.LOCK), None, error.errno) from error

    def forget_ranks(self, world: int) -> None:
        """Remove what ranks of an earlier life left that there are not any more in ``world``; who is there has its own open."""
        ours = [names.rank_name(rank) for rank in range(1, world)]
        try:
            with self._folder.within(names.RANKS) as ranks:
                for name in ranks.entries().keys() - ours:
                    ranks.remove_tree(name)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("fxckpt: what earlier ranks left in %s stays: %s", self._folder.at(names.RANKS), error)

    def note_lock(self, text: str) -> None:
        """Note in the lock file what kind of process this is; see ``StoreLocked.monitor``."""
        if self._lock is not None:
            self._lock.note(text)

    def require_loaded(self) -> None:
        """Raise ``StoreNotLoaded`` if an earlier life left checkpoints that were not loaded, and not ``fresh``."""
        if self.found and not self._loaded and not self.fresh:
            raise StoreNotLoaded(not_loaded(self.root, self.found))

    def mark_loaded(self, generation: int | None) -> None:
        """What comes next continues this checkpoint, which was verified; None: there was none to load. It stays until a newer
        one is committed; later ones of the store count as abandoned from now on. Nothing may be in flight; a slot that was
        acquired and not begun may be kept."""
        base = self._records.base_of(generation) if generation is not None else None
        base = generation if base is None else base  # of a record: the checkpoint that it builds on is continued
        self._records.loaded(base, generation)
        with self._pool.mutex:
            self._loaded = True
            self._lineage.newest = max(self._lineage.newest, generation or 0)
            if generation is not None or not self.fresh:
                self._behind = range((generation or 0) + 1, self._lineage.newest + 1)
            self._pool.continue_from(base, self._lineage.of(base))

    def hold(self, generations: Collection[int]) -> list[int]:
        """Keep these checkpoints beyond ``keep``, and those of the last call no longer; returns those that are there."""
        with self._pool.mutex:
            self._pool.held = set(generations)
            return sorted(self._pool.held & self._pool.generations())

    def reserve(self, files: Mapping[str, int], journal: bool = False) -> None:
        """Set disk space aside for ``keep + max_async`` checkpoints with these files (name: bytes), named saves and what
        is kept beyond ``keep`` apart. Of records of the ``journal`` it only looks whether all have room. Raises ``NoSpace``
        with the numbers, ``SaveFailed``, ``StoreNotLoaded``."""
        self._check_open()
        self.require_loaded()
        try:
            (self._records if journal else self._pool).reserve(files)
        except OSError as error:
            raise SaveFailed("fallocate", os.fsdecode(error.filename or self.root), None, error.errno) from error

    def acquire(self, name: str | None = None, journal: bool = False) -> Slot:
        """A slot to write the next checkpoint in, or the next record of the ``journal``; ``name`` makes it a named save, in a
        directory of its own. Raises
        ``StoreNotLoaded``, ``SetupError`` (a name that is taken or cannot be one), ``StoreError`` if ``max_async`` are in flight
        already, ``SaveFailed``."""
        self._check_open()
        self.require_loaded()
        self._check_place()
        pool = self._records if journal else self._pool
        slot = pool.take() if name is None else self._take_named(name)
        try:
            with self._pool.mutex:
                slot.generation = self._lineage.next()  # in the order of acquiring, which is that of training
            with slot.reporting():
                slot.prepare()
        except BaseException:
            self.abandon(slot, bad=False)
            raise
        return slot

    def reclaim(self, known: Collection[Slot]) -> None:
        """Take back every slot that was acquired and is none of these; nobody else may be acquiring one."""
        for slot in [*self._pool.others(known), *self._records.others(known)]:
            self.abandon(slot, bad=False)

    def is_record(self, slot: Slot) -> bool:
        """Is a record of the journal written in it?"""
        return self._pool_of(slot) is self._records

    def _pool_of(self, slot: Slot) -> Pool:
        """The one that it was taken from."""
        return self._records if self._records.is_busy(slot) else self._pool

    def begin(self, slot: Slot, checkpoint: int, files: Sequence[FileLayout], step: int = 0) -> None:
        """The engine writes into the slot from now on. One that was prepared while slots of the other kind were taken,
        checkpoints and records of the journal, gets a later generation: their order is that of training."""
        with self._pool.mutex:
            if slot.generation != self._lineage.newest:
                slot.generation = self._lineage.next()

    def _take_named(self, name: str) -> Slot:
        """A new directory beside the named saves; none that is recycled, so that it can outlive the run. Of the same name there
        may be one that an earlier life made behind what this one continues: a run that does it again takes its place."""
        names.check_name(name)
        slot = Slot(Folder(self._folder.at(names.NAMED), -1), name + names.PARTIAL, None, name)
        with self._pool.moves, slot.reporting():
            if (named := self._open_named()) is None:
                self._folder.mkdir(names.NAMED)
                named = self._folder.enter(names.NAMED)
            slot.parent = named
            try:
                slot.replaces = named.inode(name)
                if self._pool.is_saving(name) or not (slot.replaces is None or self._is_behind(named, name)):
                    raise SetupError(f"{named.path} has a checkpoint {name!r} already: take another name, or remove it")
                # Edge N. Each time: one that was made may not have been synced, and without that a power cut loses every
                # named save in it.
                self._folder.sync()
                named.remove_tree(slot.entry)
                named.mkdir(slot.entry)
                self._pool.occupy(slot)
                return slot
            except BaseException:
                named.close()
                raise

    def _is_behind(self, named: Folder, name: str) -> bool:
        """Is the named save of this name one that an earlier life made, and that this run gave up when it went on from before?"""
        try:
            found = read_record(named.at(name))
        except (Corrupt, NoCheckpoint):
            return False
        return found.store_id == self.store_id and found.generation in self._behind

    def not_begun(self, step: int, name: str | None, why: str) -> Callable[[], None] | None:
        """Nobody else waits for it."""
        return None

    def missing(self, slot: Slot, timeout: float) -> Sequence[int]:
        """Who has not done his part of it yet."""
        return ()

    def commit(self, slot: Slot, record: Record, state_tensors: Mapping[str, Tensor]) -> Path:
        """Make the slot, whose engine files are durable, a checkpoint, which it is once this returns. ``record``: what the run
        says of it; the store fills in what only it knows. ``state_tensors`` are written beside. Raises ``SaveFailed``; the caller
        then abandons the slot."""
        self._check_open()
        pool = self._pool_of(slot)
        with pool.unhurried():
            if not pool.is_busy(slot):
                raise StoreError(f"{slot.path} is not being written; acquire a slot for each checkpoint")
            with slot.reporting():
                extra = write_tensors(slot.held(), record.state_file, state_tensors)
                record = self._completed(record, slot, extra)
                seal(slot, record)
                self._check_place()  # its bytes took their time
                publish(slot, record, pool)
            pool.committed(slot, self._standing(record, GOOD))
            slot.leave()
            if record.journal is None:
                self._checkpoint_committed(slot, record)
            else:
                self._records.recorded(record.journal.number)
                self._records_read_back.committed(slot, record.step)
            return Path(slot.path)

    def _checkpoint_committed(self, slot: Slot, record: Record) -> None:
        """What else goes with that: older ones are given up, and records on those."""
        self._read_back.committed(slot, record.step)
        self._pool.retain()
        if slot.name is None:
            self._records.release_space(self._pool.newest())
        with self._pool.mutex:
            self._lineage.note(record, self._pool.generations())

    def read_back(self, busy: Callable[[], bool]) -> tuple[int, Corrupt | None] | None:
        """Read back what is due of what was committed, checkpoints and records of the journal, on the thread that commits; what
        does not verify is put aside, and its step returned with what is wrong. One that somebody took files from is only given
        up, and returned without. ``busy``: there is something to commit."""
        try:
            for pool, reading in ((self._pool, self._read_back), (self._records, self._records_read_back)):
                if (found := reading.read(busy)) is not None:
                    return self._retire(pool, *found)
        except (OSError, StoreError) as error:
            log.warning("a checkpoint could not be read back: %s", error)
        return None

    def _retire(self, pool: Pool, slot: Slot, step: int, error: Corrupt) -> tuple[int, Corrupt | None]:
        """It does not verify: see ``read_back``."""
        with pool.moves:
            whole = slot.has_its_files()
            pool.retire(slot, aside=whole)
        if not whole:  # somebody removes it, or moved a file away: that is his, and no fault of the disk
            log.error("the checkpoint of step %d is not counted on any more: %s", step, error)
        return step, error if whole else None

    def _completed(self, record: Record, slot: Slot, extra: FileRecord) -> Record:
        """With what the store knows: whose it is, what it continues, and whether it is kept for good."""
        parent = max((each for each in self._pool.lineage if each < slot.generation), default=None)
        if record.journal is not None:
            parent = record.journal.base
        # A named save is kept anyway, by its name.
        by_name = slot.name is not None or record.journal is not None
        lasting = None if by_name else self._policy.lasting(self._lineage.origin(parent), record.step, record.time)
        return dataclasses.replace(
            record, store_id=self.store_id, generation=slot.generation, parent=parent, name=slot.name,
            files=(*record.files, extra), lasting=lasting, best_by=self._policy.best,
        )  # fmt: skip

    def discard(self, paths: Collection[str]) -> None:
        """Remove these checkpoints (absolute paths; named ones are left alone), and every slot that waits to be used
        again: for a store that nobody trains into. Each loses its name, durably, before a byte of it goes."""
        self._check_open()
        with self._records.moves:
            self._records.discard(paths)
        with self._pool.moves:
            self._pool.discard(paths)

    def remove_bad(self, entries: Sequence[str]) -> None:
        """Remove these of the root's entries that end in ``.bad``. What cannot be removed stays."""
        self._check_open()
        for entry in entries:
            try:
                self._folder.remove_tree(entry)
            except OSError as error:
                log.error("cannot remove %s: %s", self._folder.at(entry), error)

    def abandon(self, slot: Slot, *, bad: bool, why: str = "") -> None:
        """Give a checkpoint up, ``why`` if it failed. Only when no thread writes to its files any more. Idempotent; never raises.
        ``bad`` after EIO or a failed sync: the kernel may have dropped what it could not write, and reading can show what is not
        on the disk, so the directory is renamed ``.bad`` and never used again."""
        self._check_owner()
        pool = self._pool_of(slot)
        try:
            with pool.moves:
                if not pool.release(slot):
                    return
                slot.forget()
                if slot.target is not None and slot.parent.find(slot.entry) is None:
                    slot.entry = slot.target  # interrupted just behind the rename
                elif slot.target is not None:
                    slot.give_back_name()
                slot.target = None
                if bad or slot.suspect:
                    pool.condemn(slot)
                elif slot.name is not None:
                    pool.remove(slot)
                else:
                    pool.recycle(slot)
        except (StoreError, OSError) as error:  # it stays as it is, a .partial that this process does not use again
            log.error("%s is not given back: %s", slot.path, error)

    def close(self) -> None:
        """Give the lock back. What is in flight stays ``.partial``. Idempotent; nothing in a forked child. Raises
        ``StoreError``, and keeps the lock, if another thread is stuck in the disk and may yet rename."""
        if os.getpid() != self._pid or self._lock is None:
            return
        with self._pool.moves, self._records.moves:
            _let_go(self._lock, self._folder)
            self._finalizer.detach()
            self._lock = None


def not_loaded(root: str, found: int) -> str:
    """What is wrong where checkpoints of an earlier life would be replaced."""
    return (
        f"{root} has {found} checkpoint(s) that were not loaded: training from the beginning would replace them. Call "
        "fxckpt.load() before the first step, name another directory, or say fresh=True to give them up"
    )


def _let_go(lock: DirectoryLock, folder: Folder) -> None:
    """Give the lock back, and the directory."""
    lock.release()
    folder.close()
