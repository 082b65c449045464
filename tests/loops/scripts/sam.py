"""After sharpness-aware minimization: two backward passes a batch, a wrapper around SGD that climbs first, StepLR by hand."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxckpt  # fxckpt


class SAM(torch.optim.Optimizer):
    def __init__(self, params, base_optimizer, rho: float = 0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        grads = [p.grad.norm(p=2) for group in self.param_groups for p in group["params"]]
        grad_norm = torch.norm(torch.stack(grads), p=2)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * (group["rho"] / (grad_norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()


torch.manual_seed(0)
g = torch.Generator().manual_seed(1)
x = torch.randn(48, 6, generator=g)
loader = DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=8, shuffle=True)
model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
opt = fxckpt.compile_step(optimizer, "ckpt", model=model, every=1, update="native")  # fxckpt
fxckpt.load()  # fxckpt
for epoch in fxckpt.epochs(5):  # fxckpt, was: for epoch in range(5):
    optimizer.param_groups[0]["lr"] = 0.1 if epoch < 3 else 0.02
    for inputs, targets in fxckpt.batches(loader):  # fxckpt, was: for inputs, targets in loader:
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.first_step()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.second_step()
print(f"END loss {loss.item():.6f}")
finish(model, optimizer.base_optimizer)
