"""A rank with a trainer that calls its checkpoint manager in torchtitan's order; ``rank_lives.py`` forks it.

A life is what it is there, with ``config`` (options of the manager's ``Config``; ``enable=False``: a life without us),
``workers`` (of its loader), ``validates`` and ``load_step``. The model is sharded and draws random numbers (dropout); its
iterator and a validation behind ``save()`` draw others.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from whole_tensors import whole

sys.path.insert(0, str(Path(__file__).parent / "interfaces"))
import fxckpt.titan

Life = dict[str, Any]


class Block(nn.Module):
    """Half of what goes through is dropped; the projection is two in a state dict, as torchtitan's fused ones are."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.both, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)
        self.both.register_state_dict_post_hook(in_two)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.both(self.norm(x)).chunk(2, -1)
        return x + self.drop(self.out(torch.relu(gate) * value))


def in_two(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A hook of torchtitan's kind."""
    state[f"{prefix}gate"], state[f"{prefix}value"] = state.pop(f"{prefix}weight").chunk(2)


in_two.__module__ = "torchtitan.models"


class Samples(IterableDataset):
    """Endless, of each rank its own, with a place that is kept; in the process that trains also some luck."""

    def __init__(self, rank: int):
        self.rank, self.place = rank, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.place += 1
            draw = torch.Generator().manual_seed(1000 * self.place + self.rank)
            yield torch.randn(12, generator=draw) + (0.1 * torch.rand(12) if get_worker_info() is None else 0)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Container(torch.optim.Optimizer):
    """Several optimizers as one. The name by which its class is known is torchtitan's."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        super().__init__([p for each in optimizers for group in each.param_groups for p in group["params"]], {})

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    def step(self, closure: None = None) -> None:
        for each in self.optimizers:
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.optimizers:
            each.zero_grad(set_to_none)


Container.__name__ = "OptimizersContainer"


class Schedulers:
    """One for each optimizer; only how often they stepped is kept."""

    def __init__(self, optimizers: Container):
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in optimizers]

    def step(self) -> None:
        for each in self.schedulers:
            each.step()

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for each in self.schedulers:
            each.last_epoch = state["last_epoch"]
            each._step_count, each._last_lr = each.last_epoch + 1, each.get_lr()


class Trainer:
    """Makes its parts and calls its checkpoint manager in the order of torchtitan's: what it has counted is a step ahead when
    the next batches are fetched, and behind ``save()`` it validates."""

    def __init__(self, life: Life, rank: int):
        torch.manual_seed(7 + rank)
        self.life, self.rank, self.step, self.seen = life, rank, 0, 0
        mesh = init_device_mesh("cpu", (life["world"],))
        self.model = nn.Sequential(*(Block(12) for _ in range(2)), nn.Linear(12, 3))
        with torch.no_grad():
            for at, param in enumerate(self.model.parameters()):
                param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(at)) * 0.3)
        for block in self.model[:2]:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        body, head = list(self.model[:2].parameters()), list(self.model[2].parameters())
        self.optimizers = Container([torch.optim.AdamW(body, lr=1e-2, fused=True), torch.optim.Adam(head, lr=1e-3, fused=True)])
        self.schedulers = Schedulers(self.optimizers)
        self.dataloader = StatefulDataLoader(Samples(rank), batch_size=4, num_workers=life.get("workers", 0))
        options = {"update": "native", "last_save_model_only": False, **life.get("config", {})}
        config = fxckpt.titan.CheckpointManager.Config(**{"enable": True, "interval": 1, **options})
        given = {
            "dataloader": self.dataloader, "model_parts": [self.model], "optimizers": self.optimizers,
            "lr_schedulers": self.schedulers, "states": {"train_state": self}, "sd_adapter": None, "base_folder": life["dir"],
        }  # fmt: skip
        self.checkpointer = config.build(**given)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.seen = state["step"], state["seen"]

    def batches(self) -> Iterator[torch.Tensor]:
        yield from self.dataloader

    def train_step(self, batches: Iterator[torch.Tensor]) -> float:
        self.optimizers.zero_grad()
        total = 0.0
        for x in [next(batches) for _ in range(2)]:  # all micro-batches are fetched before the first is used
            loss = self.model(x).square().mean()
            loss.backward()
            self.seen += len(x)
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.schedulers.step()
        return total

    def validate(self) -> None:
        """It draws a random number, as a loader's iterator does."""
        self.model.eval()
        torch.rand(())
        self.model.train()

    def train(self, begun: Any) -> dict[str, Any]:
        loaded = self.checkpointer.load(step=self.life.get("load_step", -1))
        start, losses, saved = self.step, [], []
        batches = self.batches()
        while self.step < self.life["steps"]:
            self.step += 1
            if self.rank == 0:
                begun.value = self.step
            losses.append(self.train_step(batches).hex())
            last = self.step == self.life["steps"]
            saved.append(self.step) if self.checkpointer.save(self.step, last_step=last) else None
            if self.life.get("validates", True):
                self.validate()
        return {"loaded": loaded, "start": start, "losses": losses, "saved": saved, "left": self.left(), "seen": self.seen}

    def left(self) -> str:
        """Short for all parameters, optimizer state and rates. All ranks call it."""
        found = hashlib.sha256()
        for param in self.model.parameters():
            states = [each.state[param] for each in self.optimizers if param in each.state]
            for tensor in (param, *(t for state in states for _, t in sorted(state.items()))):
                found.update(whole(tensor))
        found.update(repr([group["lr"] for each in self.optimizers for group in each.param_groups]).encode())
        return found.hexdigest()[:16]


def live(life: Life, rank: int, begun: Any) -> dict[str, Any]:
    """One rank of a life."""
    torch.set_num_threads(1)
    trainer = Trainer(life, rank)
    found = trainer.train(begun)
    trainer.checkpointer.close()
    dist.barrier()
    return {**found, "store": sorted(os.listdir(life["dir"])) if os.path.isdir(life["dir"]) else []}
