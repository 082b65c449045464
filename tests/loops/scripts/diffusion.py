"""After denoising-diffusion-pytorch: a Trainer that counts its steps, an endless cycle over the loader, accumulation, an EMA."""

from __future__ import annotations

import copy

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fxckpt  # fxckpt


def cycle(dl):
    while True:
        yield from fxckpt.batches(dl)  # fxckpt, was: yield from dl


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.inside, self.out = nn.Embedding(10, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, t):
        return self.out(F.dropout(F.silu(self.inside(x) + self.time(t)), 0.1, self.training))


class EMA(nn.Module):
    """Follows the model from the tenth step on, each second one."""

    def __init__(self, model: nn.Module, beta: float = 0.9):
        super().__init__()
        self.ema_model, self.beta = copy.deepcopy(model).requires_grad_(False), beta
        self.register_buffer("step", torch.tensor(0))
        self.online_model = [model]

    @torch.no_grad()
    def update(self):
        step = self.step.item()
        self.step += 1
        if step % 2:
            return
        for ma, current in zip(self.ema_model.parameters(), self.online_model[0].parameters()):
            ma.copy_(current) if step < 10 else ma.lerp_(current, 1.0 - self.beta)


class Trainer:
    def __init__(self, model: nn.Module, data: torch.Tensor):
        self.model, self.gradient_accumulate_every, self.train_num_steps = model, 2, 16
        self.dl = cycle(DataLoader(data, batch_size=8, shuffle=True))
        self.opt = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
        self.ema = EMA(model)
        self.alphas = torch.linspace(1.0, 0.1, 10)

    def loss(self, x):
        t = torch.randint(0, 10, (len(x),))
        noise, alpha = torch.randn_like(x), self.alphas[t].unsqueeze(1)
        return F.mse_loss(self.model(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t), noise)

    def train(self):
        modules = [self.model, self.ema]  # fxckpt
        fxckpt.compile_step(self.opt, "ckpt", model=modules, every=1, update="native")  # fxckpt
        fxckpt.load()  # fxckpt
        for step in fxckpt.steps(self.train_num_steps):  # fxckpt, was: for step in range(self.train_num_steps):
            total_loss = 0.0
            for _ in range(self.gradient_accumulate_every):
                loss = self.loss(next(self.dl)) / self.gradient_accumulate_every
                total_loss += loss.item()
                loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.opt.step()
            self.opt.zero_grad()
            self.ema.update()
            if step % 5 == 0:
                self.ema.ema_model.eval()
                self.sample = self.ema.ema_model(torch.randn(4, 8), torch.zeros(4, dtype=torch.long))
        return total_loss


torch.manual_seed(0)
trainer = Trainer(Denoiser(), torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).sign())
print(f"END loss {trainer.train():.6f}")
finish(trainer.model, trainer.ema, trainer.opt, trainer.sample)
