"""Three ranks of DDP, killed in thought: what stands for another process has a model, an optimizer and a run of its own.

``python three_ranks.py RANK PORT FOLDER``; each prints, of every way to go on, whether it ended with the bits of a plain run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxckpt

WORLD, STEPS, KILLED = 3, 5, 2


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


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    expected, wrapped, opt = make()
    train(wrapped, opt, rank, range(STEPS))
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="LOG %(message)s")
    ways = {
        "one store": (folder / "one", "the wrapper", False),
        "a store each": (folder / f"rank{rank}", "the model", False),
        "with hooks": (folder / "hooks", "the model", True),
    }
    for way, (root, given, hooks) in ways.items():
        found = killed_twice(rank, root, given, hooks)
        same = all(map(torch.equal, found.parameters(), expected.parameters()))
        print(f"RESULT {way}: {'same' if same else 'other'}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
