"""What a way to save has to do, as the benchmarks ask it, and what several of them need."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn


class Nothing:
    """No checkpoints: plain ``torch.compile`` and the plain optimizer, the base of every ratio."""

    fused = True

    def __init__(self) -> None:
        self.stalled = 0.0  # seconds that the thread that trains was kept by saving
        self.saves = 0
        self.durable: list[tuple[int, float]] = []  # steps whose checkpoint was complete, and when, as time.monotonic says it

    def of(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Nothing:
        """For what is not a training: only say what is to be saved."""
        self.model, self.optimizer = model, optimizer
        return self

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Callable:
        """Remember what to save and where; returns the compiled forward."""
        self.folder = folder
        self.of(model, optimizer)
        return torch.compile(model)

    def turns(self) -> Iterable:
        """What a loop goes over that trains until it is left."""
        return itertools.count()

    def at(self, every: int | str) -> None:
        """Whether the next steps are to be saved (1) or not (0), or a word; for those who decide themselves."""

    def save(self, step: int) -> None:
        """``saved``, with the time that it took."""
        began = time.monotonic()
        self.saved(step)
        self.saves += 1
        self.stalled += time.monotonic() - began

    def saved(self, step: int) -> None:
        """Called after each optimizer step."""

    def flush(self) -> None:
        """Return when everything that was started is durable."""

    def check(self, step: int) -> dict:
        """Verify the last checkpoint (of ``step``); returns what to report. Raises if it is not good."""
        return {}

    def close(self) -> None:
        """No checkpoint will be asked for any more; returns when all are durable."""

    def restore(self) -> dict[str, str]:
        """Bring the newest checkpoint that loads into a model and an optimizer that have made no step; returns what did not
        load, and why."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name and optimizer state by ``key/name``; ties once."""
        stored, names = self.model.state_dict(), itertools.chain(self.model.named_parameters(), self.model.named_buffers())
        return {**{name: tensor.detach() for name, tensor in names if name in stored}, **self.moments()}

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state by ``key/name``."""
        state = self.optimizer.state
        return {f"{key}/{name}": value for name, p in self.model.named_parameters() for key, value in state[p].items()}

    def make_moments(self) -> None:
        """Let an optimizer that has made no step have its state, for those who load into what is there."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()


def copy_in(loaded: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """What a loader's caller still has to do: put the values where training reads them."""
    for name, tensor in state.items():
        tensor.copy_(loaded[name])


def replace_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Write a new file beside ``path``, sync it, rename it over ``path``, sync the directory."""
    new = path.with_suffix(".new")
    write(new)
    for name, flags in ((new, os.O_RDWR), (path.parent, os.O_RDONLY)):
        fd = os.open(name, flags)
        os.fsync(fd)
        os.close(fd)
        if name == new:
            os.rename(new, path)


def sync_tree(folder: Path) -> None:
    """Make every file and directory below ``folder`` durable, and its own name."""
    for where, _, files in os.walk(folder):
        for name in (where, *(os.path.join(where, file) for file in files)):
            fd = os.open(name, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    fd = os.open(folder.parent, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
