"""The class that a checkpoint manager derives from, with its options, and the manager that reads a model to begin with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


class BaseCheckpointManager(ABC):
    """Public methods ask whether it is enabled; those that a manager writes begin with an underscore."""

    enable: bool
    save_future: Any

    @dataclass(kw_only=True, slots=True)
    class Config:
        """Options that all managers have. ``build`` makes the manager whose class declares it."""

        _owner: ClassVar[Any] = None

        enable: bool = False
        folder: str = "checkpoint"
        interval: int = 500
        initial_load_path: str | None = None
        initial_load_model_only: bool = True
        initial_load_in_hf: bool = False
        initial_load_in_hf_quantized: bool = False
        last_save_model_only: bool = True
        last_save_in_hf: bool = False
        export_dtype: str = "float32"
        keep_latest_k: int = 10
        load_step: int = -1
        exclude_from_loading: list[str] = field(default_factory=list)
        enable_first_step_checkpoint: bool = False
        create_seed_checkpoint: bool = False
        load_only: bool = False

        def build(self, **given: Any) -> Any:
            return self._owner(config=self, **given)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "Config" in vars(cls):
            cls.Config._owner = cls

    def load(self, step: int = -1) -> bool:
        return self.enable and self._load(step)

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        return self.enable and self._save(curr_step, last_step)

    def maybe_wait_for_staging(self) -> None:
        if self.enable:
            self._maybe_wait_for_staging()

    def maybe_wait_for_saving(self) -> None:
        if self.enable and self.save_future is not None:
            self._wait_for_saving()

    def close(self) -> None:
        if getattr(self, "enable", False):
            self._close()

    @abstractmethod
    def _load(self, step: int = -1) -> bool: ...

    @abstractmethod
    def _save(self, curr_step: int, last_step: bool = False) -> bool: ...

    @abstractmethod
    def _maybe_wait_for_staging(self) -> None: ...

    @abstractmethod
    def _wait_for_saving(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class CheckpointManager(BaseCheckpointManager):
    """Here it only fills the model: with the number that its path ends in."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        async_mode: str = "disabled"

    def __init__(self, config: Config, *, model_parts: list[Any], **others: Any):
        self.enable, self.save_future = config.enable, None
        self._config, self._model_parts = config, model_parts

    def _load(self, step: int = -1) -> bool:
        with torch.no_grad():
            for param in (p for part in self._model_parts for p in part.parameters()):
                param.fill_(float(self._config.initial_load_path.rpartition("/")[2]))
        return True

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        return False

    def _maybe_wait_for_staging(self) -> None: ...

    def _wait_for_saving(self) -> None: ...

    def _close(self) -> None: ...
