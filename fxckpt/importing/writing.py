"""Write what was found as the first checkpoint of a store, by the store's own way to a commit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fxckpt.engine import crc32c, io
from fxckpt.errors import NoSpace, SetupError
from fxckpt.importing.source import PIECE, Source, Stored
from fxckpt.importing.state_dicts import named
from fxckpt.store import names
from fxckpt.store.about import CONFIG, IMPORTED
from fxckpt.store.dtypes import Tensor
from fxckpt.store.files import opened, space, write_laid_out
from fxckpt.store.folder import Folder
from fxckpt.store.layout import FileLayout, TensorSpec, lay_out
from fxckpt.store.names import MODEL, OPTIMIZER, state_key
from fxckpt.store.reader import Reader
from fxckpt.store.record import LayerRecord, Record, TensorRecord
from fxckpt.store.slots import Store
from fxckpt.store.typed_json import encode_state

SPARE = 1 << 20  # bytes for the record and what a file system takes itself

Progress = Callable[[int], None]


class Contents:
    """What the checkpoint will hold: tensors by file and key, and the record's encoded values."""

    def __init__(self, source: Source):
        self.source: Source = source
        self.files: dict[str, dict[str, Stored]] = {MODEL: dict(source.model), OPTIMIZER: {}}
        self.state_tensors: dict[str, Tensor] = {}
        self.optimizers: list[dict[str, Any]] = []
        self._owners: dict[str, str] = {}  # key of a state in the optimizer's file -> parameter
        found = [named(each, index, source.model) for index, each in enumerate(source.optimizers)]
        if (why := next((each for each in found if isinstance(each, str)), None)) is not None:
            source.left_out["optimizer"] = why
            return
        self.optimizers = [self._optimizer(index, each) for index, each in enumerate(found) if isinstance(each, dict)]

    def _optimizer(self, index: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """What a record has of one; its tensors go to their file."""
        states = {}
        for name, state in found["state"].items():
            tensors = {key: value for key, value in state.items() if isinstance(value, Stored)}
            for key, value in tensors.items():
                at = state_key(index, key, name)
                self.files[OPTIMIZER][at], self._owners[at] = value, name
            states[name] = {
                "keys": list(state), "plain": {key: value for key, value in state.items() if key not in tensors},
                "strides": {}, "complex": [key for key, value in tensors.items() if value.is_complex], "host": [],
            }  # fmt: skip
        at = f"optimizers/{index}"
        return {
            "class": "",  # a state dict does not say it
            "groups": encode_state(found["groups"], self.state_tensors, f"{at}/groups"),
            "state": encode_state(states, self.state_tensors, f"{at}/state"),
            "gradients": [],
        }

    def layouts(self) -> list[FileLayout]:
        """Where each tensor will lie. Raises SetupError for a name that no file can have."""
        return [lay_out(file, [TensorSpec(key, each.dtype, each.shape, 0) for key, each in tensors.items()], {"format": "pt"})
                for file, tensors in self.files.items()]  # fmt: skip

    def layers(self, layouts: list[FileLayout]) -> tuple[LayerRecord, ...]:
        """The layers by the modules that own the parameters. Which are trained only an optimizer's state says."""
        owned: dict[str, list[TensorRecord]] = {}
        for layout in layouts:
            for each in layout.tensors:
                key, spec = each.spec.key, each.spec
                owner = self._owners.get(key, key if layout.name == MODEL else "").rpartition(".")[0]
                owned.setdefault(owner, []).append(
                    TensorRecord(layout.name, key, each.begin, each.nbytes, spec.shape, spec.dtype)
                )
        out: list[LayerRecord] = []
        for name, tensors in owned.items():
            kind = "update" if any(each.file == OPTIMIZER for each in tensors) else "frozen"
            count = sum(_elements(each) for each in tensors if each.file == MODEL)
            nbytes = sum(each.nbytes for each in tensors)
            out.append(LayerRecord(len(out), name, kind, 0, time.time(), count, nbytes, tuple(tensors)))
        return tuple(out)


def _elements(tensor: TensorRecord) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def write(source: Source, path: str, directory: str, progress: Progress) -> tuple[str, Record]:
    """Make it the first checkpoint of ``directory``, and read it back. Raises SetupError if there are checkpoints already,
    NoSpace, StoreLocked, NotAStore, SaveFailed, and Corrupt if what was written does not verify."""
    contents = Contents(source)
    layouts = contents.layouts()
    if names.committed(directory):
        raise SetupError(f"{directory} has checkpoints already, and an import is the first of its store: name another directory")
    _check_space(directory, sum(layout.nbytes for layout in layouts))
    store = Store(directory)
    store.open()
    try:
        slot = store.acquire()
        try:
            with slot.reporting():
                sums: dict[str, int] = {}
                files = [write_laid_out(slot.held(), each, _data(each, contents, sums, progress)) for each in layouts]
                equal = _equal(slot.held(), layouts[0], sums)
            record = Record(
                step=0, iteration=0, updates=0, time=time.time(), files=tuple(files), layers=contents.layers(layouts), ties={},
                optimizers=contents.optimizers, state=_state(contents, path, equal),
            )  # fmt: skip
            done = store.commit(slot, record, contents.state_tensors)
        except BaseException:
            store.abandon(slot, bad=False)
            raise
    finally:
        store.close()
    reader = Reader(done)
    reader.verify(progress)
    return str(done), reader.record


def _state(contents: Contents, path: str, equal: dict[str, str]) -> dict[str, Any]:
    """The record's ``state``: none of the random generators, loaders and loops that an import does not have; what it says of
    itself."""
    source, tensors = contents.source, contents.state_tensors
    early = {"random": {}, "extra": {}, "buffers": {}, "modules": source.modules}
    about = {"source": path, "format": source.format, "time": time.time(), "step": source.step, "left_out": source.left_out}
    found = {"early": encode_state(early, tensors, "early"), "late": {}, IMPORTED: {**encode_state(about, {}), "equal": equal}}
    return found if source.config is None else {**found, CONFIG: source.config}


def _check_space(directory: str, nbytes: int) -> None:
    """Raises NoSpace if the disk is too full to begin."""
    there = directory
    while not os.path.exists(there):
        there = os.path.dirname(there)
    free, _ = space(there)
    if free < nbytes + SPARE:
        raise NoSpace(
            f"the import takes {nbytes + SPARE:,} bytes, and {there} has {free:,} left: free some, or name another disk"
        )


def _data(layout: FileLayout, contents: Contents, sums: dict[str, int], progress: Progress) -> Iterator[memoryview]:
    """The bytes of a file's tensors in its order. ``sums`` gets the checksum of each."""
    for placed in layout.tensors:
        key, crc, nbytes = placed.spec.key, 0, 0
        for piece in contents.files[layout.name][key].pieces():
            crc, nbytes = crc32c(piece, crc), nbytes + piece.nbytes
            yield piece
            progress(piece.nbytes)
        if nbytes != placed.nbytes:
            raise SetupError(f"{key!r} has {nbytes} bytes, not the {placed.nbytes} that its type and shape take")
        if layout.name == MODEL:
            sums[key] = crc


def _equal(folder: Folder, layout: FileLayout, sums: Mapping[str, int]) -> dict[str, str]:
    """Tensors of the model with the bits, type and shape of an earlier one. Formats write a tie under both of its names, and
    nothing else tells it from two tensors that a model has apart."""
    first: dict[Any, Any] = {}
    found = {}
    with opened(folder.at(layout.name), os.O_RDONLY) as fd:
        for placed in layout.tensors:
            spec = placed.spec
            other = first.setdefault((spec.dtype, spec.shape, sums[spec.key]), placed)
            if other is not placed and placed.nbytes and _same(fd, placed.begin, other.begin, placed.nbytes):
                found[spec.key] = other.spec.key
    return found


def _same(fd: int, a: int, b: int, nbytes: int) -> bool:
    """Are these bytes of a file the same?"""
    for at in range(0, nbytes, PIECE):
        n = min(PIECE, nbytes - at)
        if io.pread(fd, n, a + at) != io.pread(fd, n, b + at):
            return False
    return True
