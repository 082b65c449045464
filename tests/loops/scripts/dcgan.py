"""After DCGAN: two networks with BatchNorm, two optimizers that step in turn, noise for each batch."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn
from torch.utils.data import DataLoader

import fxckpt  # fxckpt

NZ = 6


def weights_init(m: nn.Module):
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


torch.manual_seed(999)
images = torch.tanh(torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
dataloader = DataLoader(images, batch_size=16, shuffle=True)
netG = nn.Sequential(
    nn.ConvTranspose2d(NZ, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh()
)
netD = nn.Sequential(
    nn.Conv2d(1, 4, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(4, 8, 2, 1, 0), nn.BatchNorm2d(8),
    nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(8, 1, 3), nn.Sigmoid(),
)  # fmt: skip
netG.apply(weights_init)
netD.apply(weights_init)
criterion = nn.BCELoss()
fixed_noise = torch.randn(8, NZ, 1, 1)
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
fxckpt.compile_step([optimizerD, optimizerG], "ckpt", model={"G": netG, "D": netD}, every=1, update="native")  # fxckpt
fxckpt.load()  # fxckpt
for _epoch in fxckpt.epochs(4):  # fxckpt, was: for _epoch in range(4):
    for real in fxckpt.batches(dataloader):  # fxckpt, was: for real in dataloader:
        netD.zero_grad()
        label = torch.full((len(real),), 1.0)
        errD_real = criterion(netD(real).view(-1), label)
        errD_real.backward()
        fake = netG(torch.randn(len(real), NZ, 1, 1))
        label.fill_(0.0)
        errD_fake = criterion(netD(fake.detach()).view(-1), label)
        errD_fake.backward()
        optimizerD.step()

        netG.zero_grad()
        label.fill_(1.0)
        errG = criterion(netD(fake).view(-1), label)
        errG.backward()
        optimizerG.step()
    with torch.no_grad():
        fake = netG(fixed_noise)  # in train mode, as there: BatchNorm's statistics move
print(f"END Loss_D {(errD_real + errD_fake).item():.6f} Loss_G {errG.item():.6f}")
finish(netG, netD, optimizerD, optimizerG, fake)
