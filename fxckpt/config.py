"""The options of ``compile_step``, checked in one place."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING

from fxckpt.errors import SetupError
from fxckpt.store.checks import is_number
from fxckpt.store.read_back import MODES
from fxckpt.store.retention import Policy

if TYPE_CHECKING:
    import torch

PRESETS: dict[str, dict[str, int]] = {
    "throughput": {"threads": 4, "chunk_mb": 8, "staging_mb": 128, "max_async": 3},
    "latency": {"threads": 2, "chunk_mb": 2, "staging_mb": 64, "max_async": 2},
    "memory": {"threads": 1, "chunk_mb": 2, "staging_mb": 4, "max_async": 1},
}
"""Settings that go together: as much bandwidth as the disk has, short waits, little memory."""


AUTO = "auto"

TRIAL = 16
"""Steps from one full checkpoint to the next under ``journal="auto"``, until it was measured how many there are to be."""


def disabled() -> bool:
    """Does the environment turn fxckpt off (``FXCKPT_DISABLE=1``)?"""
    return os.environ.get("FXCKPT_DISABLE", "0") not in ("", "0")


def default_directory() -> str:
    """``$FXCKPT_DIR``, else ``checkpoints/``."""
    return os.environ.get("FXCKPT_DIR") or "checkpoints"


@dataclass(frozen=True)
class Config:
    """The options of one run; sizes in MiB. Raises SetupError for what cannot work. ``preset`` sets threads, chunk_mb,
    staging_mb and max_async together; options that were given win over it."""

    preset: InitVar[str | None] = None
    every: int | str = "auto"
    keep: int = 2
    keep_every: int | None = None
    keep_minutes: float | None = None
    keep_best: str | tuple[str, str] | None = None
    writer: str = "thread"
    layer: str | Callable[[str], str] = "module"
    on_layer: Callable[[str, int, dict[str, torch.Tensor]], object] | None = None
    update: str | None = None
    updates: str = "after_backward"
    threads: int = 2
    chunk_mb: int = 4
    staging_mb: int | None = None
    max_async: int = 2
    on_error: str = "warn"
    read_back: str = "sampled"
    fresh: bool = False
    journal: int | str = 1
    restore_seconds: float = 30.0
    on_divergence: str = "warn"
    replicas: int = 0

    def __post_init__(self, preset: str | None) -> None:
        if preset is not None and preset not in PRESETS:
            raise SetupError(f"preset={preset!r}: expected one of {sorted(PRESETS)}")
        for name, value in PRESETS.get(preset or "", {}).items():
            if getattr(self, name) == getattr(type(self), name):  # nobody gave it: it is the default
                object.__setattr__(self, name, value)
        if not (_is_count(self.every) or self.every in ("auto", "continuous")):
            raise SetupError(f'every={self.every!r}: expected a number of steps >= 1, "auto" or "continuous"')
        for name in ("keep", "threads", "chunk_mb", "max_async"):
            if not _is_count(value := getattr(self, name)):
                raise SetupError(f"{name}={value!r}: expected a whole number >= 1")
        self._check_journal()
        self._check_replicas()
        Policy.make(self.keep, self.keep_every, self.keep_minutes, self.keep_best)
        if self.staging_mb is not None and (not isinstance(self.staging_mb, int) or self.staging_mb < 0):
            raise SetupError(f"staging_mb={self.staging_mb!r}: expected a whole number of MiB >= 0, or None")
        _one_of("update", self.update, (None, "native", "inductor"))
        _one_of("updates", self.updates, ("after_backward", "in_backward"))
        _one_of("on_error", self.on_error, ("warn", "raise"))
        _one_of("read_back", self.read_back, MODES)
        _one_of("on_divergence", self.on_divergence, ("warn", "raise", "off"))
        _one_of("writer", self.writer, ("thread", "monitor", "mock"))
        if self.writer == "monitor" and self.staging_bytes < 2 * (self.chunk_mb << 20):
            least = f"two chunks of {self.chunk_mb} MiB at least: staging_mb is {self.staging_bytes >> 20}"
            raise SetupError(f'writer="monitor" shares staging_mb with the monitor process, {least}')
        if not callable(self.layer):
            _one_of("layer", self.layer, ("module", "block"))

    def _check_journal(self) -> None:
        if self.journal != AUTO and not _is_count(self.journal):
            raise SetupError(f'journal={self.journal!r}: expected a whole number of steps >= 1, or "auto"')
        if not (is_number(self.restore_seconds) and self.restore_seconds > 0):
            raise SetupError(f"restore_seconds={self.restore_seconds!r}: expected a number of seconds above 0")
        if self.journal != 1 and self.every != 1:
            what = f"journal={self.journal!r} makes each step durable, for a step that is in no record could not be made again"
            raise SetupError(f"{what}: it goes with every=1, and not with every={self.every!r}")
        if self.journal != 1 and self.updates == "in_backward":
            what = "a record of the journal holds gradients, and in the backward each goes with its update"
            raise SetupError(f'{what}: journal={self.journal!r} and updates="in_backward" do not go together')

    def _check_replicas(self) -> None:
        if isinstance(self.replicas, bool) or self.replicas not in (0, 1):
            raise SetupError(f"replicas={self.replicas!r}: expected 0, or 1 for a replica on another rank's disk")
        if self.replicas and self.journal != 1:
            what = f"replicas={self.replicas} sends full checkpoints, and the steps between them that journal={self.journal!r} "
            raise SetupError(f"{what}makes durable would be lost with a disk: leave one of the two out")

    @property
    def first_journal(self) -> int:
        """``journal`` as the run begins with it."""
        return self.journal if isinstance(self.journal, int) else TRIAL

    @property
    def staging_bytes(self) -> int:
        """Room for what a fence copies itself; 32 MiB unless given."""
        return (32 if self.staging_mb is None else self.staging_mb) << 20


def _is_count(value: object) -> bool:
    """Is it a whole number from 1 on? ``True`` is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises SetupError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise SetupError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
