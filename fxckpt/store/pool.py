"""The directories of a store: which are free, being written, committed or bad, and the moves between these.

free ──take──► busy ──committed──► committed ──give up──► free
                └──abandon──► free, or ``.bad`` after a failing disk
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from fxckpt.engine import PatientLock, io
from fxckpt.errors import Corrupt, NoCheckpoint, NoSpace, SaveFailed, StoreError
from fxckpt.store import names
from fxckpt.store.files import FOREIGN, space
from fxckpt.store.folder import Folder
from fxckpt.store.reader import Reader
from fxckpt.store.retention import BAD, GOOD, UNKNOWN, CheckpointStatus, beyond, surplus
from fxckpt.store.slot import Slot

log: logging.Logger = logging.getLogger("fxckpt")

SMALL_FILES = 1 << 20
"""Room that each checkpoint is reckoned to take for its record and its extra state."""

PATIENCE = 300.0
"""Seconds to wait for another thread that renames and syncs."""


class Pool:
    """At most ``keep + max_async`` slots in ``root``; named saves, bad ones and what is kept beyond ``keep`` apart. ``mutex``
    guards the tables and is never held over I/O; ``moves`` is held over I/O, by whoever renames: a ``StoreError`` if another
    thread that does is stuck in the disk. ``before_giving_up`` is told the generation of what is about to go."""

    kind = names.STEPS
    """What its directories are called by."""

    def __init__(self, root: str, keep: int, max_async: int):
        self.before_giving_up: Callable[[int], None] = lambda generation: None
        self.root: str = root
        self.folder: Folder = Folder(root, -1)  # open while the store is
        self.keep: int = keep
        self.max_async: int = max_async
        self.limit: int = keep + max_async  # slots, those beyond ``keep`` apart
        self.mutex: threading.Lock = threading.Lock()
        self.moves: PatientLock = PatientLock(lambda: PATIENCE, self._hangs)
        self.lineage: set[int] = set()  # generations that the next checkpoint continues
        self.pinned: int | None = None  # the loaded one, which stays until a newer one is committed
        self.held: set[int] = set()  # generations that other ranks rely on
        self.since: int = 0  # nothing up to this generation is kept beyond ``keep``: it is what fresh=True gives up
        self._free: list[Slot] = []
        self._busy: set[Slot] = set()
        self._committed: dict[Slot, CheckpointStatus] = {}
        self._numbers: set[int] = set()  # slot numbers in use, those of bad ones included
        self._condemned = 0

    def adopt_slots(self) -> list[Slot]:
        """Take in the ``.partial`` directories; returns them. Bad ones keep their number and are left alone."""
        for name in names.subdirectories(self.root):
            number = names.slot_number(name, self.kind)
            if number is None:
                continue
            self._numbers.add(number)
            if name.endswith(names.PARTIAL):
                self._free.append(Slot(self.folder, name, number))
        return list(self._free)

    def adopt_checkpoint(self, entry: str, known: CheckpointStatus) -> None:
        """Take in a checkpoint; after ``adopt_slots``, which knows the numbers that are taken."""
        self._committed[Slot(self.folder, entry, self._new_number())] = known

    def continue_from(self, generation: int | None, lineage: set[int]) -> None:
        """What comes next continues this checkpoint, which was verified, or none; ``mutex`` is held."""
        self.lineage, self.pinned = lineage, generation
        if generation is not None:
            self.since = 0  # not a new beginning after all
        for slot, known in self._committed.items():
            if known.generation == generation:
                self._committed[slot] = dataclasses.replace(known, trust=GOOD)

    def reserve(self, files: Mapping[str, int]) -> None:
        """Make all slots that may exist, and have the file system set blocks aside for their files (name: bytes). Raises
        ``NoSpace``; what was made for it is removed then."""
        with self.moves:
            with self.mutex:
                before = list(self._free)
            try:
                self._reserve(files)
            except BaseException:
                with self.mutex:
                    made = [slot for slot in self._free if slot not in before]
                    self._free = before
                for slot in made:
                    self.remove(slot)
                raise

    def _reserve(self, files: Mapping[str, int]) -> None:
        """``moves`` is held."""
        with self.mutex:
            self._free = [slot for slot in self._free if self._enter(slot)]
        new = max(self.limit - self._count(), 0)
        lacking = sum(slot.lacks(files) for slot in self._free) + new * sum(files.values())
        margin = SMALL_FILES * (new + len(self._free)) if lacking else 0
        free, _ = space(self.root)
        numbers = (
            f"{self.limit} checkpoints of {sum(files.values()):,} bytes (keep={self.keep}, and "
            f"max_async={self.max_async} being written) need {lacking + margin:,} bytes more in {self.root}, which has "
            f"{free:,} bytes free. Make room, lower keep or max_async, or name a directory on another disk"
        )
        if lacking + margin > free:
            raise NoSpace(numbers)
        try:
            for _ in range(new):
                self._free.append(self.make_slot())
            for slot in self._free:
                slot.enter()
                slot.reserve(files)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NoSpace(f"{os.strerror(error.errno)}, perhaps by a quota: {numbers}") from error
        finally:
            for slot in self._free:
                slot.leave()

    # ---- free → busy ----

    def take(self) -> Slot:
        """A slot to write in. Raises ``StoreError`` if ``max_async`` are in flight, ``SaveFailed``."""
        with self.mutex:
            if (in_flight := self._in_flight()) >= self.max_async:
                raise StoreError(f"{in_flight} checkpoints are in flight; commit or abandon one first")
        try:
            if (slot := self._take_free()) is not None:
                return slot
            with self.moves:  # a commit that is giving up its surplus is about to free one: wait for it
                self._make_room()
                while (slot := self._take_free()) is None:
                    self._free.append(self.make_slot())
                return slot
        except OSError as error:
            path = os.fsdecode(error.filename or self.root)
            raise SaveFailed(io.operation_of(error) or "open", path, None, error.errno) from error

    def _take_free(self) -> Slot | None:
        """A free slot, occupied; those whose directory somebody removed are forgotten."""
        with self.mutex:
            while self._free:
                slot = self._free[0]  # the one that readers had the longest time to leave
                try:
                    is_there = self._enter(slot)
                except OSError:
                    self._free.append(self._free.pop(0))
                    raise
                if is_there:
                    slot.begin()
                    self._busy.add(slot)  # before it is free no more: Ctrl-C may come in between, and then it is given back
                self._free.remove(slot)
                if is_there:
                    return slot
        return None

    def _enter(self, slot: Slot) -> bool:
        """Hold a free slot open; False if it is not there any more. ``mutex`` is held."""
        try:
            slot.enter()
            return True
        except FileNotFoundError:
            log.warning("%s is gone: somebody removed it. Another one is made", slot.path)
            self._numbers.discard(slot.number)
        except OSError as error:
            if error.errno not in FOREIGN:
                raise
            self.folder.put_aside(slot.entry)
            self._numbers.discard(slot.number)
        return False

    def _hangs(self) -> StoreError:
        return StoreError(f"{self.root}: another thread has been renaming or syncing there for {PATIENCE:g} s: the disk hangs")

    def others(self, known: Collection[Slot]) -> list[Slot]:
        """What is being written, and is none of these."""
        with self.mutex:
            return [slot for slot in self._busy if slot not in known]

    def occupy(self, slot: Slot) -> None:
        """A new slot, that of a named save, is being written."""
        slot.enter()
        with self.mutex:
            self._busy.add(slot)

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Hold ``moves``, however long another thread sets space aside: for the thread that commits, which is not interrupted."""
        self.moves.acquire()
        try:
            yield
        finally:
            self.moves.release()

    def is_busy(self, slot: Slot) -> bool:
        with self.mutex:
            return slot in self._busy

    def is_saving(self, name: str) -> bool:
        """Whether a named save of this name is in flight."""
        with self.mutex:
            return any(slot.name == name for slot in self._busy)

    def make_slot(self) -> Slot:
        """One more directory; its own name is synced by the commit that gives it its final one."""
        with self.mutex:
            number = self._new_number()
        slot = Slot(self.folder, names.slot_name(number, self.kind) + names.PARTIAL, number)
        try:
            if (found := self.folder.find(slot.entry)) is None:
                self.folder.mkdir(slot.entry)
            elif stat.S_ISDIR(found.st_mode):
                log.info("%s is there again", slot.path)  # removed and put back by somebody; a .partial is nobody's
            else:
                self.folder.put_aside(slot.entry)
                self.folder.mkdir(slot.entry)
        except OSError:
            with self.mutex:
                self._numbers.discard(number)
            raise
        return slot

    def _new_number(self) -> int:
        """The lowest slot number that is not in use; it is from now on."""
        number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers)
        self._numbers.add(number)
        return number

    def _make_room(self) -> None:
        """Free a slot if as many exist as may. Checkpoints of an earlier life are read if it hangs on their worth."""
        if self._condemned > self.limit:
            many = f"{self._condemned} directories went bad in this run ({self.root}/*{names.BAD})"
            raise StoreError(f"{many}: the disk or its connection is failing. Replace it; remove them to get their space back")
        while not self._free and self._count() >= self.limit:
            if self._give_up_one():
                continue
            with self.mutex:
                unknown = [slot for slot in self._ordinary() if self._committed[slot].trust == UNKNOWN]
            if not unknown:
                log.warning("%s: no checkpoint can be given up yet, so one more slot is made", self.root)
                return
            slot, trust = max(unknown, key=lambda slot: self._committed[slot].generation), GOOD
            try:
                Reader(slot.path).verify()
            except (Corrupt, NoCheckpoint, OSError) as error:
                log.warning("a checkpoint of an earlier run does not verify and is given up: %s", error)
                trust = BAD
            with self.mutex:
                self._committed[slot] = dataclasses.replace(self._committed[slot], trust=trust)

    def _count(self) -> int:
        """Slots that exist, those beyond ``keep`` apart."""
        with self.mutex:
            return len(self._free) + len(self._ordinary()) + self._in_flight()

    def _in_flight(self) -> int:
        """Slots that are being written, named saves apart; ``mutex`` is held."""
        return sum(slot.name is None for slot in self._busy)

    def _standings(self) -> dict[Slot, CheckpointStatus]:
        """What is known of the committed ones, as retention is to see it; ``mutex`` is held."""
        found = dict(self._committed)
        for slot, known in found.items():
            if known.generation in self.held:
                found[slot] = dataclasses.replace(known, lasting=True)
            elif known.generation <= self.since:
                found[slot] = dataclasses.replace(known, lasting=False, score=None)
        return found

    def _ordinary(self) -> list[Slot]:
        """The committed slots that are not kept beyond ``keep``; ``mutex`` is held."""
        known = self._standings()
        apart = {id(each) for each in beyond(list(known.values()), self.keep, self.lineage, self.pinned)}
        return [slot for slot, each in known.items() if id(each) not in apart]

    def newest(self) -> set[int]:
        """The generations of the committed ones that are not kept beyond ``keep``."""
        with self.mutex:
            return {self._committed[slot].generation for slot in self._ordinary()}

    def generations(self) -> set[int]:
        """Of the committed ones; ``mutex`` is held."""
        return {known.generation for known in self._committed.values()}

    # ---- busy → committed → free ----

    def committed(self, slot: Slot, known: CheckpointStatus) -> None:
        """The slot is a checkpoint now, durably."""
        with self.mutex:
            self._busy.discard(slot)
            slot.target = None
            self.lineage.add(known.generation)
            if self.pinned is not None and self.pinned < known.generation:
                self.pinned = None
            if slot.name is None:
                self._committed[slot] = known

    def retain(self) -> None:
        """Give up what is more than ``keep``, and remove free slots beyond the limit. No failure here raises."""
        while self._exceeds() and self._give_up_one():
            continue
        while self._count() > self.limit:
            with self.mutex:
                if not self._free:
                    break
                slot = self._free.pop()
            self.remove(slot)
        with self.mutex:
            self.lineage.intersection_update(self.generations() | {max(self.lineage, default=0)})

    def _exceeds(self) -> bool:
        """Whether more than ``keep`` checkpoints exist, those beyond it apart."""
        with self.mutex:
            return len(self._ordinary()) > self.keep

    def _give_up_one(self) -> bool:
        """Turn one checkpoint into a free slot (or a bad one, if the disk refuses); False if none may go."""
        with self.mutex:
            known = self._standings()
            chosen = surplus(list(known.values()), self.keep, self.lineage, self.pinned)
            slot = next((slot for slot, each in known.items() if each is chosen), None)
            if slot is None or chosen is None:
                return False
            del self._committed[slot]
        self.before_giving_up(chosen.generation)
        self.recycle(slot)
        return True

    def recycle(self, *slots: Slot) -> None:
        """Make slots free: not checkpoints by name, durably; bad ones if that fails. One sync is enough for many."""
        freed, renamed = [], False
        for slot in slots:
            try:
                renamed |= self._unname(slot)
                freed.append(slot)
            except OSError as error:
                self._not_freed(slot, error)
        try:
            if renamed:
                # Edge R: before its data is rewritten, else a power cut could bring the name "step-N" back over data
                # that is not that checkpoint's.
                self.folder.sync()
        except OSError as error:
            for slot in freed:
                self._not_freed(slot, error)
            return
        with self.mutex:
            self._free += [slot for slot in freed if slot not in self._free]

    def _unname(self, slot: Slot) -> bool:
        """Give it the name of a slot; False if it has that already."""
        if slot.entry.endswith(names.PARTIAL):
            return False
        partial = names.slot_name(slot.number or 0, self.kind) + names.PARTIAL
        self.folder.rename(slot.entry, partial)
        slot.entry = partial
        return True

    def _not_freed(self, slot: Slot, error: OSError) -> None:
        """A slot keeps its name, or cannot be relied on."""
        if error.errno == errno.EXDEV:
            log.warning("%s lies in a lower layer of an overlay (a container's image): it stays where it is", slot.path)
            return
        log.error("cannot free %s: %s", slot.path, error)
        self.condemn(slot)

    def discard(self, paths: Collection[str]) -> None:
        """Remove these checkpoints, and every slot that waits to be used again."""
        with self.mutex:
            chosen = [slot for slot in self._committed if slot.path in paths]
            for slot in chosen:
                del self._committed[slot]
        self.recycle(*chosen)
        with self.mutex:
            free, self._free = self._free, []
        for slot in free:
            self.remove(slot)

    def release(self, slot: Slot) -> bool:
        """The slot is not being written any more; False if it was not."""
        with self.mutex:
            was_busy = slot in self._busy
            self._busy.discard(slot)
        slot.leave()
        return was_busy

    def retire(self, slot: Slot, *, aside: bool) -> None:
        """A checkpoint that does not verify any more: put aside, by whatever name it has now, or the first to be given up."""
        with self.mutex:
            known = self._committed.get(slot)
            if slot.name is None and known is None:
                return  # given up meanwhile
            if known is not None and aside:
                del self._committed[slot]
            elif known is not None:
                self._committed[slot] = dataclasses.replace(known, trust=BAD)
        if aside:
            self.condemn(slot)

    def condemn(self, slot: Slot) -> None:
        """Rename it ``.bad``; if even that fails, at least this process does not use it again."""
        slot.forget()
        if slot.parent.find(slot.entry) is None:
            log.error("%s is gone: somebody removed it", slot.path)
            with self.mutex:
                self._numbers.discard(slot.number)
            return
        self._condemned += 1
        bad = (slot.name or names.slot_name(slot.number or 0, self.kind)) + names.BAD
        try:
            slot.parent.remove_tree(bad)  # only that of an earlier named save of this name can be there
            slot.parent.rename(slot.entry, bad)  # no sync: after a power cut, what is read is what the disk has
            slot.entry = bad
            log.error("%s may not hold what was written to it: not used again. Check the disk, then remove it", slot.path)
        except OSError as error:
            log.error("%s went bad and could not be renamed: not used again by this process: %s", slot.path, error)

    def remove(self, slot: Slot) -> None:
        """Remove a slot's directory with all that is in it."""
        try:
            if not slot.entry.endswith(names.PARTIAL):  # a named one, interrupted between its rename and the sync
                slot.parent.rename(slot.entry, slot.entry + names.PARTIAL)
                slot.entry += names.PARTIAL
                # Edge X: before its files go, else a power cut could bring the name back over what is left of them.
                slot.parent.sync()
            slot.parent.remove_tree(slot.entry)
        except OSError as error:
            log.error("cannot remove %s: %s", slot.path, error)
            return
        with self.mutex:
            if slot.number is not None:
                self._numbers.discard(slot.number)
