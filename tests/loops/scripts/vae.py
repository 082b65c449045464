"""After the VAE example: noise drawn in the forward, a sum of losses over the epoch, samples drawn after it."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fxckpt  # fxckpt


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(36, 20), nn.Linear(20, 4), nn.Linear(20, 4)
        self.fc3, self.fc4 = nn.Linear(4, 20), nn.Linear(20, 36)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def decode(self, z):
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x):
        mu, logvar = self.encode(x)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.decode(z), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    bce = F.binary_cross_entropy(recon_x, x, reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def train(epoch):
    model.train()
    total["train"] = 0.0 if opt.ckpt.batch == 0 else total["train"]  # fxckpt, was: total["train"] = 0.0
    for data in fxckpt.batches(train_loader):  # fxckpt, was: for data in train_loader:
        opt.zero_grad()
        loss = loss_function(*((recon := model(data))[0], data, *recon[1:]))
        loss.backward()
        total["train"] += loss.item()
        opt.step()
    print(f"====> Epoch: {epoch} Average loss: {total['train'] / len(train_loader.dataset):.4f}")


def test():
    model.eval()
    with torch.no_grad():
        losses = [loss_function((recon := model(data))[0], data, *recon[1:]).item() for data in test_loader]
        sample = model.decode(torch.randn(4, 4))
    history.append((total["train"], sum(losses) / len(test_loader.dataset)))
    return sample


torch.manual_seed(1)
images = torch.rand(120, 36, generator=torch.Generator().manual_seed(1)).round()
train_loader = DataLoader(images[:90], batch_size=16, shuffle=True, drop_last=True)
test_loader = DataLoader(images[90:], batch_size=10, shuffle=True)
model = VAE()
opt = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=True)
total, history = {"train": 0.0}, []
fxckpt.compile_step(opt, "ckpt", model=model, every=1, extra={"total": total, "history": history})  # fxckpt
fxckpt.load()  # fxckpt
for epoch in fxckpt.epochs(5):  # fxckpt, was: for epoch in range(5):
    train(epoch)
    sample = test()
print(f"END train and test losses {history}")
finish(model, opt, history, sample)
