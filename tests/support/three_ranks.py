"""One of three ranks of DDP, killed in thought: what stands for another process has a model, an optimizer and a run of its own.

``rank_lives.py`` forks it. Each says of every way to go on whether it ended with the bits of a plain run, and what was logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxckpt

STEPS, KILLED = 5, 2


def make(seed: int = 0, **options: object) -> tuple[nn.Module, DistributedDataParallel, torch.optim.Optimizer]:
    """Several buckets of a MiB, in an order that is not that of the parameters."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(300, 300), nn.ReLU()) for _ in range(6)))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1, **options)
    return model, wrapped, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(wrapped: nn.Module, opt: torch.optim.Optimizer, rank: int, steps: Iterable[int]) -> None:
    for step in steps:
        drawn = torch.Generator().manual_seed(100 * rank + step)
        wrapped(torch.randn(8, 300, generator=drawn)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def killed_twice(rank: int, folder: Path, given: str, hooks: bool = False) -> nn.Module:
    """The model of a run that three processes made, one after the other."""
    for first, last in ((0, KILLED), (KILLED, KILLED + 1), (KILLED + 1, STEPS)):
        model, wrapped, opt = make(seed=first)
        if hooks and first:
            model[0][0].weight.register_hook(lambda gradient: None)
        what = wrapped if given == "the wrapper" else model
        fxckpt.compile_step(opt, folder, model=what, every=1, update="native")
        assert fxckpt.load(optimizer=opt).step == first
        assert all(p.grad is None for p in model.parameters())
        train(wrapped, opt, rank, range(first, last))
        opt.ckpt.flush()
        opt.ckpt.shutdown()
    return model


class Kept(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def live(life: dict[str, Any], rank: int, begun: Any) -> dict[str, Any]:
    """One rank, in all three ways."""
    torch.set_num_threads(1)
    expected, wrapped, opt = make()
    train(wrapped, opt, rank, range(STEPS))
    kept = Kept()
    logging.getLogger("fxckpt").addHandler(kept)
    ways = {
        "one store": (Path("one"), "the wrapper", False),
        "a store each": (Path(f"rank{rank}"), "the model", False),
        "with hooks": (Path("hooks"), "the model", True),
    }
    same = {}
    for way, (root, given, hooks) in ways.items():
        found = killed_twice(rank, root, given, hooks)
        same[way] = all(map(torch.equal, found.parameters(), expected.parameters()))
    return {"same": same, "logged": kept.messages}
