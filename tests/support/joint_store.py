"""Two ranks reduced to what their store sees of them, in one thread: each writes a layer of every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist
from storing import CHUNK, a_record

from fxckpt.engine import Engine, Sources, io
from fxckpt.ranks import FirstStore, OtherStore, Rendezvous
from fxckpt.store import names
from fxckpt.store.about import ALIKE
from fxckpt.store.layout import TensorSpec, lay_out
from fxckpt.store.reader import latest
from fxckpt.store.record import GRADIENTS, FileRecord, Journal, LayerRecord, TensorRecord

WORLD = 2


class Files:
    """What a rank writes of a checkpoint, or of a record of the journal: (kind of file, key) each, one tensor in each file."""

    def __init__(self, engine: Engine, rank: int, items: int, kind: str, tensors: Sequence[tuple[str, str]]):
        self.kind = kind  # of its layer
        self.arrays = [np.zeros(items, np.float32) for _ in tensors]
        self.layouts = [lay_out(names.of_rank(file, rank, WORLD), [TensorSpec(key, "F32", (items,), 0)]) for file, key in tensors]
        placed = [(0, file, p.begin, p.nbytes, 4) for file, layout in enumerate(self.layouts) for p in layout.tensors]
        self.plan = engine.plan([(layout.nbytes, layout.header) for layout in self.layouts], placed, 1)


class Rank:
    """One of them, with a tensor and its moment, or a gradient, that hold the step's number."""

    def __init__(self, store, rank: int, items: int):
        self.store, self.rank = store, rank
        self.engine = Engine(threads=2, chunk_bytes=CHUNK, staging_bytes=4 * CHUNK)
        name = f"layer{rank}.weight"
        both = (names.MODEL, name), (names.OPTIMIZER, f"exp_avg/{name}")
        self._full = Files(self.engine, rank, items, "update", both)
        self._record = Files(self.engine, rank, items, GRADIENTS, [(names.GRADIENTS, f"gradient/{name}")])

    def _files(self, journal: Journal | None) -> Files:
        return self._full if journal is None else self._record

    def begin(self, step: int, name: str | None = None, journal: Journal | None = None):
        """Its slot and the engine's side of it, with everything handed over."""
        files = self._files(journal)
        for array in files.arrays:
            array[:] = step
        slot = self.store.acquire(name, journal is not None)
        copy = self.engine.begin(files.plan, slot.path, [layout.name for layout in files.layouts], below=slot.below)
        self.store.begin(slot, copy.id, files.layouts, step)
        copy.emit(0, Sources([(array.ctypes.data, None, None) for array in files.arrays]))
        return slot, copy

    def record(self, step: int, copy, journal: Journal | None):
        """What this rank says of it."""
        written = self._files(journal)
        files = tuple(FileRecord(each.name, each.nbytes, CHUNK, tuple(copy.crcs(i))) for i, each in enumerate(written.layouts))
        tensors = tuple(
            TensorRecord(each.name, p.spec.key, p.begin, p.nbytes, p.spec.shape, "F32")
            for each in written.layouts
            for p in each.tensors
        )
        nbytes = sum(t.nbytes for t in tensors)
        layer = LayerRecord(0, f"layer{self.rank}", written.kind, step, float(step), 1, nbytes, tensors)
        return a_record(step, files, (layer,), optimizers=[], state={"step": step, ALIKE: "both"}, journal=journal)

    def commit(self, step: int, slot, copy, journal: Journal | None) -> None:
        """Its side of the commit."""
        assert copy.durable(10)
        slot.opened(dict(zip([layout.name for layout in self._files(journal).layouts], copy.inodes())))
        self.store.commit(slot, self.record(step, copy, journal), {"rng": np.full(700, step + self.rank)})


class JointTrainer:
    """Both, and the log of what was promised."""

    def __init__(self, root: Path, acks: Path | None, messages: dist.Store, life: int, items: int, **options: object):
        self.acks, sides = acks, [Rendezvous(messages, rank, WORLD, f"life{life}") for rank in range(WORLD)]
        first = FirstStore(root, sides[0], **options)
        first.open()
        other = OtherStore(str(root), sides[1], max_async=2, fresh=False, found=0)
        other.open()
        self.ranks = [Rank(first, 0, items), Rank(other, 1, items)]
        newest = latest(root)
        for rank in self.ranks:
            rank.store.mark_loaded(newest and newest.generation)

    def save(self, step: int, name: str | None = None, journal: Journal | None = None) -> Path:
        """One checkpoint, or a record of the ``journal``, acknowledged when both ranks know of it."""
        first, other = self.ranks
        mine, its = first.begin(step, name, journal), other.begin(step, name, journal)
        other.commit(step, *its, journal)
        assert not first.store.missing(mine[0], 10)
        generation = mine[0].generation
        first.commit(step, *mine, journal)
        assert its[0].ended(10) and its[0].generation == generation
        for _, copy in (mine, its):
            copy.release()
        if self.acks is not None:
            io.mkdir(self.acks / (f"{generation}-{name}" if name else f"{generation}"))
        return Path(its[0].path)

    def close(self) -> None:
        for rank in reversed(self.ranks):
            rank.engine.close()
            rank.store.close()
