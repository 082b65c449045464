"""``import_checkpoint``: a store that begins with what somebody else has saved.

source.py       what an import begins with, whatever it comes from
formats.py      torch.save, safetensors, folders of Hugging Face, torch.distributed.checkpoint
state_dicts.py  which part of a state dict is the model, and whose state an optimizer's is
writing.py      the first checkpoint, by the store's own way to a commit
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fxckpt.errors import SetupError
from fxckpt.importing.formats import read
from fxckpt.importing.source import FLOATS, cast
from fxckpt.importing.writing import write
from fxckpt.store.directory import local_path


@dataclass(frozen=True)
class Imported:
    """What ``import_checkpoint`` did.

    Attributes:
        path: the checkpoint, the first of its store.
        source: the absolute path of what was imported.
        format: ``"torch.save"``, ``"safetensors"``, ``"Hugging Face"`` or ``"DCP"``.
        tensors: of the model.
        nbytes: of the checkpoint's files.
        optimizers: whose state was taken.
        left_out: what was not taken, by its name there, and why.
    """

    path: Path
    source: Path
    format: str
    tensors: int
    nbytes: int
    optimizers: int
    left_out: Mapping[str, str] = field(default_factory=dict)


def import_checkpoint(
    source: str | os.PathLike[str],
    dir: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Imported:
    """Make what another program saved the first checkpoint of a new store, of step 0. No code in it is run.

    Its names must be those of the model's state dict; what ``torch.compile`` and ``DistributedDataParallel`` put in front of them
    is taken off. ``fxckpt.load`` then puts it into a run, with the optimizer's state if that was there too, or into a model.

    Args:
        source: a file of ``torch.save`` (a state dict, or a dict with one under ``"model"`` or ``"state_dict"``, and perhaps
            ``"optimizer"``), a safetensors file, a folder of Hugging Face, or a directory of ``torch.distributed.checkpoint``.
        dir: the store to begin: a directory without checkpoints, or none yet.
        dtype: make the model's floating point numbers of this type: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"``.
            None: as they are, and ``fxckpt.load`` wants a model of just these types.
        progress: called with numbers of bytes, as they are written and as they are read back.

    Returns:
        ``Imported``; its ``left_out`` names what was not taken.

    Raises:
        SetupError: it is none of these, holds objects that only unpickling can make, or ``dir`` has checkpoints.
        Corrupt: it is damaged, or what was written does not verify.
        NoSpace: the disk has no room for it. StoreLocked, NotAStore: as for ``compile_step``. SaveFailed: a write failed.
    """
    path, directory = os.path.abspath(local_path(source)), os.path.abspath(local_path(dir))
    if dtype is not None and dtype not in FLOATS.values():
        raise SetupError(f"dtype={dtype!r}: expected one of {', '.join(FLOATS.values())}")
    found = read(path)
    if dtype is not None:
        found.model = {name: cast(each, getattr(importlib.import_module("torch"), dtype)) for name, each in found.model.items()}

    def advance(nbytes: int) -> None:
        if progress is not None:
            progress(nbytes)

    done, record = write(found, path, directory, advance)
    optimizers = len(record.optimizers)
    return Imported(Path(done), Path(path), found.format, len(found.model), record.nbytes, optimizers, dict(found.left_out))
