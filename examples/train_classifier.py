"""Train a small network on images that this script draws: epochs, a shuffled loader with workers, AMP, an average of weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import fxckpt


class Images(Dataset):
    """Ten patterns in noise. Where an image is cropped is drawn each time it is read."""

    def __init__(self, count: int, seed: int):
        patterns = torch.randn(10, 1, 12, 12, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(10, (count,), generator=generator)
        self.images = patterns[self.labels] + 2 * torch.randn(count, 1, 12, 12, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        top, left = torch.randint(3, (2,)).tolist()
        return self.images[i, :, top : top + 10, left : left + 10], self.labels[i]


def network() -> nn.Module:
    head = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*head, nn.Dropout(0.2), nn.Linear(256, 10))


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    return sum((model(x).argmax(1) == y).sum().item() for x, y in loader) / len(loader.dataset)


def main() -> None:
    torch.manual_seed(0)
    model = network()
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=8)
    scaler = torch.amp.GradScaler("cpu")
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train_loader = DataLoader(Images(512, seed=1), batch_size=32, shuffle=True, num_workers=2)
    test_loader = DataLoader(Images(256, seed=2), batch_size=64, num_workers=2)
    best = {"accuracy": 0.0}

    fxckpt.compile_step(opt, "ckpt", model=model, every=1, extra={"cosine": cosine, "scaler": scaler, "ema": ema, "best": best})
    fxckpt.load()
    for epoch in fxckpt.epochs(8):
        model.train()
        for images, labels in fxckpt.batches(train_loader):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            ema.update_parameters(model)
        cosine.step()
        found = accuracy(ema, test_loader)
        print(f"epoch {epoch}: accuracy {found:.1%}", flush=True)
        if found > best["accuracy"]:
            best["accuracy"] = found
            torch.save(ema.state_dict(), "best.pt")
    torch.save([model.state_dict(), ema.state_dict(), opt.state_dict()], "last.pt")


if __name__ == "__main__":
    main()
