"""After the ImageNet example: shuffled images, workers that crop and flip at random, BatchNorm, the best accuracy so far."""

from __future__ import annotations

import random

import torch
from script_prelude import finish
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

import fxckpt  # fxckpt


class AverageMeter:
    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, value: float, n: int = 1):
        self.sum += value * n
        self.count += n

    @property
    def avg(self) -> float:
        return self.sum / max(self.count, 1)


class ImageFolder(Dataset):
    def __init__(self, count: int, seed: int, augment: bool):
        g = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(0, 5, (count,), generator=g)
        shapes = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
        self.images, self.augment = shapes[self.targets] + 0.3 * torch.randn(count, 3, 12, 12, generator=g), augment

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, top, left = self.images[i], 2, 2
        if self.augment:
            top, left = torch.randint(0, 5, (2,)).tolist()
            image = image.flip(-1) if random.random() < 0.5 else image
        return image[:, top : top + 8, left : left + 8], self.targets[i]


def train(train_loader, model, criterion, optimizer, epoch):
    losses = AverageMeter()
    model.train()
    for images, target in fxckpt.batches(train_loader):  # fxckpt, was: for images, target in train_loader:
        loss = criterion(model(images), target)
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"Epoch [{epoch}] loss {losses.avg:.4f} (since the start or the resume)")


def validate(val_loader, model, criterion):
    top1 = AverageMeter()
    model.eval()
    with torch.no_grad():
        for images, target in val_loader:
            top1.update((model(images).argmax(1) == target).float().mean().item(), len(images))
    return top1.avg


def main():
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=1e-4)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.1)
    train_loader = DataLoader(ImageFolder(60, 1, True), batch_size=8, shuffle=True, num_workers=2)
    val_loader = DataLoader(ImageFolder(40, 2, False), batch_size=20)
    best = {"acc1": 0.0}
    extra = {"scheduler": scheduler, "best": best}  # fxckpt
    fxckpt.compile_step(optimizer, "ckpt", model=model, every=1, update="native", extra=extra)  # fxckpt
    fxckpt.load()  # fxckpt
    for epoch in fxckpt.epochs(4):  # fxckpt, was: for epoch in range(4):
        train(train_loader, model, criterion, optimizer, epoch)
        acc1 = validate(val_loader, model, criterion)
        scheduler.step()
        best["acc1"] = max(acc1, best["acc1"])
    print(f"END acc1 {acc1:.6f} best {best['acc1']:.6f}")
    finish(model, optimizer, scheduler, best)


main()
