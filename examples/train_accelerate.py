"""Train with Accelerate: mixed precision, gradient accumulation, a schedule; killed at any step, the same command goes on.

python examples/train_accelerate.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxckpt


class Waves(Dataset):
    """Noisy sines: what is to be found is their frequency. The noise is drawn each time that one is read."""

    def __init__(self, count: int, seed: int):
        self.frequency = 1 + 3 * torch.rand(count, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.frequency)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sin(self.frequency[i] * torch.linspace(0, 6, 32)) + 0.1 * torch.randn(32), self.frequency[i]


def main() -> None:
    set_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1), nn.Flatten(0))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=60)
    train, test = DataLoader(Waves(160, seed=1), 8, shuffle=True), DataLoader(Waves(64, seed=2), 32)
    model, opt, scheduler, train, test = accelerator.prepare(model, opt, scheduler, train, test)

    fxckpt.compile_step(opt, "ckpt", model=model, every=1, extra={"scheduler": scheduler})
    fxckpt.load()
    for epoch in fxckpt.epochs(6):
        model.train()
        for waves, frequencies in fxckpt.batches(train):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(waves).float(), frequencies))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                scheduler.step()
                opt.zero_grad()
        model.eval()
        with torch.no_grad():
            error = sum((model(waves) - frequencies).abs().sum().item() for waves, frequencies in test) / len(test.dataset)
        accelerator.print(f"epoch {epoch}: off by {error:.3f}", flush=True)
    accelerator.save(accelerator.unwrap_model(model).state_dict(), "last.pt")


if __name__ == "__main__":
    main()
