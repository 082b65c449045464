"""What feeds training, resumed in the middle of a pass with the bits of the uninterrupted run. It knows no runs and no stores."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from fxckpt.compat.fabric import is_set_up, loader_in
from fxckpt.compat.loaders import holds_workers, iterates_as_torch
from fxckpt.data.accelerated import AcceleratedSource
from fxckpt.data.fabric import FabricSource
from fxckpt.data.loader import LoaderSource
from fxckpt.data.other import IterableSource
from fxckpt.data.source import Source
from fxckpt.data.with_workers import WorkersSource
from fxckpt.errors import SetupError

__all__ = ["Source", "source_of"]


def source_of(loader: Any) -> Source:
    """The source for a loader, of which one is made for each loader and kept over all its passes.

    Raises:
        SetupError: it cannot be resumed exactly, or is not iterable at all.
    """
    if not (hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")):
        raise SetupError(f"fxckpt.batches() takes a loader or another iterable, and a {type(loader).__name__} is none")
    if type(loader).__module__ == "accelerate.data_loader" and isinstance(getattr(loader, "base_dataloader", None), DataLoader):
        inner = source_of(loader.base_dataloader)
        if isinstance(inner, LoaderSource):
            return AcceleratedSource(loader, inner)
    if is_set_up(loader):
        return FabricSource(loader, source_of(loader_in(loader)))
    stateful = _stateful_loader(loader)
    if isinstance(loader, DataLoader) and iterates_as_torch(loader, (stateful,) if stateful is not None else ()):
        kind = DataLoader if stateful is not None else None
        return WorkersSource(loader, kind) if loader.num_workers else LoaderSource(loader, kind)
    if isinstance(loader, DataLoader) and holds_workers(loader):
        raise SetupError(
            f"a {type(loader).__name__} keeps one iterator over all its passes, whose workers have made batches of later ones "
            "already: no resumed run can repeat that. Use torch's own DataLoader with persistent_workers=True, whose workers "
            "stay as well"
        )
    return IterableSource(loader)


def _stateful_loader(loader: Any) -> type | None:
    """torchdata's class, where this is one. Its passes are torch's; its own state lacks what the workers draw."""
    kinds = (k for k in type(loader).__mro__ if k.__module__.startswith("torchdata.stateful_dataloader"))
    return next(kinds, None)
