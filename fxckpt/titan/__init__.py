"""``fxckpt.titan.CheckpointManager``: in the place of torchtitan's own, its ranks write one store and resume exactly.

    import fxckpt.titan

    def my_debugmodel() -> Trainer.Config:
        config = llama3_debugmodel()
        config.checkpoint = fxckpt.titan.CheckpointManager.Config(enable=True, interval=1)
        return config

``checks`` says what is refused, ``training`` is one training (its boundaries, what is kept of it), ``feed`` sees its batches
fetched.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

from fxckpt.errors import SetupError
from fxckpt.handle import Handle
from fxckpt.titan.training import Given, Training

__all__ = ["CheckpointManager"]


def _base() -> Any:
    """The class that torchtitan's checkpoint managers are of. Raises ImportError where there is none."""
    if importlib.util.find_spec("torchtitan") is None:
        raise ImportError("fxckpt.titan needs torchtitan, which is not installed")
    try:
        from torchtitan.components.checkpointer import BaseCheckpointManager
    except ImportError as error:
        raise ImportError(
            f"fxckpt.titan needs torchtitan's BaseCheckpointManager, as 0.3 has it, and this torchtitan gives none ({error})"
        ) from error
    return BaseCheckpointManager


_Manager: Any = _base()


class CheckpointManager(_Manager):  # type: ignore[misc]
    """Takes checkpoints inside the optimizers' steps, and starts from the newest one that verifies, in the place of torchtitan's.

    A checkpoint is of the instant before the batches of a step are fetched. The step before it is complete then, with its
    schedulers and the validation that follows it. ``ckpt`` is the run's :class:`~fxckpt.Handle`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_Manager.Config):  # type: ignore[misc]
        """torchtitan's options, and some of ``fxckpt.compile_step``. ``interval`` is its ``every``, ``keep_latest_k`` its
        ``keep`` (0: all are kept), and the folder its directory, which all ranks share."""

        last_save_model_only: bool = False
        """The last checkpoint is of everything, as all are."""

        update: Literal["native", "inductor"] | None = None
        """How updates are computed, as in compile_step."""

        on_error: Literal["warn", "raise"] = "warn"
        """What a checkpoint does that fails, as in compile_step."""

        on_divergence: Literal["warn", "raise", "off"] = "warn"
        """What is done where replicas differ, as in compile_step."""

        read_back: Literal["off", "sampled", "all"] = "sampled"
        """Which committed checkpoints are read again, as in compile_step."""

        preset: Literal["throughput", "latency", "memory"] | None = None
        """Threads, chunk size and memory that go together, as in compile_step."""

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[Any],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ):
        """As the Trainer makes it, on every rank.

        Args:
            config: the options. All others are what the Trainer has: the data loader, the parts of the model on this rank, the
                containers of optimizers and schedulers, more objects with a state by name, an adapter for Hugging Face's names.
            base_folder: what ``config.folder`` lies in.

        Raises:
            SetupError: what could not be resumed exactly, or what only torchtitan's own manager does.
        """
        self.enable, self.save_future = config.enable, None
        self._training: Training | None = None
        if self.enable:
            given = Given(dataloader, model_parts, optimizers, lr_schedulers, states, sd_adapter, base_folder)
            self._training = Training(config, given)

    @property
    def ckpt(self) -> Handle:
        """The handle of the run. Raises SetupError where checkpoints are not enabled."""
        return self._run().handle

    def _run(self) -> Training:
        if self._training is None:
            raise SetupError("there is no run: checkpoint.enable is False, or the manager was closed")
        return self._training

    def _load(self, step: int = -1) -> bool:
        """Load the newest checkpoint that all ranks have, or that of ``step``. Was there one, or a model to begin with?"""
        return self._run().load(step)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        """A step is complete. Is there a checkpoint of it?"""
        return self._run().step_is_over(curr_step, last_step)

    def _maybe_wait_for_staging(self) -> None:
        """Nothing: each update waits for the copies that it would change, inside ``step()``."""

    def _wait_for_saving(self) -> None:
        """Until all checkpoints so far are durable."""
        self._run().handle.flush()

    def _close(self) -> None:
        """Finish what is in flight. Nothing happens the second time."""
        training, self._training = self._training, None
        if training is not None:
            training.end()
