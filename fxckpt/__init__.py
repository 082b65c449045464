"""Checkpoint PyTorch training layer by layer, while it trains.

    model = torch.compile(model, backend=fxckpt.backend)
    opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters()), "checkpoints/", model=model)
    start = fxckpt.load().step

Importing this package is cheap: neither torch nor the C engine is loaded, and no thread is started, before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxckpt.errors import (
    Cancelled,
    Corrupt,
    EngineMissing,
    FxckptError,
    LayoutMismatch,
    NoCheckpoint,
    NoSpace,
    NotAStore,
    SaveFailed,
    SetupError,
    StateError,
    StoreError,
    StoreLocked,
    StoreNotLoaded,
)
from fxckpt.torch_backend import backend

if TYPE_CHECKING:
    from fxckpt.compiled_optimizer import compile_step
    from fxckpt.loading.load import Restored, load
    from fxckpt.loop import steps
    from fxckpt.store.reader import checkpoints, latest

__version__ = "0.1.0"

_HOME = {
    "compile_step": "fxckpt.compiled_optimizer", "load": "fxckpt.loading.load", "Restored": "fxckpt.loading.load",
    "steps": "fxckpt.loop", "checkpoints": "fxckpt.store.reader", "latest": "fxckpt.store.reader",
}  # fmt: skip

__all__ = [
    "Cancelled", "Corrupt", "EngineMissing", "FxckptError", "LayoutMismatch", "NoCheckpoint", "NoSpace", "NotAStore",
    "Restored", "SaveFailed", "SetupError", "StateError", "StoreError", "StoreLocked", "StoreNotLoaded", "backend", "checkpoints",
    "compile_step", "latest", "load", "steps",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the public functions at first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value
