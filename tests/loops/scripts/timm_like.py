"""After timm's train.py with --model-ema: mixup drawn by numpy, a schedule by updates, clipping, both models validated."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxckpt  # fxckpt


class ModelEmaV2(nn.Module):
    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model: nn.Module):
        for ema_v, model_v in zip(self.module.state_dict().values(), model.state_dict().values()):
            ema_v.copy_(self.decay * ema_v + (1.0 - self.decay) * model_v)


class CosineLRScheduler:
    """Sets lr by the number of updates."""

    def __init__(self, optimizer: torch.optim.Optimizer, t_initial: int, warmup_t: int):
        self.optimizer, self.t_initial, self.warmup_t = optimizer, t_initial, warmup_t
        self.base = [group["lr"] for group in optimizer.param_groups]

    def step_update(self, num_updates: int):
        warm = min(1.0, num_updates / self.warmup_t)
        for group, lr in zip(self.optimizer.param_groups, self.base):
            group["lr"] = lr * warm * (0.5 + 0.5 * math.cos(math.pi * num_updates / self.t_initial))


def mixup(x: torch.Tensor, target: torch.Tensor):
    lam = np.random.beta(0.2, 0.2) if np.random.rand() < 0.8 else 1.0
    smooth = F.one_hot(target, 4) * 0.9 + 0.025
    return lam * x + (1 - lam) * x.flip(0), lam * smooth + (1 - lam) * smooth.flip(0)


def train_one_epoch(epoch: int):
    model.train()
    batches = enumerate(fxckpt.batches(loader_train), opt.ckpt.batch)  # fxckpt, was: batches = enumerate(loader_train)
    for batch_idx, (x, y) in batches:
        x, y = mixup(x, y)
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        model_ema.update(model)
        lr_scheduler.step_update(epoch * len(loader_train) + batch_idx + 1)
        losses["train"] = loss.item()


@torch.no_grad()
def validate(model: nn.Module):
    model.eval()
    return sum((model(x).argmax(1) == y).float().mean().item() for x, y in loader_eval) / len(loader_eval)


torch.manual_seed(42)
np.random.seed(42)
g = torch.Generator().manual_seed(1)
labels = torch.randint(0, 4, (72,), generator=g)
points = torch.randn(4, 8, generator=g)[labels] + 0.5 * torch.randn(72, 8, generator=g)
loader_train = DataLoader(TensorDataset(points[:48], labels[:48]), batch_size=8, shuffle=True, drop_last=True)
loader_eval = DataLoader(TensorDataset(points[48:], labels[48:]), batch_size=12)
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))
model_ema = ModelEmaV2(model, decay=0.8)
opt = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.05)
lr_scheduler = CosineLRScheduler(opt, t_initial=5 * len(loader_train), warmup_t=6)
lr_scheduler.step_update(0)
best, losses = {"metric": None, "epoch": None}, {}
modules = {"model": model, "ema": model_ema}  # fxckpt
fxckpt.compile_step(opt, "ckpt", model=modules, every=1, update="native", extra={"best": best})  # fxckpt
fxckpt.load()  # fxckpt
for epoch in fxckpt.epochs(5):  # fxckpt, was: for epoch in range(5):
    train_one_epoch(epoch)
    eval_metric, ema_metric = validate(model), validate(model_ema.module)
    if best["metric"] is None or ema_metric > best["metric"]:
        best["metric"], best["epoch"] = ema_metric, epoch
print(f"END loss {losses['train']:.6f} eval {eval_metric:.6f} ema {ema_metric:.6f} best {best}")
finish(model, model_ema, opt, best)
