"""What the end-to-end tests share: small models and their data, digests and snapshots, a training in this process.

Scripts of the tests begin with ``from helpers import *``; ``lives.py`` runs them.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

import fxckpt
from fxckpt.store.reader import Reader, candidates

__all__ = ["GPT", "F", "Loader", "conv", "digest", "eager", "finish", "frozen", "fxckpt", "mlp", "moment", "nn", "np",
           "random", "report", "torch"]  # fmt: skip

TIMEOUT = 120.0  # seconds that a life may take on a busy machine; none takes five on an idle one


# ---- models and data ----


def mlp(width: int = 16) -> nn.Sequential:
    """With dropout, so that the random state matters."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 4))


def eager(model: nn.Module) -> nn.Module:
    """Through our backend, with nothing compiled behind it: fast where compiled code is not the point."""
    return torch.compile(model, backend=fxckpt.backend, options={"inner": "eager"})


def conv() -> nn.Sequential:
    """With BatchNorm: its running statistics change in the forward; weights in channels_last order."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(8, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    return model.to(memory_format=torch.channels_last)


class GPT(nn.Module):
    """One block of a transformer; the output layer is the embedding. Classifies the first of its tokens' successor."""

    def __init__(self, vocabulary: int = 11, width: int = 16):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(6, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.tokens(x) + self.positions)[:, -1])


def frozen() -> nn.Sequential:
    """A pretrained part that is not trained, a norm that only collects statistics, and a head."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    model[:2].requires_grad_(False)
    return model


class Loader:
    """Endless shuffled batches of 8 from a data set of 50: iterable, with a generator and a position as its state."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, seed: int = 1):
        self.inputs, self.targets = inputs, targets
        self.generator, self.order, self.at = torch.Generator().manual_seed(seed), [], 0

    @classmethod
    def of(cls, *shape: int, classes: int = 4) -> Loader:
        g = torch.Generator().manual_seed(2)
        return cls(torch.randn(50, *shape, generator=g), torch.randint(0, classes, (50,), generator=g))

    @classmethod
    def of_tokens(cls, vocabulary: int = 11) -> Loader:
        g = torch.Generator().manual_seed(2)
        text = torch.randint(0, vocabulary, (50, 7), generator=g)
        return cls(text[:, :-1], text[:, -1])

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.at + 8 > len(self.order):
            self.order, self.at = torch.randperm(50, generator=self.generator).tolist(), 0
        chosen = self.order[self.at : self.at + 8]
        self.at += 8
        return self.inputs[chosen], self.targets[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": list(self.order), "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.at = list(state["order"]), state["at"]


# ---- digests and snapshots ----


def _feed(sha: Any, value: Any) -> None:
    """Hash a value by its exact bits and types."""
    if isinstance(value, torch.Tensor):
        value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        sha.update(value.tobytes())
    elif isinstance(value, dict):
        for key in value:
            sha.update(repr(key).encode())
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            _feed(sha, each)
    else:
        sha.update(repr(value).encode())


def digest(*objects: Any) -> str:
    """SHA-256 over the state dicts of modules, optimizers, schedulers and loaders, and over plain values and tensors."""
    sha = hashlib.sha256()
    for each in objects:
        _feed(sha, each.state_dict() if hasattr(each, "state_dict") else each)
    return sha.hexdigest()[:16]


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of what the two files of a checkpoint must hold, by their keys there; ties once, by their first name."""
    out, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            out[name] = tensor.detach().clone()
            seen.add(id(tensor))
    for i, opt in enumerate(optimizers):
        for name, param in model.named_parameters():
            for key, value in opt.state.get(param, {}).items():
                if isinstance(value, torch.Tensor):
                    out[f"{key}/{name}" if i == 0 else f"optimizer{i}:{key}/{name}"] = value.detach().clone()
    return out


def stored(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint's two files hold, as the safetensors package reads them; copies, not mappings of the files."""
    return {**load((path / "model.safetensors").read_bytes()), **load((path / "optimizer.safetensors").read_bytes())}


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bits, or are on one side only; NaN equals NaN."""
    return [key for key in {**left, **right} if key not in left or key not in right or digest(left[key]) != digest(right[key])]


# ---- a training in this process ----


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


def all_good(store, training: Training) -> list[int]:
    """Every complete checkpoint verifies and is exactly its step; returns their steps, newest first."""
    found = candidates(store)
    for each in found:
        assert not isinstance(each, Exception), each
        Reader(each.path).verify()
        assert differences(stored(each.path), training.reference[each.record.step]) == [], each.record.step
    return [each.record.step for each in found]


# ---- inside a life ----


def moment() -> None:
    """An instant at which a kill may come: a killed life lingers here, so that kills fall between all lines of its loop."""
    time.sleep(float(os.environ.get("MOMENT", "0")))


def report(step: int, loss: torch.Tensor) -> None:
    """Print a step's loss to the last bit, at once."""
    print(f"LOSS {step} {loss.item().hex()}", flush=True)
    moment()


def finish(*objects: Any) -> None:
    """Print the digest of everything that a run ends with, the random generators included."""
    state = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    print("DIGEST", digest(*objects, *state), flush=True)


# ---- watching ----


def until(ready: Callable[[], Any], timeout: float = TIMEOUT, why: Callable[[], str] = lambda: "waited in vain") -> None:
    """Look every few milliseconds; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, why()
        time.sleep(0.003)


def committed(directory: Path) -> list[str]:
    """Names of the checkpoints that are complete, by their names alone."""
    return [p.name for p in directory.glob("step-*") if "." not in p.name]
