"""A step of the journal as a checkpoint of its own: made again on new tensors, and written where it is asked for."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fxckpt.engine.plan import Item
from fxckpt.errors import Corrupt
from fxckpt.loading import made_again
from fxckpt.loading.parts_again import make_in_parts
from fxckpt.loading.schema import Saved, check_encoded, decode
from fxckpt.saving.inventory import TORCH_DTYPES, storable
from fxckpt.saving.plan import source_items
from fxckpt.store import names
from fxckpt.store.files import replace_file, write_laid_out
from fxckpt.store.folder import Folder
from fxckpt.store.journaled import Broken, Journaled
from fxckpt.store.layout import FileLayout, Placed, TensorSpec, lay_out
from fxckpt.store.reader import Reader
from fxckpt.store.record import FileRecord, LayerRecord, Record, TensorRecord

Place = tuple[str, str]


def make_again(found: Journaled) -> tuple[Reader, list[Reader], Saved, dict[Place, torch.Tensor]]:
    """Its base and records, read and verified, and the tensors of its step by file and key. Raises Corrupt, also where a step
    made again is not what training had."""
    base = Reader(found.base.path)
    path = str(base.path / names.COMMIT)
    try:
        journal = made_again.open_journal(found)
        check_encoded(base.record, path)
        saved = decode(base.record, base.state_tensors(), path)
        tensors = made_again.new_tensors(base.record, saved.optimizers, {})
        tensors = {t.place: _empty(t) for t in base.record.tensors() if t.place not in tensors} | tensors
        _read(base, tensors)
        if base.record.is_sharded:
            make_in_parts(found, tensors)
        else:
            made_again.make(base, journal, saved, tensors)
        return base, journal, made_again.decoded(journal, base.record), tensors
    except Broken as error:
        raise error.error from error


def _empty(place: TensorRecord) -> torch.Tensor:
    return torch.empty(place.shape, dtype=TORCH_DTYPES[place.dtype])


def _read(reader: Reader, tensors: dict[Place, torch.Tensor]) -> None:
    """Read these tensors, verifying all files."""
    reader.read_into(dict(zip(tensors, _items(list(tensors.values())))))


def _items(tensors: Sequence[torch.Tensor]) -> list[Item]:
    return source_items([storable(tensor) for tensor in tensors])


def write_whole(found: Journaled, parent: str) -> str:
    """Make its step again, and write it below ``parent`` as the directory of a checkpoint, which is returned. Raises Corrupt,
    OSError."""
    base, journal, _, tensors = make_again(found)
    last = journal[-1]
    own = {t.place: t for t in last.record.tensors() if t.place[0] != names.GRADIENTS}
    later = {place: _empty(t) for place, t in own.items() if place[0] == names.MODEL}
    _read(last, later)
    tensors |= later
    path = os.path.join(parent, names.step_name(last.record.step))
    os.mkdir(path)
    folder = Folder.open(path)
    try:
        layouts = [_laid_out(file, base.record, own) for file in (names.MODEL, names.OPTIMIZER)]
        files = [_write(folder, layout, tensors) for layout in layouts]
        for file in last.record.files:
            if file.name == last.record.state_file:
                shutil.copyfile(last.path / file.name, Path(path) / names.STATE)
                files.append(dataclasses.replace(file, name=names.STATE))
        replace_file(folder, names.COMMIT, _record(base.record, last.record, layouts, files).to_bytes(), durable=False)
    finally:
        folder.close()
    return path


def _laid_out(file: str, base: Record, own: dict[Place, TensorRecord]) -> FileLayout:
    """A file of the checkpoint, with the tensors that the last record has in another shape in theirs, and those that are new."""
    before = {t.key: t for t in sorted(base.tensors(file), key=lambda t: t.begin)}
    after = {key: t for (name, key), t in own.items() if name == file}
    return lay_out(file, [TensorSpec(t.key, t.dtype, t.shape, 0) for t in {**before, **after}.values()], {"format": "pt"})


def _write(folder: Folder, layout: FileLayout, tensors: dict[Place, torch.Tensor]) -> FileRecord:
    data = (storable(tensors[layout.name, placed.spec.key]).contiguous() for placed in layout.tensors)
    return write_laid_out(folder, layout, (t.view(-1).view(torch.uint8).numpy().data for t in data))


def _record(base: Record, last: Record, layouts: Sequence[FileLayout], files: Sequence[FileRecord]) -> Record:
    """The last record, with the layers of its base, as they lie now: of one process, whoever wrote them."""
    placed = {(layout.name, p.spec.key): p for layout in layouts for p in layout.tensors}
    layers = [_layer(layer, last, placed) for layer in _with_new(base, last)]
    return dataclasses.replace(last, files=tuple(files), layers=tuple(layers), journal=None, parts=None, ranks=())


def _with_new(base: Record, last: Record) -> list[LayerRecord]:
    """The base's layers; of the buffers those of the last record, where it has any."""
    buffers = [layer for layer in last.layers if layer.kind == "buffers"]
    moved = {t.place for layer in buffers for t in layer.tensors}
    kept = [layer for layer in base.layers if layer.kind != "buffers" or not buffers]
    kept = [dataclasses.replace(e, tensors=tuple(t for t in e.tensors if t.place not in moved)) for e in kept]
    return [dataclasses.replace(layer, id=i) for i, layer in enumerate([*kept, *buffers])]


def _layer(layer: LayerRecord, last: Record, placed: Mapping[Place, Placed]) -> LayerRecord:
    """A layer where it lies now."""
    tensors = []
    for each in layer.tensors:
        p = placed[each.place]
        tensors.append(TensorRecord(*each.place, p.begin, p.nbytes, tuple(p.spec.shape), p.spec.dtype))
    nbytes = sum(t.nbytes for t in tensors)
    return dataclasses.replace(layer, step=last.step, time=last.time, nbytes=nbytes, tensors=tuple(tensors))


def check_again(found: Journaled) -> None:
    """Make its step again, for its digests only. Raises Corrupt."""
    make_again(found)


def journaled_step(found: Sequence[Journaled], path: str) -> Journaled:
    """The row up to the record in this directory. Raises Corrupt if none leads to it."""
    for row in found:
        for each in row.steps():
            if str(each.path) == path:
                return each
    raise Corrupt(os.path.join(path, names.COMMIT), "what it builds on is missing")
