"""Checkpoint PyTorch training layer by layer, while it trains.

    model = torch.compile(model, backend=fxckpt.backend)
    opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters()), "checkpoints/", model=model)
    start = fxckpt.load().step

Importing this package is cheap: neither torch nor the C engine is loaded, and no thread is started, before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fxckpt.errors import (
    Cancelled,
    Corrupt,
    Diverged,
    EngineMissing,
    FxckptError,
    LayoutMismatch,
    NoCheckpoint,
    NoSpace,
    NotAStore,
    RanksDisagree,
    SaveFailed,
    SetupError,
    StateError,
    StoreError,
    StoreLocked,
    StoreNotLoaded,
)
from fxckpt.torch_backend import backend

if TYPE_CHECKING:
    from fxckpt.checkpointed import Checkpointed
    from fxckpt.compiled_optimizer import compile_step
    from fxckpt.handle import Handle, Statistics
    from fxckpt.importing import Imported, import_checkpoint
    from fxckpt.loading.load import Restored, load
    from fxckpt.loop import batches, epochs, steps
    from fxckpt.saving.listeners import Committed, Failed
    from fxckpt.store.journaled import durable_steps
    from fxckpt.store.reader import checkpoints, latest

__version__ = "0.1.0"

_HOME = {
    "Checkpointed": "fxckpt.checkpointed", "Committed": "fxckpt.saving.listeners", "Failed": "fxckpt.saving.listeners",
    "Handle": "fxckpt.handle", "Imported": "fxckpt.importing", "Restored": "fxckpt.loading.load",
    "Statistics": "fxckpt.handle", "batches": "fxckpt.loop", "checkpoints": "fxckpt.store.reader",
    "compile_step": "fxckpt.compiled_optimizer", "durable_steps": "fxckpt.store.journaled", "epochs": "fxckpt.loop",
    "import_checkpoint": "fxckpt.importing",
    "latest": "fxckpt.store.reader", "load": "fxckpt.loading.load", "steps": "fxckpt.loop",
}  # fmt: skip
"""Where the names are that need torch or the engine: imported at first use."""

_MODULES = ("hf", "lightning")
"""Each needs a package that ``pip install fxckpt[hf]`` or ``fxckpt[lightning]`` brings."""

__all__ = [
    "Cancelled", "Checkpointed", "Committed", "Corrupt", "Diverged", "EngineMissing", "Failed", "FxckptError", "Handle",
    "Imported", "LayoutMismatch", "NoCheckpoint", "NoSpace", "NotAStore", "RanksDisagree",
    "Restored", "SaveFailed", "SetupError", "StateError", "Statistics",
    "StoreError", "StoreLocked", "StoreNotLoaded", "backend", "batches", "checkpoints", "compile_step", "durable_steps",
    "epochs", "import_checkpoint", "latest", "load", "steps",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name at first use; so are the modules for packages that are not always there."""
    if name in _MODULES:
        return importlib.import_module(f"fxckpt.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not, for ``dir(fxckpt)`` and completion."""
    return [*__all__, "__version__"]
