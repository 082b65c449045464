"""DistributedDataParallel under torchrun, killed and restarted: all ranks write one store together, and start from one step.

    torchrun --nproc-per-node 2 --max-restarts 10 examples/train_ddp.py --epochs 4

Kill a rank while it trains (`kill -9`): the agent restarts all, each prints the step that all of them load, and the last lines,
digests of the weights, are those of a run that nobody killed. The lines with `fxckpt` are all there is to it. On machines
without a shared disk (`--own`) each rank has a store of its own.
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
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxckpt


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints", help="a directory, the same for all ranks")
    parser.add_argument("--own", action="store_true", help="each rank has a store of its own in it")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every", type=int, default=2, help="steps between two checkpoints")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--patience", type=float, default=300, help="seconds that a rank waits for another one")
    return parser.parse_args(arguments)


def make_loader() -> DataLoader:
    """Each rank sees its share of the examples, in another order in each epoch."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(512, 16, generator=draw)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    return DataLoader(data, batch_size=16, sampler=DistributedSampler(data, seed=2))


def digest(model: nn.Module) -> str:
    """Short for every bit of the weights."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank of one life."""
    args = parse(arguments)
    dist.init_process_group("gloo", timeout=timedelta(seconds=args.patience))  # "nccl" on GPUs
    rank, life = dist.get_rank(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(16, args.width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(args.width, 2))
    )
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)  # dropout differs between ranks
    loader = make_loader()

    directory = f"{args.dir}/rank{rank}" if args.own else args.dir
    fxckpt.compile_step(opt, directory, model=model, every=args.every)
    restored = fxckpt.load()
    print(f"life {life} rank {rank} starts at step {restored.step}", flush=True)

    for epoch in fxckpt.epochs(args.epochs):
        loader.sampler.set_epoch(epoch)
        for x, y in fxckpt.batches(loader):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()

    opt.ckpt.flush()
    print(f"rank {rank} ends at step {opt.ckpt.statistics()['steps']} with weights {digest(model.module)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
