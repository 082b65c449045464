"""Train a GAN, two networks with an optimizer each; killed at any instant, the same command goes on with the same bits.

    python examples/train_gan.py

The generator learns to put points on eight places of a circle. The discriminator makes two steps for each of the generator's.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxckpt

NOISE, PLACES, EPOCHS = 8, 8, 8


def points(count: int) -> torch.Tensor:
    """What is to be learned: points near eight places of a circle."""
    generator = torch.Generator().manual_seed(1)
    angle = torch.randint(PLACES, (count,), generator=generator) * (2 * math.pi / PLACES)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=generator)


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs))


def main() -> None:
    torch.manual_seed(0)
    generator, discriminator = network(NOISE, 2), network(2, 1)
    opt_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999), foreach=True)
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999), foreach=True)
    loader = DataLoader(TensorDataset(points(512)), batch_size=64, shuffle=True, drop_last=True)

    fxckpt.compile_step([opt_d, opt_g], "ckpt", model={"generator": generator, "discriminator": discriminator}, every=1)
    fxckpt.load()
    for epoch in fxckpt.epochs(EPOCHS):
        for (real,) in fxckpt.batches(loader):
            for _ in range(2):
                fake = generator(torch.randn(len(real), NOISE)).detach()
                loss_d = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()
                opt_d.zero_grad()
                loss_d.backward()
                opt_d.step()

            loss_g = F.softplus(-discriminator(generator(torch.randn(len(real), NOISE)))).mean()
            opt_g.zero_grad()
            loss_g.backward()
            opt_g.step()
        with torch.no_grad():
            away = (generator(torch.randn(256, NOISE)).norm(dim=1) - 1).abs().mean().item()
        print(f"epoch {epoch}: the points are {away:.2f} away from the circle", flush=True)
    torch.save({"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}, "last.pt")


if __name__ == "__main__":
    main()
