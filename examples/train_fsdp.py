"""FSDP2 under torchrun, killed and restarted: each rank writes its part of every checkpoint, into one store.

    torchrun --nproc-per-node 2 --max-restarts 10 examples/train_fsdp.py --steps 200

Kill a rank while it trains (`kill -9`): the agent restarts all, each prints the step that all of them load, and the last line,
a digest of the weights, is that of a run that nobody killed. Start it again with another `--nproc-per-node` and it goes on from
the same step, each rank reading what it now needs of the parts that the others wrote; that is no continuation to the same
bits, which it says. The lines with `fxckpt` are all there is to it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxckpt


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints", help="a directory, the same for all ranks")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=2, help="steps between two checkpoints")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--patience", type=float, default=300, help="seconds that a rank waits for another one")
    return parser.parse_args(arguments)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape whose last size is the width; the same shape."""
        return x + self.inner(x)


def make_model(width: int, layers: int) -> nn.Sequential:
    """Each block is compiled and sharded by itself, as is usual with FSDP2."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shards",))  # "cuda" on GPUs
    model = nn.Sequential(nn.Linear(16, width), *(Block(width) for _ in range(layers)), nn.Linear(width, 2))
    for block in model[1:-1]:
        block.compile(backend=fxckpt.backend)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def digest(model: nn.Module) -> str:
    """Short for every bit of the weights. All ranks call it."""
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.full_tensor().detach().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank of one life."""
    args = parse(arguments)
    dist.init_process_group("gloo", timeout=timedelta(seconds=args.patience))  # "nccl" on GPUs
    rank, life = dist.get_rank(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    torch.manual_seed(0)
    model = make_model(args.width, args.layers)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)  # each rank draws batches of its own

    fxckpt.compile_step(opt, args.dir, model=model, every=args.every)
    restored = fxckpt.load()
    print(f"life {life} rank {rank} starts at step {restored.step}", flush=True)

    for _ in fxckpt.steps(args.steps):
        x = torch.randn(8, 16)
        loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

    opt.ckpt.flush()
    print(f"rank {rank} ends at step {opt.ckpt.statistics()['steps']} with weights {digest(model)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
