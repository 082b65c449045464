"""A rank of a job that trains one DTensor of a given type, cut into rows; ``rank_lives.py`` forks it.

A life is what it is there, with ``dtype``, ``dir`` and ``steps`` (train up to this one). What it found and left are the bytes of
the whole parameter and of its momentum, in hexadecimal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from whole_tensors import whole

import fxckpt


class Scaled(nn.Module):
    def __init__(self, dtype: torch.dtype, world: int):
        super().__init__()
        torch.manual_seed(0)
        values = torch.randn(6, 5, dtype=torch.complex64).to(dtype)
        self.weight = nn.Parameter(distribute_tensor(values, init_device_mesh("cpu", (world,)), [Shard(0)]))

    def forward(self, x: float) -> torch.Tensor:
        return (self.weight.to_local() * x).abs().square().sum()


def live(life: dict[str, Any], rank: int, begun: Any) -> dict[str, Any]:
    """One rank of a life."""
    torch.set_num_threads(1)
    model = Scaled(getattr(torch, life["dtype"]), life["world"])
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    fxckpt.compile_step(opt, life["dir"], model=model, every=1)
    start = fxckpt.load().step
    found = contents(model, opt)
    for step in range(start, life["steps"]):
        model(1.0 + step).backward()
        opt.step()
        opt.zero_grad()
    opt.ckpt.flush()
    opt.ckpt.shutdown()
    return {"start": start, "loaded": found, "left": contents(model, opt)}


def contents(model: Scaled, opt: torch.optim.Optimizer) -> str:
    """On every rank."""
    state = opt.state.get(model.weight, {})
    return "/".join(whole(each).hex() for each in (model.weight, *state.values()) if each is not None)
