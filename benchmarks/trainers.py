"""The rows of the tables of models.py, and the processes that train: as they are told, or on from what another one left."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import savers
from turns import Turns
from workloads import make

LIMIT = 300.0  # seconds for one round, one restore


@dataclass(frozen=True)
class Way:
    """A row of the tables. ``versions``: the package that saves. ``synced``: on the disk when it counts as saved."""

    label: str
    package: str
    saver: Callable[[], savers.Nothing] | None  # none: a framework, which trains by itself
    waits: bool = False
    synced: bool = True


WAYS = {
    "fxckpt": Way("fxckpt", "fxckpt", savers.Fxckpt),
    "torch_save": Way("torch.save + fsync", "torch", savers.TorchSave, waits=True),
    "safetensors": Way("safetensors + fsync", "safetensors", savers.Safetensors, waits=True),
    "dcp": Way("torch DCP async_save", "torch", savers.DCP),
    "torch_checkpointing": Way("torch_checkpointing async + fsync", "torch_checkpointing", savers.TorchCheckpointing),
    "trainer": Way("Hugging Face Trainer's own", "transformers", None, synced=False),
    "lightning": Way("Lightning's ModelCheckpoint", "lightning", None, synced=False),
}
NONE = Way("no checkpoints", "torch", savers.Nothing)


def trained(model: str, way: str, folder: Path, args: Namespace) -> Any:
    """A way to train with all it needs."""
    import torch
    import ways

    log = os.open(folder.parent / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)  # what a Trainer says at its beginning and at its end is nobody's business, unless it fails
    os.dup2(log, 2)
    torch.set_num_threads(args.threads)
    what = make(model, args.quick)
    if way in ("trainer", "lightning"):
        return {"trainer": ways.HuggingFace, "lightning": ways.Lightning}[way](*what, folder)
    maker = (WAYS.get(way) or NONE).saver
    assert maker is not None
    return ways.Loop(maker(), *what, folder)


def live(model: str, way: str, folder: Path, args: Namespace, pipe: Connection) -> None:
    """A process that trains as it is told."""
    what = trained(model, way, folder, args)
    what.train(Turns(what.saver, folder, pipe))


def restore(model: str, way: str, folder: Path, args: Namespace, pipe: Connection) -> None:
    """A process that goes on from what another one left."""
    pipe.send(asdict(trained(model, way, folder, args).restore()))


def count(model: str, args: Namespace, pipe: Connection) -> None:
    """Parameters, and bytes of a model with its AdamW."""
    from torch.optim import AdamW

    built, _ = make(model, args.quick)
    saver = savers.Nothing().of(built, AdamW(built.parameters(), fused=True))
    saver.make_moments()
    pipe.send((sum(p.numel() for p in built.parameters()), sum(t.nbytes for t in saver.tensors().values())))
