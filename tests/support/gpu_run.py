"""A small training on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

import fxckpt
from fxckpt.loading.whole import make_again
from fxckpt.store.journaled import journaled
from fxckpt.store.reader import Reader, candidates, records


class Run:
    """A small training on the device; ``states`` holds copies of all state after each step, by the step's number."""

    def __init__(self, directory: Path | None, *, flags: dict | None = None, make=None, seed: int = 0, **options):
        torch.manual_seed(seed)
        self.model = (make or self.mlp)().cuda()
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-2, **({"fused": True} if flags is None else flags))
        self.step_number, self.states, self.directory = 0, {}, directory
        if directory is not None:
            options = {"model": self.model, "every": 1, "keep": 20, "on_error": "raise", **options}
            fxckpt.compile_step(self.opt, directory, **options)

    @staticmethod
    def mlp() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 8)
        )

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(self.step_number)
        shape = (16, 3, 16, 16) if isinstance(self.model[0], nn.Conv2d) else (16, 64)
        return torch.randn(shape, generator=g).cuda(), torch.randint(0, 8, (16,), generator=g).cuda()

    def train_without_waiting(self, steps: int) -> None:
        """Whatever waits for the device is an error; then all is flushed."""
        x, y = self.batch()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(steps):
                F.cross_entropy(self.model(x), y).backward()
                self.opt.step()
                self.opt.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self.opt.ckpt.flush()

    def train(self, steps: int, keep: bool = True) -> Run:
        for _ in range(steps):
            x, y = self.batch()
            F.cross_entropy(self.model(x), y).backward()
            self.opt.step()
            self.opt.zero_grad()
            self.step_number += 1
            if keep:
                self.states[self.step_number] = self.now()
        return self

    def now(self) -> dict[str, torch.Tensor]:
        """Copies on the device, in order on the current stream: nothing waits."""
        out = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        for name, param in self.model.named_parameters():
            out |= {f"{key}/{name}": t.detach().clone() for key, t in self.opt.state[param].items()}
        return out

    def check(self, least: int = 1) -> None:
        """Each checkpoint verifies and is exactly its step."""
        self.opt.ckpt.flush()
        found = candidates(self.directory)
        assert len(found) >= least
        for each in found:
            Reader(each.path).verify()
            files = [load((each.path / f"{name}.safetensors").read_bytes()) for name in ("model", "optimizer")]
            same(files[0] | files[1], self.states[each.record.step])

    def check_journal(self) -> list[int]:
        """Each step that records lead to is, made again on the device, exactly that step; returns these steps."""
        self.opt.ckpt.flush()
        steps = [each for row in journaled(candidates(self.directory), records(self.directory)) for each in row.steps()]
        for each in steps:
            made = make_again(each)[-1]
            same({key: tensor for (_, key), tensor in made.items()}, self.states[each.record.step])
        return [each.record.step for each in steps]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names and bits."""
    assert left.keys() == right.keys()
    for name in left:
        a, b = (t[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (left, right))
        assert torch.equal(a, b), name
