"""After the forward-forward algorithm: each layer is trained to its end by an optimizer of its own, one layer after another."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn

import fxckpt  # fxckpt

STEPS = 10


class Layer(nn.Linear):
    def __init__(self, inside: int, out: int):
        super().__init__(inside, out)
        self.opt, self.threshold = torch.optim.Adam(self.parameters(), lr=0.03), 2.0

    def forward(self, x):
        direction = x / (x.norm(2, 1, keepdim=True) + 1e-4)
        return torch.relu(torch.mm(direction, self.weight.T) + self.bias.unsqueeze(0))

    def train_once(self, x_pos, x_neg):
        g_pos, g_neg = self.forward(x_pos).pow(2).mean(1), self.forward(x_neg).pow(2).mean(1)
        loss = torch.log(1 + torch.exp(torch.cat([-g_pos + self.threshold, g_neg - self.threshold]))).mean()
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss.item()


torch.manual_seed(1234)
layers = nn.ModuleList([Layer(10, 16), Layer(16, 16), Layer(16, 8)])
x_pos = torch.randn(32, 10, generator=torch.Generator().manual_seed(1))
x_neg = x_pos[torch.randperm(32)].roll(1, 1)
optimizers = [layer.opt for layer in layers]
fxckpt.compile_step(optimizers, "ckpt", model=layers, every=1, update="native")  # fxckpt
fxckpt.load()  # fxckpt
h_pos, h_neg = x_pos, x_neg
for i, layer in enumerate(layers):
    for _step in fxckpt.steps(STEPS * (i + 1)):  # fxckpt, was: for _step in range(STEPS):
        noise = 0.1 * torch.randn_like(h_pos)
        loss = layer.train_once(h_pos + noise, h_neg)
    h_pos, h_neg = layer(h_pos).detach(), layer(h_neg).detach()
goodness = h_pos.pow(2).mean().item(), h_neg.pow(2).mean().item()
print(f"END loss {loss:.6f} goodness {goodness}")
finish(layers, *optimizers, h_pos, h_neg)
