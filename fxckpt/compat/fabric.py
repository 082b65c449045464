"""Private parts of Lightning Fabric: the wrappers that ``setup`` and ``setup_dataloaders`` return, and what is in them.

The optimizer's wrapper asks the strategy for each step, and that the optimizer inside: a class that is swapped later is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_OPTIMIZERS = {
    ("lightning.fabric.wrappers", "_FabricOptimizer"),
    ("lightning_fabric.wrappers", "_FabricOptimizer"),
    ("lightning.pytorch.core.optimizer", "LightningOptimizer"),
    ("pytorch_lightning.core.optimizer", "LightningOptimizer"),
}
_LOADERS = {("lightning.fabric.wrappers", "_FabricDataLoader"), ("lightning_fabric.wrappers", "_FabricDataLoader")}

_STEP_THEMSELVES = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


def _is_one(value: object, kinds: set[tuple[str, str]]) -> bool:
    """By name: nobody who does not use it need import it."""
    return any((kind.__module__, kind.__name__) in kinds for kind in type(value).__mro__)


def is_wrapped(value: object) -> bool:
    """Is it what ``Fabric.setup``, or a Trainer of Lightning, makes of an optimizer?"""
    return _is_one(value, _OPTIMIZERS)


def strategy_that_steps(value: Any) -> str | None:
    """The name of a strategy whose engine shards the parameters, or makes the steps itself."""
    name = type(getattr(value, "_strategy", None)).__name__ if is_wrapped(value) else ""
    return name if name in _STEP_THEMSELVES else None


def scaler_of(value: Any) -> Any:
    """The ``GradScaler`` that a wrapped optimizer steps with, if any."""
    if not is_wrapped(value):
        return None
    strategy = getattr(value, "_strategy", None)
    precision = getattr(strategy, "precision", None) or getattr(strategy, "precision_plugin", None)
    return getattr(precision, "scaler", None)


# -- loaders ----------------------------------------------------------------------------------------------------------------


def is_set_up(loader: object) -> bool:
    """Is it what ``setup_dataloaders`` makes of a loader?"""
    return _is_one(loader, _LOADERS) and all(hasattr(loader, name) for name in ("_dataloader", "_num_iter_calls"))


def loader_in(loader: Any) -> Any:
    """The loader inside."""
    return loader._dataloader


def put_loader(loader: Any, inner: Any) -> None:
    """Have it iterate over another one."""
    loader._dataloader = inner


def passes_of(loader: Any) -> int:
    """How many passes it has begun, which it tells samplers as the epoch."""
    return int(loader._num_iter_calls)


def set_passes(loader: Any, count: int) -> None:
    """Let the next one have this number."""
    loader._num_iter_calls = count


class StandIn:
    """Iterated over in place of a loader, and asked for its samplers."""

    def __init__(self, loader: Any, begin: Callable[[], Iterator[Any]]):
        self._loader, self._begin = loader, begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
