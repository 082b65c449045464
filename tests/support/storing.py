"""A trainer reduced to what the store sees of it, and questions about a store's directory."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from repository import SUPPORT

from fxckpt.engine import Engine, Sources, io
from fxckpt.monitor import launch
from fxckpt.monitor.client import MonitorStore
from fxckpt.monitor.link import RemoteSlot
from fxckpt.store.layout import TensorSpec, lay_out
from fxckpt.store.lock import wait_for_monitor
from fxckpt.store.reader import Reader, candidates, latest
from fxckpt.store.record import FileRecord, LayerRecord, Record, TensorRecord
from fxckpt.store.slot import Slot
from fxckpt.store.slots import Store

CHUNK = 4096  # so that each file has several
RING = 16  # chunks of a monitor's shared memory
FILES = ("model.safetensors", "optimizer.safetensors")


def a_record(step: int, files: tuple[FileRecord, ...] = (), layers: tuple[LayerRecord, ...] = (), **fields: object) -> Record:
    """What a run says of a checkpoint of this step."""
    given = {"ties": {}, "optimizers": None, "state": None, **fields}
    return Record(step=step, iteration=step, updates=step, time=float(step), files=files, layers=layers, **given)


class Trainer:
    """A training run reduced to its checkpoints: two layers whose tensors all hold the step's number."""

    def __init__(self, store: Store, engine: Engine, acks: Path | None = None, items: int = 2000):
        self.store, self.engine, self.acks = store, engine, acks
        self.tensors = {key: np.zeros(items, np.float32) for key in ("a.weight", "b.weight")}
        self.moments = {f"exp_avg/{key}": np.zeros(items, np.float32) for key in self.tensors}
        self.layouts = [
            lay_out(file, [TensorSpec(key, "F32", (items,), layer) for layer, key in enumerate(tensors)])
            for file, tensors in zip(FILES, (self.tensors, self.moments))
        ]
        self.plan = self.engine.plan(
            [(layout.nbytes, layout.header) for layout in self.layouts],
            [
                (placed.spec.layer, file, placed.begin, placed.nbytes, 4)
                for file, layout in enumerate(self.layouts)
                for placed in layout.tensors
            ],
            2,
        )

    def begin(self, step: int, name: str | None = None, journal: bool = False) -> tuple[Slot, object]:
        """Acquire a slot, for a record of the ``journal`` perhaps, and hand everything over to the engine."""
        for array in (*self.tensors.values(), *self.moments.values()):
            array[:] = step
        slot = self.store.acquire(name, journal) if journal else self.store.acquire(name)
        try:
            checkpoint = self.engine.begin(self.plan, slot.path, FILES)
            self._begun(slot, checkpoint)
            for layer, key in enumerate(self.tensors):
                arrays = self.tensors[key], self.moments[f"exp_avg/{key}"]
                checkpoint.emit(layer, Sources([(array.ctypes.data, None, None) for array in arrays]))
            assert self.engine.fence(-1, 10)
        except BaseException:
            self.store.abandon(slot, bad=False)
            raise
        return slot, checkpoint

    def _begun(self, slot: Slot, checkpoint: object) -> None:
        """The engine has the slot's files open."""

    def finish(self, step: int, slot: Slot, checkpoint: object, **fields: object) -> Path:
        """Wait for the engine, commit (with further ``fields``), and acknowledge."""
        name = slot.name
        try:
            assert checkpoint.durable(10)
            generation, path = self._commit(slot, self.record(step, checkpoint, **fields), self.state(step))
        except BaseException:
            checkpoint.cancel()
            assert checkpoint.settled(10)
            self.store.abandon(slot, bad=False)
            raise
        finally:
            checkpoint.release()
        if self.acks is not None:
            self.acknowledge(generation, name)
        return path

    def record(self, step: int, checkpoint: object, **fields: object) -> Record:
        """What a commit is to say of it, with further ``fields``."""
        files = tuple(
            FileRecord(layout.name, layout.nbytes, CHUNK, tuple(checkpoint.crcs(file)))
            for file, layout in enumerate(self.layouts)
        )
        return a_record(step, files, tuple(self._layers(step)), optimizers=[{"lr": 0.1}], state={"step": step}, **fields)

    def state(self, step: int) -> dict[str, np.ndarray]:
        """The tensors of its extra state."""
        return {"rng": np.full(700, step)}

    def _commit(self, slot: Slot, record: Record, tensors: dict[str, np.ndarray]) -> tuple[int, Path]:
        """The generation that it has from now on, and where it is."""
        generation = slot.generation
        return generation, self.store.commit(slot, record, tensors)

    def acknowledge(self, generation: int, name: str | None = None) -> None:
        """Put it in the log that this checkpoint was promised to somebody."""
        io.mkdir(self.acks / (f"{generation}-{name}" if name else f"{generation}"))

    def save(self, step: int, name: str | None = None, **metrics: float) -> Path:
        """One checkpoint from beginning to end."""
        return self.finish(step, *self.begin(step, name), **({"metrics": metrics} if metrics else {}))

    def _layers(self, step: int) -> list[LayerRecord]:
        """The record of both layers."""
        found = []
        for layer, key in enumerate(self.tensors):
            tensors = tuple(
                TensorRecord(layout.name, placed.spec.key, placed.begin, placed.nbytes, placed.spec.shape, "F32")
                for layout in self.layouts
                for placed in layout.tensors
                if placed.spec.layer == layer
            )
            count = self.tensors[key].size
            found.append(LayerRecord(layer, key[0], "update", step, float(step), count, 8 * count, tensors))
        return found

    def close(self) -> None:
        """End this run in good order."""
        self.engine.close()
        self.store.close()


class MonitoredTrainer(Trainer):
    """The same, with a monitor that writes and commits."""

    def _begun(self, slot: RemoteSlot, checkpoint: object) -> None:
        self.store.begin(slot, checkpoint.id, self.layouts)

    def _commit(self, slot: RemoteSlot, record: Record, tensors: dict[str, np.ndarray]) -> tuple[int, Path]:
        self.store.commit(slot, record, tensors)
        assert slot.ended(10)
        return slot.generation, Path(slot.path)


def start(
    root: Path, acks: Path | None = None, *, load: bool = True, items: int = 2000, writer: str = "thread", **options: object
) -> Trainer:
    """A new run: open the store and continue its newest checkpoint that verifies, if it has one."""
    monitored = writer == "monitor"
    engine = Engine(threads=2, chunk_bytes=CHUNK, staging_bytes=(RING if monitored else 4) * CHUNK, mock=monitored)
    store = MonitorStore(root, engine, threads=2, **options) if monitored else Store(root, **options)
    wait_for_monitor(store.open)
    if load:
        newest = latest(root)
        store.mark_loaded(newest and newest.generation)
    trainer = (MonitoredTrainer if monitored else Trainer)(store, engine, acks, items)
    if load and newest and acks is not None:  # what was loaded is as good as promised
        name = f"{newest.generation}-{newest.name}" if newest.name else f"{newest.generation}"
        io.mkdir(acks / f"{name}~again-{time.monotonic_ns()}")
    return trainer


@contextmanager
def fast_directory(fallback: Path) -> Iterator[Path]:
    """A directory in memory if there is such a file system, for tests of many thousand syncs."""
    if not os.access("/dev/shm", os.W_OK):
        yield fallback
        return
    path = Path(tempfile.mkdtemp(prefix="fxckpt-test-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def recorded_monitors(log: Path) -> Iterator[None]:
    """Monitors that are started meanwhile append their calls to this log."""
    before, script = launch.PROGRAM, SUPPORT / "recorded_monitor.py"
    launch.PROGRAM = (str(script), str(log))
    try:
        yield
    finally:
        launch.PROGRAM = before


def names(root: Path) -> list[str]:
    """The directories of a store, ``named`` apart."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "named")


def inodes(root: Path) -> set[int]:
    """The files that hold the models, whatever their directories are called now."""
    return {path.stat().st_ino for path in root.glob("*/model.safetensors")}


def all_verify(root: Path) -> list[int]:
    """Verify every checkpoint; returns their generations, newest first."""
    found = candidates(root)
    for each in found:
        Reader(each.path).verify()
    return [each.record.generation for each in found]


def overlay(monkeypatch, root: Path) -> None:
    """From now on the directories that are in ``root`` behave as those of a lower layer of an overlay do: rename(2) refuses."""
    lower, rename = {path.stat().st_ino for path in root.iterdir() if path.is_dir()}, io.rename

    def refuse(old, new, *below):
        if os.stat(old).st_ino in lower:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), os.fspath(old))
        rename(old, new, *below)

    monkeypatch.setattr(io, "rename", refuse)
