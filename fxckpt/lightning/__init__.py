"""``fxckpt.lightning.Checkpoint``: a Lightning callback that has a Trainer checkpoint at every step and resume exactly.

    import fxckpt.lightning

    trainer = Trainer(max_epochs=90, callbacks=[fxckpt.lightning.Checkpoint("checkpoints/", every=1)])
    trainer.fit(module, loader)

``checks`` says what is refused, ``training`` is one call of ``fit()``, ``progress`` is what a record holds of a Trainer with the
``results`` it has logged so far, ``feed`` is a loader whose passes are ours, and ``logs`` lets CSV files go on.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from fxckpt.errors import SetupError
from fxckpt.handle import Handle
from fxckpt.lightning.training import Training

__all__ = ["Checkpoint"]

_PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
"""The two names under which the same Trainer is published."""


def _base() -> Any:
    """The class of callbacks: that of the package which the script has imported, else of one that is installed. A Trainer asks
    its callbacks for hooks by name only, so either will do for both."""
    loaded = [module for module in _PACKAGES.values() if module in sys.modules]
    installed = [module for package, module in _PACKAGES.items() if importlib.util.find_spec(package) is not None]
    if not (found := loaded or installed):
        raise ImportError("fxckpt.lightning needs Lightning, which is not installed: pip install 'fxckpt[lightning]'")
    return importlib.import_module(found[0]).Callback


_Callback: Any = _base()


class _Hooks(_Callback):  # type: ignore[misc]
    """Begins a :class:`Training` when ``fit`` starts, and ends it."""

    def __init__(self, directory: str | os.PathLike[str], **options: Any):
        """Args:
            directory: the store's directory.
            options: what ``fxckpt.compile_step`` takes, but ``model``, which is the LightningModule. ``extra`` for what neither
                Lightning nor the module's own hooks keep.

        Raises:
            SetupError: ``model`` is among the options.
        """
        if "model" in options:
            raise SetupError("fxckpt.lightning.Checkpoint takes no model=: the model is the LightningModule that is fitted")
        self._directory, self._options = directory, options
        self._training: Training | None = None
        self._handle: Handle | None = None

    @property
    def ckpt(self) -> Handle:
        """The handle of the run. Raises SetupError before ``fit`` has begun."""
        if self._handle is None:
            raise SetupError("there is no run yet: trainer.fit() starts it")
        return self._handle

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the run and load. Raises SetupError for what could not be resumed exactly."""
        self._training = Training(trainer, pl_module, self, self._directory, self._options)
        self._handle = self._training.handle

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish what was started."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The batch under way is dropped; what was complete is finished."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Where neither came."""
        self._end()

    def _end(self) -> None:
        training, self._training = self._training, None
        if training is not None:
            training.end()


class Checkpoint(_Hooks):
    """Checkpoints at the end of each batch whose optimizer stepped; ``trainer.fit`` goes on from the newest one by itself.

    Where it stands among the callbacks does not matter. ``ckpt`` is the run's :class:`~fxckpt.Handle` while ``fit`` runs, and
    afterwards.
    """
