"""Train with Lightning's Trainer; killed at any step, the same command goes on with the same bits.

    python examples/train_lightning.py

The model tells how fast a noisy sine swings. What fxckpt needs are an import and one callback.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxckpt.lightning


class Waves(Dataset):
    """Noisy sines: what is to be found is their frequency. The noise is drawn each time that one is read."""

    def __init__(self, count: int, seed: int):
        self.frequency = 1 + 3 * torch.rand(count, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.frequency)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sin(self.frequency[i] * torch.linspace(0, 6, 32)) + 0.1 * torch.randn(32), self.frequency[i]


class Frequencies(lightning.LightningModule):
    """A small network, its loss and its schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1), nn.Flatten(0))

    def training_step(self, batch: Any, i: int) -> torch.Tensor:
        waves, frequencies = batch
        loss = nn.functional.mse_loss(self.layers(waves).float(), frequencies)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, i: int) -> None:
        waves, frequencies = batch
        self.log("error", (self.layers(waves) - frequencies).abs().mean())

    def configure_optimizers(self) -> Any:
        opt = torch.optim.AdamW(self.parameters(), lr=3e-3, foreach=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=60)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    lightning.seed_everything(0)
    model = Frequencies()
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        callbacks=[
            fxckpt.lightning.Checkpoint("ckpt", every=1),
            ModelCheckpoint("best", monitor="error"),
            EarlyStopping("error", patience=3),
        ],
    )
    train, test = DataLoader(Waves(160, seed=1), 8, shuffle=True), DataLoader(Waves(64, seed=2), 32)
    trainer.fit(model, train, test)
    torch.save(model.state_dict(), "last.pt")


if __name__ == "__main__":
    main()
