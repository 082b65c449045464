"""Draw the layer graph of a small GPT as docs/graph.svg, with the sizes and times of twenty steps on this machine.

python tools/draw_graph.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fxckpt

WIDTH, VOCABULARY, LENGTH, DEPTH = 256, 1024, 64, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    """The output layer is the token embedding: one tensor, final when its first use, the embedding, is behind."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(LENGTH))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.head(self.ln_f(x))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def graph(steps: int):
    """The StepGraph after so many steps; nothing is compiled behind the backend and nothing is written to disk."""
    torch.manual_seed(0)
    plain = GPT()
    model = torch.compile(plain, backend=fxckpt.backend, options={"inner": "eager"})
    opt = fxckpt.compile_step(torch.optim.AdamW(plain.parameters(), fused=True), model=plain, every=1, writer="mock")
    for _ in range(steps):
        model(torch.randint(VOCABULARY, (2, LENGTH))).backward()
        opt.step()
        opt.zero_grad()
    return opt.ckpt.graph


if __name__ == "__main__":
    torch.set_num_threads(1)  # the picture shows small tensors, which more threads do not make faster
    path = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).resolve().parent.parent / "docs" / "graph.svg")
    found = graph(20)
    found.draw(path)
    print(found.table())
