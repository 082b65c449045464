"""Listing, verifying and reading checkpoints, safe while a trainer writes to the same store.

A trainer may take a directory back at any moment: it renames it away *before* it changes a byte. So whoever finds something
wrong looks again: if the name leads to the same record still, the bytes are ``Corrupt``; else it vanished (``NoCheckpoint``).

Nothing here opens the lock file: closing it would end the lock of a trainer in the same process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from fxckpt.engine import io, read_verified
from fxckpt.engine.plan import Item
from fxckpt.engine.reading import Target
from fxckpt.errors import Corrupt, NoCheckpoint
from fxckpt.store import names
from fxckpt.store.boxes import Box, Sheet, chunks_of, sheets
from fxckpt.store.directory import local_path
from fxckpt.store.dtypes import RawTensor, item_size, numpy_dtype
from fxckpt.store.files import UNREADABLE, read_small
from fxckpt.store.folder import check_regular, opened
from fxckpt.store.identity import check_store
from fxckpt.store.info import CheckpointInfo, describe
from fxckpt.store.layout import Placed, header_bytes, parse_header
from fxckpt.store.parts import box_of, joined, seen_by
from fxckpt.store.record import FileRecord, Place, Record, TensorRecord
from fxckpt.store.stretches import Stored

log: logging.Logger = logging.getLogger("fxckpt")

_LANDING = 256 << 20  # bytes that are read before they are cut

_LOOKS = 50  # times that a listing which is overtaken by the trainer is made anew


@dataclass(frozen=True)
class Candidate:
    """A checkpoint whose record is whole; its files are not read yet. ``record``: of all ranks that wrote it, or of rank 0
    alone."""

    path: Path
    record: Record


def directory_of(each: Candidate | Corrupt) -> str:
    """The directory of a checkpoint, or of one whose record is damaged."""
    return os.path.dirname(each.path) if isinstance(each, Corrupt) else str(each.path)


def read_record(path: str, of_all: bool = True) -> Record:
    """The record of the checkpoint in directory ``path``; not ``of_all``: of several ranks that wrote it, rank 0's alone. Raises
    ``Corrupt``; ``NoCheckpoint`` if it is not there."""
    first = _parse(_commit_bytes(path), path)
    return joined(first, path, record_bytes) if of_all else first


def _parse(raw: bytes, path: str) -> Record:
    """The record in ``raw``, which must be the one of the directory ``path``: not copied there from another checkpoint."""
    file = os.path.join(path, names.COMMIT)
    record = Record.from_bytes(raw, file)
    if (why := record.misplaced(path)) is not None:
        raise Corrupt(file, why)
    if record.parts == ():
        raise Corrupt(file, "it is the record of one rank's part, not that of the whole")
    return record


def _commit_bytes(path: str) -> bytes:
    """The content of ``commit.json``, whole or not."""
    return record_bytes(os.path.join(path, names.COMMIT))


def record_bytes(file: str) -> bytes:
    """The content of one of the records in the directory of a checkpoint."""
    path = os.path.dirname(file)
    try:
        return read_small(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.isdir(path):
            raise NoCheckpoint(f"there is no checkpoint {path}") from error
        raise Corrupt(file, "the file is missing") from error


def candidates(directory: str | os.PathLike[str], of_all: bool = True) -> list[Candidate | Corrupt]:
    """All checkpoints, newest generation first; one whose record is damaged is its error, placed by the step in its name. A
    directory that is missing or empty has none; one that holds something else raises ``NotAStore``. Not ``of_all``: with rank 0's
    records alone."""
    root = os.path.abspath(directory)
    check_store(root)
    paths = names.committed(root)
    for _ in range(_LOOKS):
        found, listed = _look(paths, of_all), paths
        paths = names.committed(root)
        # Renames while a directory is listed can hide the old name and the new one from the same listing.
        if paths == listed:
            break
    return found


def records(directory: str | os.PathLike[str], of_all: bool = True) -> list[Candidate | Corrupt]:
    """All records of the journal, newest generation first; one that is damaged is its error, as in ``candidates``."""
    root = os.path.abspath(directory)
    paths = names.recorded(root)
    for _ in range(_LOOKS):
        found, listed = _look(paths, of_all, names.RECORDS), paths
        paths = names.recorded(root)
        if paths == listed:
            break
    return found


def _look(paths: list[str], of_all: bool, kind: str = names.STEPS) -> list[Candidate | Corrupt]:
    """The records of these directories, newest first, without those that were taken back meanwhile."""
    whole: list[Candidate] = []
    damaged: list[tuple[int, Corrupt]] = []
    for path in paths:
        try:
            whole.append(Candidate(Path(path), read_record(path, of_all)))
        except NoCheckpoint:
            continue
        except Corrupt as error:
            damaged.append((names.step_of(os.path.basename(path), kind) or 0, error))
    whole.sort(key=lambda found: found.record.generation, reverse=True)
    found: list[Candidate | Corrupt] = list(whole)
    for step, broken in sorted(damaged, key=lambda each: each[0]):
        later = (at for at, each in enumerate(found) if isinstance(each, Candidate) and each.record.step <= step)
        found.insert(next(later, len(found)), broken)
    return found


def checkpoints(directory: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """List the checkpoints of a store, each a directory that can be read alone, oldest generation first. Safe while a trainer
    writes there. Steps of the journal are none; :func:`durable_steps` lists both.

    Only their records are read, which say what each layer is and where it lies; one whose record is damaged is left out.

    Args:
        directory: the store, as given to ``compile_step``.

    Returns:
        One ``CheckpointInfo`` for each, named saves included; none for a directory that is missing or empty.

    Raises:
        NotAStore: the directory holds something else.
        SetupError: it is a URL, or names a variable that is not set.
    """
    found = [each for each in candidates(local_path(directory)) if isinstance(each, Candidate)]
    return [describe(each.path, each.record) for each in reversed(found)]


def latest(directory: str | os.PathLike[str], verify: bool = True) -> CheckpointInfo | None:
    """Find the newest checkpoint of a store that verifies. Safe while a trainer writes there. With a journal, later steps may be
    durable: :func:`durable_steps` lists them.

    Args:
        directory: the store, as given to ``compile_step``.
        verify: read every byte of it and compare checksums. False: only its record, which takes no time.

    Returns:
        The checkpoint, or None if there is none. What does not verify is skipped, and logged.

    Raises:
        NotAStore: the directory holds something else.
        SetupError: it is a URL, or names a variable that is not set.
        NoCheckpoint: a trainer takes each one back before it is read, again and again.
    """
    for _ in range(_LOOKS):
        with suppress(NoCheckpoint):  # there are newer ones now
            return _newest(local_path(directory), verify)
    raise NoCheckpoint(f"{directory}: checkpoints are replaced faster than they can be read")


def _newest(directory: str | os.PathLike[str], verify: bool) -> CheckpointInfo | None:
    """One try of ``latest``. Raises ``NoCheckpoint`` if a checkpoint vanished while it was read."""
    for each in candidates(directory):
        try:
            if isinstance(each, Corrupt):
                raise each
            reader = Reader(each.path)
            if verify:
                reader.verify()
            return describe(reader.path, reader.record)
        except Corrupt as error:
            log.warning("skipping a checkpoint that does not verify: %s", error)
    return None


class Reader:
    """One checkpoint. Raises ``Corrupt`` if its record does not verify, ``NoCheckpoint`` if there is none at ``path``. All that
    it returns was verified; after an error of ``read_into`` the targets hold a mixture. ``rank``: as which of several ranks that
    wrote it together it is read; ``read``: gives the content of their records, by their paths."""

    def __init__(self, path: str | os.PathLike[str], rank: int = 0, read: Callable[[str], bytes] | None = None):
        self.path: Path = Path(os.path.abspath(path))
        self._raw = _commit_bytes(str(self.path))
        self._inode = self._find()
        self._held: dict[str, int] = {}
        whole = joined(_parse(self._raw, str(self.path)), str(self.path), read or record_bytes)
        self.record: Record = seen_by(whole, rank, str(self.path))

    @property
    def raw(self) -> bytes:
        """The content of ``commit.json``."""
        return self._raw

    @cached_property
    def _places(self) -> Mapping[Place, TensorRecord]:
        return {tensor.place: tensor for tensor in self.record.tensors()}

    @contextmanager
    def held(self) -> Iterator[Mapping[str, int]]:
        """Descriptors of all files. For the time of the block nothing of this checkpoint changes or vanishes: a trainer rewrites
        no file in place that somebody has open (``files.in_use``); it makes new ones, which takes it longer. Raises
        ``NoCheckpoint`` if it was taken back already."""
        with ExitStack() as stack:
            found = {}
            for file in self.record.files:
                self._size(file)
                with self._stable(file):
                    found[file.name] = stack.enter_context(opened(str(self.path / file.name), os.O_RDONLY))
            if self._vanished():  # then the bytes may have changed before they were held
                raise NoCheckpoint(f"{self.path} was taken back by the trainer")
            self._held = found
            try:
                yield found
            finally:
                self._held = {}

    def verify(self, progress: Callable[[int], None] | None = None, part: int | None = None) -> None:
        """Read every chunk of every file, or of those that one rank wrote (``part``, where there are several); sizes, checksums
        and headers must be what the record says. ``progress`` is told of bytes as they are read, 256 MiB at a time."""
        ranks = self.record.ranks
        for file in ranks[part].files if ranks and part is not None else self.record.files:
            self._read(file, [], progress)

    def read_into(
        self, targets: Mapping[Place, Item], file: str | None = None, *, boxes: Mapping[Place, Box] | None = None
    ) -> None:
        """Read tensors to where they belong: (file, key) → (address, sizes or None, strides in bytes or None). Every file (or
        every one of the kind ``file``) is verified whole, with targets or without. Raises ``KeyError`` first.

        ``boxes``: of these only a box, (offset, shape), is wanted, and its target is memory of that shape. With it, and where
        tensors are stored in boxes, only chunks are read that hold something wanted; of headers nothing is looked at.
        """
        found = {place: (self._places[place], target) for place, target in targets.items()}
        if boxes is None and not self.record.is_sharded:
            wanted: dict[str, list[Target]] = {}
            for tensor, target in found.values():
                wanted.setdefault(tensor.file, []).append((tensor.begin, tensor.nbytes, *target))
            for each in self.record.files:
                if file in (None, names.kind_of(each.name)):
                    self._read(each, wanted.get(each.name, []))
            return
        self.read_boxes(
            (place, (boxes or {}).get(place), target) for place, (_, target) in found.items() if file in (None, place[0])
        )

    def read_boxes(self, wanted: Iterable[tuple[Place, Box | None, Item]]) -> None:
        """Read boxes of tensors (None: all of one), each to memory of its shape, as ``read_into`` does. Of one tensor
        there may be several."""
        needed: dict[str, list[tuple[int, Sheet]]] = {}
        for place, box, target in wanted:
            for piece, sheet in _sheets(self._places[place], box, target):
                needed.setdefault(piece.file, []).append((piece.begin, sheet))
        for each in self.record.files:
            if each.name in needed:
                self._read_sheets(each, sorted(needed[each.name], key=lambda one: one[0] + one[1].begin))

    def bytes_for(self, boxes: Mapping[Place, Box]) -> int:
        """How many bytes are read to have these boxes, as chunks are read whole."""
        needed: dict[str, list[Target]] = {}
        for place, box in boxes.items():
            for piece, sheet in _sheets(self._places[place], box, (0, None, None)):
                needed.setdefault(piece.file, []).append((piece.begin + sheet.begin, sheet.nbytes, 0, None, None))
        sizes = {file.name: file.chunk_bytes for file in self.record.files}
        return sum(sizes[name] * sum(map(len, chunks_of(sorted(each), sizes[name]))) for name, each in needed.items())

    def stored(self, kind: str) -> list[list[Stored]]:
        """What lies in each file of a kind."""
        files: dict[str, list[Stored]] = {}
        for tensor in self.record.tensors(kind):
            for piece in tensor.pieces or (tensor,):
                one = Stored(tensor.place, box_of(piece), piece.begin, item_size(tensor.dtype))
                files.setdefault(piece.file, []).append(one)
        return [files[name] for name in sorted(files)]

    def _read_sheets(self, file: FileRecord, needed: Sequence[tuple[int, Sheet]]) -> None:
        """Read sheets of a file, each with where its box begins, in order of their offsets."""
        self._size(file)
        for batch in _batches(needed):
            landed = [None if sheet.is_whole else np.empty(sheet.nbytes, np.uint8) for _, sheet in batch]
            targets = [
                sheet.target(begin) if data is None else (begin + sheet.begin, sheet.nbytes, data.ctypes.data, None, None)
                for (begin, sheet), data in zip(batch, landed)
            ]
            only = chunks_of(targets, file.chunk_bytes)
            with self._stable(file):
                read_verified(str(self.path / file.name), nbytes=file.nbytes, chunk_bytes=file.chunk_bytes, crcs=file.crc32c,
                              held=self._held.get(file.name), targets=targets, only=only)  # fmt: skip
            for (_, sheet), data in zip(batch, landed):
                if data is not None:
                    sheet.take(data)

    def held_bytes(self, tensor: TensorRecord, begin: int, nbytes: int) -> bytes:
        """Some bytes of a tensor's elements, in row-major order, of a checkpoint that is held and was verified."""
        if not tensor.pieces:
            return io.pread(self._held[tensor.file], nbytes, tensor.begin + begin)
        width = tensor.nbytes // tensor.shape[0]
        first, last = begin // width, -(-(begin + nbytes) // width)
        rows = (first, *(0 for _ in tensor.shape[1:])), (last - first, *tensor.shape[1:])
        data = np.empty((last - first) * width, np.uint8)
        self.read_into({tensor.place: (data.ctypes.data, None, None)}, boxes={tensor.place: rows})
        return data[begin - first * width :][:nbytes].tobytes()

    def state_tensors(self) -> dict[str, np.ndarray | RawTensor]:
        """The tensors of ``state.safetensors``, for ``decode_state``; ``RawTensor`` for types that numpy lacks."""
        for file in self.record.files:
            if file.name == self.record.state_file:
                data = self._memory(file)
                header = self._read(file, [(0, file.nbytes, data.ctypes.data, None, None)])
                return {key: _tensor(placed, data) for key, placed in header.items()}
        return {}

    def _memory(self, file: FileRecord) -> np.ndarray:
        """Room for a whole file."""
        try:
            return np.empty(self._size(file), np.uint8)
        except MemoryError as error:
            raise Corrupt(self.path / file.name, f"its {file.nbytes} bytes do not fit into memory") from error

    def _size(self, file: FileRecord) -> int:
        """The bytes of a file, which must be what the record says: no memory is taken on a record's word alone."""
        path, held = str(self.path / file.name), self._held.get(file.name)
        with self._stable(file):
            found = (check_regular(path) if held is None else os.fstat(held)).st_size
            if found != file.nbytes:
                raise Corrupt(path, f"the file has {found} bytes, the record says {file.nbytes}", offset=min(found, file.nbytes))
            return found

    def _read(self, file: FileRecord, targets: list[Target], progress: Callable[[int], None] | None = None) -> dict[str, Placed]:
        """Verify one file while reading it into ``targets`` (as ``read_verified`` takes them); returns its header. The index
        of the model's files has none."""
        path, held = str(self.path / file.name), self._held.get(file.name)
        self._size(file)
        if file.name == names.INDEX:
            with self._stable(file):
                read_verified(path, nbytes=file.nbytes, chunk_bytes=file.chunk_bytes, crcs=file.crc32c, held=held, targets=[])
            return {}
        with self._stable(file):
            with opened(path, os.O_RDONLY) if held is None else nullcontext(held) as fd:
                first8 = io.pread(fd, 8, 0)
            read = partial(read_verified, path, nbytes=file.nbytes, chunk_bytes=file.chunk_bytes, crcs=file.crc32c, held=held)
            try:
                raw = np.empty(header_bytes(first8, file.nbytes, path), np.uint8)
            except Corrupt:
                read(
                    targets=[], only=[range(min(1, len(file.crc32c)))]
                )  # the checksum of the first chunk tells more than a header that was written wrong
                raise
            read(targets=[(0, raw.nbytes, raw.ctypes.data, None, None), *targets], progress=progress)
            header = parse_header(raw.tobytes(), file.nbytes, path)
            self._compare(file, header)
            return header

    def _compare(self, file: FileRecord, header: Mapping[str, Placed]) -> None:
        """The header must have the record's tensors, where the record has them."""
        if names.kind_of(file.name) == names.STATE:
            return  # its tensors belong to no layer: the encoded state names them
        listed = (each for record in self.record.ranks or [self.record] for each in record.tensors() if each.file == file.name)
        recorded = {tensor.key: (tensor.dtype, tensor.shape, tensor.begin) for tensor in listed}
        found = {key: (placed.spec.dtype, placed.spec.shape, placed.begin) for key, placed in header.items()}
        for key in sorted(recorded.keys() | found.keys()):
            if recorded.get(key) != found.get(key):
                differs = f"tensor {key!r} is {found.get(key)} in the header and {recorded.get(key)} in the record"
                raise Corrupt(self.path / file.name, differs)

    def _find(self) -> int | None:
        """The inode that the path leads to now, if any."""
        try:
            return os.stat(self.path).st_ino
        except FileNotFoundError:
            return None

    def _vanished(self) -> bool:
        """Whether the trainer took the directory back: its name is gone, or leads to another directory or record."""
        try:
            return self._find() != self._inode or _commit_bytes(str(self.path)) != self._raw
        except NoCheckpoint:
            return True
        except Corrupt:
            return False

    @contextmanager
    def _stable(self, file: FileRecord) -> Iterator[None]:
        """Tell damage from a directory that was taken back meanwhile, and name the layers that are damaged."""
        try:
            yield
        except (Corrupt, OSError) as error:
            if not self._held and self._vanished():
                raise NoCheckpoint(f"{self.path} was taken back by the trainer while it was read") from error
            if isinstance(error, Corrupt):
                raise self._named(error, file) from error
            missing = isinstance(error, FileNotFoundError)
            if not missing and error.errno not in UNREADABLE:
                raise
            why = "the file is missing" if missing else f"it cannot be read: {error.strerror}"
            raise self._named(Corrupt(self.path / file.name, why), file) from error

    def _named(self, error: Corrupt, file: FileRecord) -> Corrupt:
        """The same error with the layers whose bytes share the damaged chunk; without an offset, all of the file's."""
        begin = error.offset if error.offset is not None else 0
        end = begin + file.chunk_bytes if error.offset is not None else file.nbytes
        hit = ["extra state"] if names.kind_of(file.name) == names.STATE else [
            layer.name for record in self.record.ranks or [self.record] for layer in record.layers
            if any(t.file == file.name and t.begin < end and begin < t.begin + t.nbytes for t in layer.tensors)
        ]  # fmt: skip
        return Corrupt(error.path, error.reason, layer=", ".join(hit) or None, offset=error.offset)


def _sheets(tensor: TensorRecord, box: Box | None, target: Item) -> Iterator[tuple[TensorRecord, Sheet]]:
    """What to read of each stored piece of a tensor, to have it or a box of it. Raises ``ValueError`` if it has no such box."""
    offset, shape = wanted = box or box_of(tensor)
    if len(offset) != len(tensor.shape) or any(at + n > whole for at, n, whole in zip(offset, shape, tensor.shape)):
        raise ValueError(f"{tensor.key!r} of shape {tensor.shape} has no box of {shape} at {offset}")
    for piece in tensor.pieces or (tensor,):
        for sheet in sheets(box_of(piece), wanted, item_size(tensor.dtype), target):
            yield piece, sheet


def _batches(needed: Sequence[tuple[int, Sheet]]) -> Iterator[Sequence[tuple[int, Sheet]]]:
    """So many sheets at a time that those which are cut fit into ``_LANDING``."""
    first = total = 0
    for i, (_, sheet) in enumerate(needed):
        size = 0 if sheet.is_whole else sheet.nbytes
        if total + size > _LANDING and i > first:
            yield needed[first:i]
            first, total = i, 0
        total += size
    yield needed[first:]


def _tensor(placed: Placed, data: np.ndarray) -> np.ndarray | RawTensor:
    """One tensor as a view of the file's bytes."""
    raw = data[placed.begin : placed.begin + placed.nbytes]
    dtype = numpy_dtype(placed.spec.dtype)
    if dtype is None:
        return RawTensor(placed.spec.dtype, placed.spec.shape, raw.data)
    return raw.view(dtype).reshape(placed.spec.shape)
