"""Train a small GPT on the sources of Python's standard library, with a checkpoint at every step.

Run it, kill it at any moment, run the same command again: it goes on from the newest committed step, and the
two digests it prints at the end are those of a run that was never interrupted.

    python examples/train_gpt.py --steps 300 --dir checkpoints/
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fxckpt

VOCABULARY = 256  # bytes


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + F.dropout(self.proj(mixed.reshape(batch, length, width)), self.p, self.training)
        hidden = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(hidden, self.p, self.training)


class GPT(nn.Module):
    """Byte-level GPT; the output layer shares its weight with the token embedding."""

    def __init__(self, layers: int, width: int, heads: int, length: int, dropout: float = 0.1):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), y.flatten())


class Batches:
    """Endless shuffled windows of a text. Its whole state is the epoch and the position in it."""

    def __init__(self, text: torch.Tensor, batch: int, length: int, seed: int):
        self.text, self.batch, self.length, self.seed = text, batch, length, seed
        self.epoch, self.position = 0, 0
        self._shuffle()

    def _shuffle(self) -> None:
        windows = (len(self.text) - 1) // self.length
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.order = torch.randperm(windows, generator=generator)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.position + self.batch > len(self.order):
            self.epoch, self.position = self.epoch + 1, 0
            self._shuffle()
        starts = self.order[self.position : self.position + self.batch] * self.length
        self.position += self.batch
        at = starts[:, None] + torch.arange(self.length + 1)
        window = self.text[at].long()
        return window[:, :-1], window[:, 1:]

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._shuffle()


def standard_library(limit: int = 4 << 20) -> torch.Tensor:
    """The bytes of the standard library's top-level modules, sorted by name, at most ``limit`` of them."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in sources)[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bits."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's state, by parameter name and key."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if torch.is_tensor(value)
    }


def show(line: str) -> None:
    """One progress line: rewritten in place on a terminal, one below the other in a file or pipe."""
    terminal = sys.stdout.isatty()
    print(f"\r{line:<78}" if terminal else line, end="" if terminal else "\n", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--steps", type=int, default=300)
    option("--dir", default="checkpoints/", help="where the checkpoints go")
    option("--every", type=int, default=1, help="optimizer steps from one checkpoint to the next")
    option("--no-checkpoint", action="store_true", help="plain PyTorch, without fxckpt")
    option("--layers", type=int, default=4)
    option("--width", type=int, default=256)
    option("--heads", type=int, default=4)
    option("--length", type=int, default=128, help="bytes in a sequence")
    option("--batch", type=int, default=4, help="sequences in a batch")
    option("--dropout", type=float, default=0.1)
    option("--lr", type=float, default=1e-3)
    option("--warmup", type=int, default=50, help="steps until the learning rate is reached")
    option("--seed", type=int, default=0)
    option("--threads", type=int, default=0, help="of PyTorch; 0 leaves its own choice")
    return parser.parse_args()


def train(args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The training loop; the lines that mention ``fxckpt`` are all that checkpointing takes."""
    torch.manual_seed(args.seed)
    model = GPT(args.layers, args.width, args.heads, args.length, args.dropout)
    batches = Batches(standard_library(), args.batch, args.length, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup))

    if args.no_checkpoint:
        forward, start = torch.compile(model), 0
    else:
        forward = torch.compile(model, backend=fxckpt.backend)
        optimizer = fxckpt.compile_step(
            optimizer, args.dir, model=model, every=args.every, extra={"scheduler": scheduler, "batches": batches}
        )
        start = fxckpt.load().step

    for step in range(start, args.steps):
        began = time.perf_counter()
        x, y = next(batches)
        loss = forward(x, y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        line = f"step {step + 1}/{args.steps}  loss {loss.item():.4f}  "
        line += f"{(time.perf_counter() - began) * 1e3:.1f} ms"
        if not args.no_checkpoint:
            line += f"  committed {optimizer.ckpt.statistics()['last_committed_step']}"
        show(line)
    return model, optimizer


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    # Without it the embedding's gradient is summed with atomics: the same run twice differs in its last bits.
    torch.use_deterministic_algorithms(True)
    model, optimizer = train(args)
    print()
    if not args.no_checkpoint:
        optimizer.ckpt.flush()
        done = optimizer.ckpt.statistics()
        print(
            f"checkpoints committed {done['checkpoints_committed']}  bytes {done['bytes_written']}  "
            f"stalled {done['stall_seconds']:.2f} s"
        )
    print("parameters sha256", digest(dict(model.named_parameters())))
    print("optimizer  sha256", digest(optimizer_tensors(model, optimizer)))


if __name__ == "__main__":
    main()
