"""Checkpoints of other ranks beside a store: ``replicas/rank-00003/step-000000012-g5``, each a checkpoint directory like any.

A replica becomes one in the order of a store's own commits (``slots``): files under a temporary name, each durable; the record;
the final name. Nobody else writes there: the store's lock covers it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxckpt.engine import io
from fxckpt.engine.sums import continue_sums, sums_of_blocks
from fxckpt.errors import Corrupt, NoCheckpoint, StoreError
from fxckpt.store import names
from fxckpt.store.about import known_as, order_of
from fxckpt.store.files import FOREIGN, replace_file, space
from fxckpt.store.folder import Folder
from fxckpt.store.reader import Candidate, Reader, read_record
from fxckpt.store.record import FileRecord, Record

log: logging.Logger = logging.getLogger("fxckpt")

Read = Callable[[memoryview], None]
"""Fills a buffer with the next bytes of what arrives."""

PIECE = 1 << 20
"""Bytes in memory at a time, whatever the size of a file."""

ROOM = 1 << 20
"""Bytes that stay free beside a replica, for its record and directories. So does as much as it has itself: the store's own
checkpoints are of that size, and come first."""

_ARRIVING, _GOING = (names.slot_name(number) + names.PARTIAL for number in (0, 1))


class Arrival:
    """One replica on its way in: ``record`` says what comes, file by file, in its order. ``is_here``: it came before, and
    verifies."""

    def __init__(self, ranks: Folder, record: Record, raw: bytes, is_here: bool):
        self.record: Record = record
        self.is_here: bool = is_here
        self._ranks, self._raw = ranks, raw
        self._left = record.nbytes

    @property
    def entry(self) -> str:
        """What its directory will be called."""
        return names.step_name(self.record.step, self.record.generation)

    def receive(self, read: Read) -> None:
        """Write what ``read`` brings, each chunk compared with its checksum in the record, and make it a checkpoint, durably. All
        bytes are read even if they cannot be kept, so that the sender is there to be told. Raises ``Corrupt``, ``OSError``."""
        try:
            self._ranks.remove_tree(_ARRIVING)
            self._ranks.mkdir(_ARRIVING)
            with self._ranks.within(_ARRIVING) as slot:
                for file in self.record.files:
                    with slot.opened(file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                        self._receive_file(file, fd, read, slot.at(file.name))
                        io.fdatasync(fd)
                replace_file(slot, names.COMMIT, self._raw, durable=True)
                slot.sync()
            remove(self._ranks, self.entry)  # of this name, but of another life, or rotten
            self._ranks.rename(_ARRIVING, self.entry)
            self._ranks.sync()
        except (Corrupt, OSError):
            buffer = memoryview(bytearray(PIECE))
            while self._left:
                self._next(buffer[: min(PIECE, self._left)], read)
            raise

    def _receive_file(self, file: FileRecord, fd: int, read: Read, path: str) -> None:
        buffer, at = memoryview(bytearray(min(PIECE, file.nbytes))), 0
        found, good = sums_of_blocks(file.nbytes, file.chunk_bytes), 0
        while at < file.nbytes:
            piece = buffer[: min(PIECE, file.nbytes - at)]
            self._next(piece, read)
            continue_sums(found, file.chunk_bytes, at, piece)
            io.pwrite(fd, piece, at)
            at += piece.nbytes
            here = len(found) if at == file.nbytes else at // file.chunk_bytes
            if found[good:here] != file.crc32c[good:here]:
                bad = next(i for i in range(good, here) if found[i] != file.crc32c[i])
                what = f"what arrived has the checksum {found[bad]:08x}, the record says {file.crc32c[bad]:08x}"
                raise Corrupt(path, what, offset=bad * file.chunk_bytes)
            good = here

    def _next(self, piece: memoryview, read: Read) -> None:
        read(piece)
        self._left -= piece.nbytes


class ReplicaFolder:
    """What lies in ``replicas`` beside the store in ``root``. Of each rank the newest ``keep`` stay, and what that rank says.
    Thread-safe, but for one rank's arrivals, of which there may be one at a time."""

    def __init__(self, root: str, keep: int):
        self._root, self._keep = root, keep
        self._lock = threading.Lock()
        self._busy: set[int] = set()  # ranks from which something arrives

    def listed(self, rank: int | None = None, step: int | None = None) -> list[tuple[int, Candidate]]:
        """(rank, checkpoint) of all, or of this ``rank`` or ``step``, whose record is whole and of that rank; others are said."""
        found = []
        for whose, path in names.replicated(self._root):
            if rank not in (None, whose) or step not in (None, names.step_of(os.path.basename(path))):
                continue
            try:
                record = read_record(path)
            except NoCheckpoint:
                continue
            except Corrupt as error:
                log.warning("fxckpt: a replica does not verify and counts as none: %s", error)
                continue
            if record.rank == whose:
                found.append((whose, Candidate(Path(path), record)))
        return found

    @contextmanager
    def arriving(self, rank: int, raw: bytes) -> Iterator[Arrival]:
        """For the time of the block a replica of this ``rank`` arrives, of which this is the record. Raises ``Corrupt`` for a
        record that is none of such a checkpoint, ``StoreError`` if there is no room or another one is arriving, ``OSError``."""
        record = self._checked(rank, raw)
        with self._alone(rank), self._of(rank) as ranks:
            arrival = Arrival(ranks, record, raw, self._is_here(rank, record, raw))
            if not arrival.is_here and (free := space(self._root)[0]) < 2 * record.nbytes + ROOM:
                raise StoreError(
                    f"{record.nbytes:,} bytes, and room for another checkpoint of that size, are not in {self._root}, which has "
                    f"{free:,} bytes free"
                )
            yield arrival

    @contextmanager
    def _alone(self, rank: int) -> Iterator[None]:
        """Nobody else changes what is here of this rank. Raises ``StoreError`` if somebody does."""
        with self._lock:
            if rank in self._busy:
                raise StoreError(f"another replica of rank {rank} is arriving")
            self._busy.add(rank)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(rank)

    def _checked(self, rank: int, raw: bytes) -> Record:
        where = os.path.join(self._root, names.REPLICAS, names.replicas_name(rank))
        record = Record.from_bytes(raw, where)
        if record.rank != rank or record.parts is not None or record.journal is not None or record.name is not None:
            raise Corrupt(where, f"it is no record of a checkpoint that rank {rank} wrote into a store of its own")
        if bad := [file.name for file in record.files if file.name.endswith(names.TEMPORARY)]:
            raise Corrupt(where, f"no file of a checkpoint is called {bad[0]!r}")
        return record

    @contextmanager
    def _of(self, rank: int) -> Iterator[Folder]:
        """The directory of a rank, made if need be. What is none, or a link, is put aside."""
        root = Folder.open(self._root)
        try:
            top = _enter(root, names.REPLICAS)
            try:
                inner = _enter(top, names.replicas_name(rank))
                try:
                    yield inner
                finally:
                    inner.close()
            finally:
                top.close()
        finally:
            root.close()

    def _is_here(self, rank: int, record: Record, raw: bytes) -> bool:
        """Is this checkpoint there already, and good?"""
        for _, found in self.listed(rank, record.step):
            if found.record == record:
                try:
                    reader = Reader(found.path)
                    reader.verify()
                    return reader.raw == raw
                except (Corrupt, NoCheckpoint) as error:
                    log.warning("fxckpt: a replica does not verify, and is replaced: %s", error)
        return False

    def retain(self, rank: int, but: Collection[tuple[int, int, str]]) -> None:
        """Give up what this rank, whose replica has just arrived, has beyond its newest ``keep``, unless it is among those that
        it names. No failure raises."""
        try:
            found = sorted((each for _, each in self.listed(rank)), key=lambda each: order_of(each.record), reverse=True)
            with self._of(rank) as ranks:
                for each in found[self._keep :]:
                    if known_as(each.record) not in but:
                        remove(ranks, each.path.name)
        except OSError as error:
            log.warning("fxckpt: a replica that nobody needs any more stays: %s", error)

    def forget(self, life: str) -> None:
        """Give up what is here of ranks that have sent nothing in this life: it lies elsewhere by now, or nobody is that rank. No
        failure raises."""
        try:
            found = self.listed()
            for rank in {rank for rank, _ in found} - {rank for rank, each in found if known_as(each.record)[2] == life}:
                with self._alone(rank), self._of(rank) as ranks:
                    for each in (each for whose, each in found if whose == rank):
                        remove(ranks, each.path.name)
        except (OSError, StoreError) as error:
            log.warning("fxckpt: replicas that nobody needs any more stay: %s", error)


def remove(ranks: Folder, entry: str) -> None:
    """Give a replica up. It loses its name first, durably; fine if there is none."""
    if ranks.find(entry) is not None:
        ranks.remove_tree(_GOING)
        ranks.rename(entry, _GOING)
        ranks.sync()
    ranks.remove_tree(_GOING)


def _enter(folder: Folder, name: str) -> Folder:
    """A directory in this one, made durably if it is not there."""
    try:
        return folder.enter(name)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in FOREIGN:
            raise
        folder.put_aside(name)
    with suppress(FileExistsError):  # another rank's replica arrives at the same time
        folder.mkdir(name)
    folder.sync()
    return folder.enter(name)
