"""After the CIFAR training loops: a ResNet with BatchNorm, crops and flips in this process, cosine annealing, the best one."""

from __future__ import annotations

import numpy as np
import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fxckpt  # fxckpt


class Cifar(Dataset):
    def __init__(self, count: int, seed: int, train: bool):
        g = torch.Generator().manual_seed(seed)
        self.targets, self.train = torch.randint(0, 4, (count,), generator=g), train
        shapes = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.images = shapes[self.targets] + 0.5 * torch.randn(count, 3, 8, 8, generator=g)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        if self.train:
            top, left = np.random.randint(0, 3, 2)
            image = F.pad(image, (1, 1, 1, 1))[:, top : top + 8, left : left + 8]
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return image, self.targets[i]


class BasicBlock(nn.Module):
    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def train():
    net.train()
    for inputs, targets in fxckpt.batches(trainloader):  # fxckpt, was: for inputs, targets in trainloader:
        optimizer.zero_grad()
        loss = criterion(net(inputs), targets)
        loss.backward()
        optimizer.step()


def test(epoch):
    net.eval()
    with torch.no_grad():
        correct = sum((net(inputs).argmax(1) == targets).sum().item() for inputs, targets in testloader)
    acc = 100.0 * correct / len(testloader.dataset)
    if acc > best["acc"]:
        best.update(acc=acc, epoch=epoch)
    return acc


torch.manual_seed(0)
np.random.seed(0)
trainloader = DataLoader(Cifar(48, 1, True), batch_size=8, shuffle=True)
testloader = DataLoader(Cifar(32, 2, False), batch_size=16)
net = nn.Sequential(BasicBlock(3, 6, 1), BasicBlock(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
best = {"acc": 0.0, "epoch": -1}
extra = {"scheduler": scheduler, "best": best}  # fxckpt
fxckpt.compile_step(optimizer, "ckpt", model=net, every=1, update="native", extra=extra)  # fxckpt
fxckpt.load()  # fxckpt
for epoch in fxckpt.epochs(5):  # fxckpt, was: for epoch in range(5):
    train()
    acc = test(epoch)
    scheduler.step()
print(f"END acc {acc} best {best}")
finish(net, optimizer, scheduler, best)
