"""Lives of a small training with a journal, in this process: each begins with a load, and keeps all state after each of its
steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from digests import digest
from torch import nn

import fxckpt
from fxckpt.errors import Corrupt
from fxckpt.store.reader import Candidate, records


def net() -> nn.Sequential:
    """With batch norm, whose buffers change in a forward; weights in channels_last order; and dropout."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    return model.to(memory_format=torch.channels_last)


def larger() -> nn.Sequential:
    """So large that a record has a third of the bytes, as the sizes of files are rounded up."""
    return nn.Sequential(nn.Conv2d(2, 64, 3), nn.Flatten(), nn.Linear(1024, 64))


class Life:
    """One life. ``states`` after each step, by its number; ``at`` what a load gave. ``between(life, step)`` is called in each
    turn behind the step; ``before(life, step)`` between backward and step; ``on_commit`` gets what is told of commits."""

    def __init__(
        self,
        root: Path,
        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        model: Callable[[], nn.Module] = net,
        before: Callable[[Life, int], object] = lambda life, step: None,
        between: Callable[[Life, int], object] = lambda life, step: None,
        load: dict[str, Any] | None = None,
        on_commit: list[fxckpt.Committed] | None = None,
        **options: Any,
    ):
        torch.manual_seed(0)
        self.model = model()
        self.plain = make(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.plain, 0.9)
        self.before, self.between = before, between
        options = {"every": 1, "keep": 2, "journal": 6, "update": "native", "extra": {"s": self.scheduler}, **options}
        self.opt = fxckpt.compile_step(self.plain, root, model=self.model, **options)
        if on_commit is not None:
            self.opt.ckpt.on_commit(on_commit.append)
        self.restored = fxckpt.load(**(load or {}))
        self.at = self.now()
        self.states: dict[int, str] = {}

    def now(self) -> str:
        """A digest of model, optimizer and scheduler. Where random generators stand between load and loop is the loop's
        business; that a run goes on from them the same, dropout tells."""
        return digest(self.model, dict(self.opt.state_dict().items()), self.scheduler)

    def train(self, upto: int) -> Life:
        """Make steps until there are so many."""
        for step in fxckpt.steps(upto):
            self.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            if step % 3 == 2:
                self.model[0].bias.grad = None
            self.before(self, step)
            self.opt.step()
            self.opt.zero_grad()
            self.scheduler.step()
            self.between(self, step)
            self.states[step + 1] = self.now()
        return self

    def end(self) -> Life:
        self.opt.ckpt.shutdown()
        return self


def journalled(root: Path) -> list[int]:
    """The steps of the records that are there."""
    return sorted(each.record.step for each in map(whole, records(root)))


def whole(each: Candidate | Corrupt) -> Candidate:
    """Nothing may be damaged."""
    assert isinstance(each, Candidate), each
    return each


def signed(body: dict[str, Any]) -> bytes:
    """As a record is written: its digest in front."""
    del body["sha256"]
    text = json.dumps(body, separators=(",", ":")).encode()[1:] + b"\n"
    return b'{"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text
