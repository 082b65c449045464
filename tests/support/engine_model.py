"""What the engine's tests share: engines that are closed, and a model whose files can be foretold."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import instruments
import numpy as np

from fxckpt.engine import Engine, Plan, Sources, crc32c

PATIENCE = 30.0
KB = 1024


@contextlib.contextmanager
def engines() -> Iterator[Callable[..., Engine]]:
    """Makes engines with small chunks; at the end the disk is calm and they are closed."""
    made = []

    def make(**options) -> Engine:
        made.append(Engine(**({"chunk_bytes": 8 * KB, "staging_bytes": 32 * KB} | options)))
        return made[-1]

    try:
        yield make
    finally:
        instruments.calm()
        for engine in made:
            engine.close(PATIENCE)


@dataclass
class Model:
    """Layers of arrays placed in files, after a header, and what the files must hold."""

    layers: list[list[np.ndarray]]
    files: list[tuple[int, bytes]] = field(default_factory=list)
    tensors: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def place(self, n_files: int = 1, header: bytes = b"{header}", gap: int = 0) -> Model:
        """Arrays go round the files in layer order; ``gap`` bytes that nobody covers follow each."""
        ends = [len(header)] * n_files
        turn = itertools.cycle(range(n_files))
        for layer, arrays in enumerate(self.layers):
            for array, file in zip(arrays, turn):
                self.tensors.append((layer, file, ends[file], array.nbytes, array.itemsize))
                ends[file] += array.nbytes + gap
        self.files = [(-(-end // 4096) * 4096, header) for end in ends]
        return self

    @property
    def names(self) -> list[str]:
        return [f"file-{i}" for i in range(len(self.files))]

    def sources(self, layer: int) -> Sources:
        return Sources(
            [
                (array.ctypes.data, None, None) if array.flags.c_contiguous else (array.ctypes.data, array.shape, array.strides)
                for array in self.layers[layer]
            ]
        )

    def plan(self, engine: Engine, sum_bytes: int | None = None):
        return engine.plan(self.files, self.tensors, len(self.layers), sum_bytes)

    def contents(self) -> list[bytes]:
        """The files' bytes as they must be for the arrays as they are now."""
        files = [bytearray(header.ljust(nbytes, b"\0")) for nbytes, header in self.files]
        arrays = iter([array for arrays in self.layers for array in arrays])
        for (_, file, offset, nbytes, _), array in zip(self.tensors, arrays):
            files[file][offset : offset + nbytes] = array.tobytes()
        return [bytes(file) for file in files]

    def update(self, layer: int, step: int) -> None:
        """What an optimizer does to a layer, in place."""
        for index, array in enumerate(self.layers[layer]):
            array[...] = np.arange(array.size).reshape(array.shape) * (step + 1) + layer + index


def make_model(layers: int = 6, items: int = 3000, dtype: str = "float32", **place) -> Model:
    """Each layer has three arrays, one of them transposed in memory; sizes differ by layer."""
    shapes = [[(items + 17 * n,), (7, items // 20 + n), (1,)] for n in range(layers)]
    zeros = [[np.zeros(a, dtype), np.zeros(b[::-1], dtype).T, np.zeros(c, dtype)] for a, b, c in shapes]
    model = Model(zeros)
    for layer in range(layers):
        model.update(layer, 0)
    return model.place(**place)


def begin_all(engine: Engine, model: Model, directory: Path, plan: Plan | None = None, **options):
    """A checkpoint with every layer emitted."""
    directory.mkdir(exist_ok=True)
    checkpoint = engine.begin(plan or model.plan(engine), str(directory), model.names, **options)
    for layer in range(len(model.layers)):
        checkpoint.emit(layer, model.sources(layer))
    return checkpoint


def read_all(model: Model, directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in model.names]


def parts(data: bytes, nbytes: int) -> list[bytes]:
    return [data[at : at + nbytes] for at in range(0, len(data), nbytes)]


def crcs_of(data: bytes, chunk: int) -> list[int]:
    return [crc32c(part) for part in parts(data, chunk)]


def fence(engine: Engine, layer: int) -> None:
    assert engine.fence(layer, PATIENCE), f"the fence of layer {layer} hangs"


def wait_for(condition, timeout: float = PATIENCE) -> None:
    """Until something that happens in another thread has happened."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)
