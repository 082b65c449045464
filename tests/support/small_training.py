"""A small training in this process, with a reference of every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from digests import differences, snapshot, stored
from small_models import Loader, mlp
from torch.nn import functional as F

import fxckpt
from fxckpt.loading.whole import make_again
from fxckpt.store.journaled import durable_steps, journaled
from fxckpt.store.reader import Reader, candidates, records


class Training:
    """A small training over a store, in this process; ``reference`` keeps all state after each step, ``losses`` the losses.

    Without a directory: plain PyTorch.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        make: Callable = mlp,
        loader: Loader | None = None,
        forward: Any = None,
        optimizer: Callable = torch.optim.AdamW,
        seed: int = 0,
        **options: Any,
    ):
        torch.manual_seed(seed)
        self.model, self.loader = make(), loader or Loader.of(8)
        self.forward = self.model if forward is None else forward(self.model)
        self.opt = optimizer(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.opt, 0.9)
        if directory is not None:
            options = {"every": 1, "keep": 20, "update": "native", **options}
            options.setdefault("extra", {"s": self.scheduler, "data": self.loader})
            fxckpt.compile_step(self.opt, directory, **{"model": self.model, **options})
        self.reference: dict[int, dict] = {}
        self.losses: list[str] = []

    @property
    def found(self) -> dict[str, Any]:
        """The statistics."""
        return self.opt.ckpt.statistics()

    def train(self, steps: int = 1) -> Training:
        for _ in range(steps):
            x, y = next(self.loader)
            loss = F.cross_entropy(self.forward(x), y)
            loss.backward()
            self.opt.step()
            self.losses.append(loss.item().hex())
            if hasattr(self.opt, "ckpt"):
                self.reference[self.found["steps"]] = self.now()
            self.opt.zero_grad()
            self.scheduler.step()
        return self

    def end(self) -> Training:
        self.opt.ckpt.shutdown()
        return self

    def now(self) -> dict[str, torch.Tensor]:
        """A snapshot."""
        return snapshot(self.model, self.opt)


def all_made_again(store, training: Training) -> list[int]:
    """Every complete checkpoint is good, and every step of the journal that its records lead to is exactly that step; returns all
    steps that are durable, oldest first."""
    all_good(store, training)
    for row in journaled(candidates(store), records(store)):
        for each in row.steps():
            tensors = {key: tensor for (_, key), tensor in make_again(each)[-1].items()}
            assert differences(tensors, training.reference[each.record.step]) == [], each.record.step
    return durable_steps(store)


def all_good(store, training: Training) -> list[int]:
    """Every complete checkpoint verifies and is exactly its step; returns their steps, newest first."""
    found = candidates(store)
    for each in found:
        assert not isinstance(each, Exception), each
        Reader(each.path).verify()
        assert differences(stored(each.path), training.reference[each.record.step]) == [], each.record.step
    return [each.record.step for each in found]
