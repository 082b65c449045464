"""Two ranks reduced to what their store sees of them, in one thread: each writes a layer of every checkpoint."""

from __future__ import annotations

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
from fxckpt.store.record import FileRecord, LayerRecord, TensorRecord

WORLD = 2


class Rank:
    """One of them, with a tensor and its moment that hold the step's number."""

    def __init__(self, store, rank: int, items: int):
        self.store, self.rank = store, rank
        self.engine = Engine(threads=2, chunk_bytes=CHUNK, staging_bytes=4 * CHUNK)
        self.arrays = [np.zeros(items, np.float32), np.zeros(items, np.float32)]
        keys = f"layer{rank}.weight", f"exp_avg/layer{rank}.weight"
        self.layouts = [
            lay_out(names.of_rank(file, rank, WORLD), [TensorSpec(key, "F32", (items,), 0)])
            for file, key in zip((names.MODEL, names.OPTIMIZER), keys)
        ]
        placed = [(0, file, p.begin, p.nbytes, 4) for file, layout in enumerate(self.layouts) for p in layout.tensors]
        self.plan = self.engine.plan([(layout.nbytes, layout.header) for layout in self.layouts], placed, 1)

    def begin(self, step: int, name: str | None = None):
        """Its slot and the engine's side of it, with everything handed over."""
        for array in self.arrays:
            array[:] = step
        slot = self.store.acquire(name)
        copy = self.engine.begin(self.plan, slot.path, [layout.name for layout in self.layouts], below=slot.below)
        self.store.begin(slot, copy.id, self.layouts, step)
        copy.emit(0, Sources([(array.ctypes.data, None, None) for array in self.arrays]))
        return slot, copy

    def record(self, step: int, copy):
        """What this rank says of it."""
        files = tuple(FileRecord(each.name, each.nbytes, CHUNK, tuple(copy.crcs(i))) for i, each in enumerate(self.layouts))
        tensors = tuple(
            TensorRecord(each.name, p.spec.key, p.begin, p.nbytes, p.spec.shape, "F32")
            for each in self.layouts
            for p in each.tensors
        )
        layer = LayerRecord(0, f"layer{self.rank}", "update", step, float(step), 1, sum(t.nbytes for t in tensors), tensors)
        return a_record(step, files, (layer,), optimizers=[], state={"step": step, ALIKE: "both"})

    def commit(self, step: int, slot, copy) -> None:
        """Its side of the commit."""
        assert copy.durable(10)
        slot.opened(dict(zip([layout.name for layout in self.layouts], copy.inodes())))
        self.store.commit(slot, self.record(step, copy), {"rng": np.full(700, step + self.rank)})


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

    def save(self, step: int, name: str | None = None) -> Path:
        """One checkpoint, acknowledged when both ranks know of it."""
        first, other = self.ranks
        mine, its = first.begin(step, name), other.begin(step, name)
        other.commit(step, *its)
        assert not first.store.missing(mine[0], 10)
        generation = mine[0].generation
        first.commit(step, *mine)
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
