"""DistributedDataParallel in workers of Ray Train, killed and restarted: they write one store, and start from one step.

    python examples/train_ray.py --epochs 4

Kill a worker while it trains (`kill -9`): Ray starts all anew (`FailureConfig`), each prints the step that all of them load,
and the last lines, digests of the weights, are those of a run that nobody killed. `--kill 20` has one kill itself behind step
20, once. The lines with `fxckpt` are all there is to it: `ray.train.report` is for metrics, and gets no checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from collections.abc import Sequence
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxckpt


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="checkpoints", help="a directory that all workers see")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every", type=int, default=2, help="steps between two checkpoints")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--kill", type=int, default=0, help="a worker that began anew kills itself behind this step")
    return parser.parse_args(arguments)


def make_loader() -> DataLoader:
    """Each worker sees its share of the examples, in another order in each epoch."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(512, 16, generator=draw)
    data = TensorDataset(x, (x.sum(1) > 0).long())
    return DataLoader(data, batch_size=16, sampler=DistributedSampler(data, seed=2))


def digest(model: nn.Module) -> str:
    """Short for every bit of the weights."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def train(config: dict[str, Any]) -> None:
    """One worker of one life."""
    rank = get_context().get_world_rank()
    torch.manual_seed(0)
    model = prepare_model(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2)))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)  # dropout differs between workers
    loader = make_loader()

    fxckpt.compile_step(opt, config["dir"], model=model, every=config["every"])
    start = fxckpt.load().step
    print(f"worker {rank} starts at step {start}", flush=True)

    for epoch in fxckpt.epochs(config["epochs"]):
        loader.sampler.set_epoch(epoch)
        for x, y in fxckpt.batches(loader):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if start == 0 and rank == 1 and opt.ckpt.statistics()["steps"] == config["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)

    opt.ckpt.shutdown()
    print(f"worker {rank} ends at step {opt.ckpt.statistics()['steps']} with weights {digest(model)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the workers, and start them again whenever one dies."""
    args = parse(arguments)
    directory = os.path.abspath(args.dir)  # workers run in folders of their own
    trainer = TorchTrainer(
        train,
        train_loop_config={**vars(args), "dir": directory},
        torch_config=TorchConfig(backend="gloo"),  # "nccl" on GPUs
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=False),
        run_config=RunConfig(storage_path=f"{directory}.ray", failure_config=FailureConfig(max_failures=args.restarts)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
