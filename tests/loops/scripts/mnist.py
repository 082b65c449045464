"""After the MNIST example: epochs, a test after each, Adadelta and StepLR."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import fxckpt  # fxckpt


def digits(count: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=g)
    shapes = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(shapes[labels] + 0.5 * torch.randn(count, 1, 8, 8, generator=g), labels)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = F.relu(self.fc1(torch.flatten(self.dropout1(x), 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


def train(model, train_loader, optimizer, epoch):
    model.train()
    batches = enumerate(fxckpt.batches(train_loader), optimizer.ckpt.batch)  # fxckpt, was: batches = enumerate(train_loader)
    for batch_idx, (data, target) in batches:
        optimizer.zero_grad()
        loss = F.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
        if batch_idx % 3 == 0:
            print(f"Train Epoch: {epoch} [{batch_idx * len(data)}/{len(train_loader.dataset)}]\tLoss: {loss.item():.6f}")


def test(model, test_loader):
    model.eval()
    test_loss = correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            output = model(data)
            test_loss += F.nll_loss(output, target, reduction="sum").item()
            correct += (output.argmax(dim=1) == target).sum().item()
    return test_loss / len(test_loader.dataset), correct


def main():
    torch.manual_seed(1)
    train_loader = DataLoader(digits(90, 1), batch_size=16, shuffle=True)
    test_loader = DataLoader(digits(40, 2), batch_size=20)
    model = Net()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    fxckpt.compile_step(optimizer, "ckpt", model=model, every=1, update="native", extra={"lr": scheduler})  # fxckpt
    fxckpt.load()  # fxckpt
    for epoch in fxckpt.epochs(5):  # fxckpt, was: for epoch in range(5):
        train(model, train_loader, optimizer, epoch)
        loss, correct = test(model, test_loader)
        scheduler.step()
    print(f"END loss {loss:.6f} correct {correct}")
    finish(model, optimizer, scheduler)


main()
