"""Train a diffusion model with an average of its weights; killed at any instant, the same command goes on with the same bits.

    python examples/train_diffusion.py

It learns to draw points of a spiral. Samples come from the average, which is in ``extra=`` as any object with a state is.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxckpt

STEPS, TIMES, BATCH = 160, 20, 64
KEPT = torch.cumprod(1 - torch.linspace(0.01, 0.35, TIMES), 0)  # of the signal, after so many times of noise


def spiral(count: int) -> torch.Tensor:
    """What is to be learned."""
    turn = torch.rand(count).sqrt() * 9
    return torch.stack([turn.cos(), turn.sin()], 1) * (turn / 9).unsqueeze(1)


class Denoiser(nn.Module):
    """The noise in points that have been noised for ``t`` times."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(TIMES, 64)
        self.inside = nn.Linear(2, 64)
        self.out = nn.Sequential(nn.SiLU(), nn.Dropout(0.05), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.out(self.inside(x) + self.time(t))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    t = torch.randint(TIMES, (len(x),))
    noise, kept = torch.randn_like(x), KEPT[t].unsqueeze(1)
    return F.mse_loss(model(kept.sqrt() * x + (1 - kept).sqrt() * noise, t), noise)


@torch.no_grad()
def samples(model: nn.Module, count: int) -> torch.Tensor:
    """Points drawn from noise, a little less of it each time."""
    x = torch.randn(count, 2)
    for t in reversed(range(TIMES)):
        kept, before = KEPT[t], KEPT[t - 1] if t else torch.ones(())
        noise = model(x, torch.full((count,), t))
        x = before.sqrt() * ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1.2, 1.2) + (1 - before).sqrt() * noise
    return x


def main() -> None:
    torch.manual_seed(0)
    model = Denoiser()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=True)
    warmup = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=20)

    fxckpt.compile_step(opt, "ckpt", model=model, every=1, extra={"ema": ema, "warmup": warmup})
    fxckpt.load()
    for step in fxckpt.steps(STEPS):
        loss = loss_of(model, spiral(BATCH))
        opt.zero_grad()
        loss.backward()
        opt.step()
        warmup.step()
        ema.update_parameters(model)
        if step % 40 == 39:
            drawn = samples(ema.eval(), 256)
            print(
                f"step {step + 1}: loss {loss.item():.3f}, samples are {drawn.norm(dim=1).mean():.2f} from the middle", flush=True
            )
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, "last.pt")


if __name__ == "__main__":
    main()
