"""After Lookahead: a wrapper around Adam whose slow weights move every fifth step, and are then the fast ones too."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxckpt  # fxckpt


class Lookahead(torch.optim.Optimizer):
    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5, alpha: float = 0.5):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.k, self.alpha, self.counter = optimizer, k, alpha, 0
        self.param_groups = optimizer.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.counter += 1
        if self.counter % self.k == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for p, slow in zip(fast, self.slow):
                slow.add_(p.data - slow, alpha=self.alpha)
                p.data.copy_(slow)
        return loss

    def state_dict(self):
        return {"fast": self.optimizer.state_dict(), "slow": self.slow, "counter": self.counter}

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict["fast"])
        self.counter = state_dict["counter"]
        for slow, saved in zip(self.slow, state_dict["slow"]):
            slow.copy_(saved)


torch.manual_seed(0)
g = torch.Generator().manual_seed(1)
x = torch.randn(50, 6, generator=g)
loader = DataLoader(TensorDataset(x, x[:, :3].sin().sum(1, keepdim=True)), batch_size=8, shuffle=True)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
base = torch.optim.Adam(model.parameters(), lr=1e-2)
optimizer = Lookahead(base)
fxckpt.compile_step(optimizer, "ckpt", model=model, every=1, update="native")  # fxckpt
fxckpt.load()  # fxckpt
for _epoch in fxckpt.epochs(5):  # fxckpt, was: for _epoch in range(5):
    for inputs, targets in fxckpt.batches(loader):  # fxckpt, was: for inputs, targets in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
print(f"END loss {loss.item():.6f}")
finish(model, base, optimizer.slow, optimizer.counter)
