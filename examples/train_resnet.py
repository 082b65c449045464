"""Train a small residual network with BatchNorm on digits that this script draws itself.

Shows the other way to write the loop: ``for step in fxckpt.steps(n)`` starts at the loaded step and gives
each checkpoint an exact boundary, whatever comes after ``opt.step()``. OneCycleLR changes the momentum as
well as the learning rate, and BatchNorm's running statistics are buffers: all of it comes back after a kill.

    python examples/train_resnet.py --dir checkpoints-resnet/
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F
from train_gpt import digest, show

import fxckpt

# 5 × 7 pixels a digit, one row a number, the leftmost pixel in the highest of its five bits.
GLYPHS = {
    0: (14, 17, 19, 21, 25, 17, 14),
    1: (4, 12, 4, 4, 4, 4, 14),
    2: (14, 17, 1, 2, 4, 8, 31),
    3: (31, 2, 4, 2, 1, 17, 14),
    4: (2, 6, 10, 18, 31, 2, 2),
    5: (31, 16, 30, 1, 1, 17, 14),
    6: (6, 8, 16, 30, 17, 17, 14),
    7: (31, 1, 2, 4, 8, 8, 8),
    8: (14, 17, 17, 14, 17, 17, 14),
    9: (14, 17, 17, 15, 1, 2, 12),
}


def draw_digits(count: int, seed: int, noise: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` images (1 × 28 × 28) of digits at random places, in noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([GLYPHS[digit] for digit in range(10)])
    small = (rows[:, :, None] >> torch.arange(4, -1, -1)) & 1
    glyphs = small.float().repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)  # 21 × 15
    labels = torch.randint(0, 10, (count,), generator=generator)
    images = torch.randn(count, 1, 28, 28, generator=generator) * noise
    tops = torch.randint(0, 8, (count,), generator=generator).tolist()
    lefts = torch.randint(0, 14, (count,), generator=generator).tolist()
    for image, label, top, left in zip(images, labels.tolist(), tops, lefts):
        image[0, top : top + 21, left : left + 15] += glyphs[label]
    return images, labels


class Residual(nn.Module):
    """Two convolutions around a shortcut; the first may halve the image."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(hidden + self.shortcut(x))


def resnet(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(4 * width, 10),
    )


class Sampler:
    """Endless shuffled batches; draws from a generator of its own, which is part of its state."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch: int, seed: int):
        self.images, self.labels, self.batch = images, labels, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Sampler:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(0, len(self.labels), (self.batch,), generator=self.generator)
        return self.images[chosen], self.labels[chosen]

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--steps", type=int, default=200)
    option("--dir", default="checkpoints-resnet/", help="where the checkpoints go")
    option("--every", type=int, default=1, help="optimizer steps from one checkpoint to the next")
    option("--batch", type=int, default=64)
    option("--width", type=int, default=16, help="channels of the first convolution")
    option("--lr", type=float, default=0.1, help="the highest learning rate of the cycle")
    option("--seed", type=int, default=0)
    return parser.parse_args()


def train(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    model = resnet(args.width)
    batches = Sampler(*draw_digits(4096, seed=1), args.batch, args.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1)

    forward = torch.compile(model, backend=fxckpt.backend)
    optimizer = fxckpt.compile_step(
        optimizer, args.dir, model=model, every=args.every, extra={"scheduler": scheduler, "batches": batches}
    )
    fxckpt.load()
    for step in fxckpt.steps(args.steps):
        began = time.perf_counter()
        images, labels = next(batches)
        loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        show(
            f"step {step + 1}/{args.steps}  loss {loss.item():.4f}  "
            f"{(time.perf_counter() - began) * 1e3:.1f} ms  "
            f"committed {optimizer.ckpt.statistics()['last_committed_step']}"
        )
    optimizer.ckpt.flush()
    return model


def main() -> None:
    model = train(arguments()).eval()
    images, labels = draw_digits(1024, seed=2)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"\naccuracy on 1024 new digits: {accuracy:.1%}")
    print("model sha256", digest(model.state_dict()))


if __name__ == "__main__":
    main()
