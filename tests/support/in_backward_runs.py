"""Trains a small model with updates inside the backward, after it, and without fxckpt, to compare the bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fxckpt

WARM_UP = 4
"""Steps before a layer is armed: two that make state and calls, two in which the loop is watched."""


class Net(nn.Module):
    """Two layers with a LayerNorm between them, whose weight Inductor would read in a later kernel if it were not pinned."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(torch.relu(self.fc1(x)))).square().mean()


class Pair(nn.Module):
    """Two layers: the least that has an order."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x))).square().mean()


def batch(step: int) -> torch.Tensor:
    """The batch of a step, the same in every run."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


@dataclass
class Trained:
    """What a run ended with: ``bits`` of parameters and states, ``armed`` how many gradients each backward used up."""

    model: nn.Module
    opt: Any
    compiled: Callable[..., Any]
    losses: list[float] = field(default_factory=list)
    armed: list[int] = field(default_factory=list)

    def bits(self) -> list[torch.Tensor]:
        state = [v for s in self.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [*(p.detach() for p in self.model.parameters()), *state]

    def used_up(self) -> int:
        """The gradients that the backward has used up, since it began the step."""
        stepping = self.opt.ckpt._run.stepping
        return len(stepping.in_backward.armed._consumed) if stepping.in_backward is not None else 0

    def step(self, *args: Any, autocast: bool = False, **kwargs: Any) -> None:
        """One turn of the plainest loop."""
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = self.compiled(*args, **kwargs)
        loss.backward()
        if hasattr(self.opt, "ckpt"):
            self.armed.append(self.used_up())
        self.opt.step()
        self.opt.zero_grad()
        self.losses.append(loss.item())


def begun(
    updates: str | None = "in_backward",
    build: Callable[[], nn.Module] = Net,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    directory: Any = None,
    **options: Any,
) -> Trained:
    """A model and its optimizer before the first step; ``updates=None``: plain Inductor."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build()
    opt = optimizer(model)
    if updates is None:
        return Trained(model, opt, torch.compile(model))
    writer = {"writer": "mock"} if directory is None else {}
    opt = fxckpt.compile_step(opt, directory, **{"model": model, "every": 1, "updates": updates, **writer, **options})
    return Trained(model, opt, torch.compile(model, backend=fxckpt.backend))


def warmed_up(**options: Any) -> Trained:
    """One whose next backward is armed."""
    run = begun(**options)
    for step in range(WARM_UP):
        run.step(batch(step))
    assert run.armed == [0] * WARM_UP, "it armed early"
    return run


def bits_of_plain(
    run: Trained, optimizer: Callable[..., Any], steps: int, loop: Callable[..., Any] | None = None
) -> list[torch.Tensor]:
    """What PyTorch's own optimizer ends with, on the same compiled code, without us. ``loop`` makes one step of ``run``."""
    run.opt.ckpt.shutdown()
    torch.manual_seed(0)
    first = type(run.model)()
    with torch.no_grad():
        for mine, theirs in zip(run.model.parameters(), first.parameters()):
            mine.copy_(theirs)
            mine.grad = None
    plain = Trained(run.model, optimizer(run.model), run.compiled)
    for step in range(steps):
        (loop or Trained.step)(plain, *([step] if loop else [batch(step)]))
    return plain.bits()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


@contextmanager
def deterministic() -> Iterator[None]:
    """An embedding's gradient is summed by atomics otherwise."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


__all__ = [
    "F", "Net", "Pair", "Trained", "adamw", "batch", "begun", "bits_of_plain", "deterministic", "same", "sgd", "warmed_up",
]  # fmt: skip
