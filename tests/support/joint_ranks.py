"""Ranks of one job that write one store together, as threads of this process: they talk as ranks do, over one key-value store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_training import Training
from torch import nn

import fxckpt
from fxckpt.compiled_optimizer import together
from fxckpt.loading import load as loading
from fxckpt.ranks import Agreement


def plain() -> nn.Module:
    """A model that draws nothing: in this process all ranks would draw from one generator."""
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


class Normed(torch.nn.Module):
    """A model with buffers, which differ between ranks."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = plain(), torch.nn.BatchNorm1d(8)

    def forward(self, x):
        return self.inner(self.norm(x))


class Job:
    """``world`` trainings, which are replicas unless ``make`` says otherwise. ``limit``: seconds that one waits for another."""

    def __init__(self, root: Path, monkeypatch: Any, world: int = 2, limit: float = 20.0):
        self.root, self.world = root, world
        self.store = dist.HashStore()
        self.runs: list[Training] = []
        self._here, self._limit = threading.local(), limit
        monkeypatch.setattr(together, "agreement_here", lambda: self._agreement("fxckpt.compile_step()"))
        monkeypatch.setattr(loading, "agreement_for", lambda target, asked: target.run and self._agreement("fxckpt.load()"))

    @property
    def rank(self) -> int:
        """Which one this thread is, inside ``each``."""
        found: int = self._here.rank
        return found

    def _agreement(self, call: str) -> Agreement:
        return Agreement(self.store, self._here.rank, self.world, self._limit, self._limit, call)

    def each(self, function: Callable[[int], Any]) -> list[Any]:
        """Call it with each rank, at the same time; what it returned or raised."""

        def one(rank: int) -> Any:
            self._here.rank = rank
            try:
                return function(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(one, range(self.world)))

    def begin(
        self, load: bool = True, at: Callable[[int], Path] | None = None, make: Callable = plain, **options: Any
    ) -> list[Any]:
        """Start all; returns what each restored, or the errors."""

        def replica() -> Any:
            model, draw = make(), torch.Generator().manual_seed(0)  # all threads draw from one generator, and seed it
            for param in model.parameters():
                param.data.normal_(0.0, 0.3, generator=draw)
            return model

        self.runs = self.each(lambda rank: Training(self.root if at is None else at(rank), make=replica, **options))
        if (failed := [run for run in self.runs if isinstance(run, Exception)]) or not load:
            return failed
        return self.load()

    def load(self, **asked: Any) -> list[Any]:
        return self.each(lambda rank: fxckpt.load(optimizer=self.runs[rank].opt, **asked))

    def train(self, steps: int = 1) -> None:
        """So many steps of each, in turns: nothing of torch that traces a step may run in two threads at once."""
        for _ in range(steps):
            for run in self.runs:
                run.train(1)

    def flush(self, timeout: float | None = 20.0) -> list[Any]:
        return self.each(lambda rank: self.runs[rank].opt.ckpt.flush(timeout))

    def end(self) -> list[Any]:
        """Shut all down; what each raised."""
        return [found for found in self.each(lambda rank: self.runs[rank].opt.ckpt.shutdown()) if found is not None]
