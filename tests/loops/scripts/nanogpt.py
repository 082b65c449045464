"""After nanoGPT's train.py: the next batch is fetched between forward and backward, with accumulation and evaluation."""

from __future__ import annotations

import math

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F

import fxckpt  # fxckpt

BLOCK, BATCH, ACCUMULATE, MAX_ITERS, EVAL_INTERVAL, WARMUP, LR = 8, 4, 2, 20, 7, 4, 1e-2

torch.manual_seed(1337)
text = torch.randint(0, 13, (400,), generator=torch.Generator().manual_seed(1)).cumsum(0) % 13
train_data, val_data = text[:320], text[320:]


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (part.view(b, t, 2, c // 2).transpose(1, 2) for part in self.attn(self.ln_1(x)).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.proj(y)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 13, width: int = 16, layers: int = 2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(BLOCK, width)
        self.drop, self.ln_f = nn.Dropout(0.1), nn.LayerNorm(width)
        self.h = nn.ModuleList(Block(width) for _ in range(layers))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.shape[1])))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def get_batch(split: str):
    data = train_data if split == "train" else val_data
    ix = torch.randint(len(data) - BLOCK, (BATCH,))
    return torch.stack([data[i : i + BLOCK] for i in ix]), torch.stack([data[i + 1 : i + 1 + BLOCK] for i in ix])


@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ("train", "val"):
        out[split] = sum(model(*get_batch(split))[1].item() for _ in range(2)) / 2
    model.train()
    return out


def get_lr(it: int) -> float:
    if it < WARMUP:
        return LR * (it + 1) / (WARMUP + 1)
    return LR * 0.1 + 0.45 * LR * (1.0 + math.cos(math.pi * (it - WARMUP) / (MAX_ITERS - WARMUP)))


raw_model = GPT()
decay = [p for p in raw_model.parameters() if p.dim() >= 2]
no_decay = [p for p in raw_model.parameters() if p.dim() < 2]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
model = torch.compile(raw_model, backend=fxckpt.backend, options={"inner": "eager"})  # fxckpt, was: model = raw_model
best = {"val": 1e9}
carried = {"batch": get_batch("train")}  # fxckpt, was: X, Y = get_batch("train")
fxckpt.compile_step(optimizer, "ckpt", model=raw_model, every=1, extra={"best": best, "carried": carried})  # fxckpt
fxckpt.load()  # fxckpt
for iter_num in fxckpt.steps(MAX_ITERS):  # fxckpt, was: for iter_num in range(MAX_ITERS):
    X, Y = carried["batch"]  # fxckpt
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iter_num)
    if iter_num % EVAL_INTERVAL == 0:
        losses = estimate_loss()
        best["val"] = min(best["val"], losses["val"])
        print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    for _micro_step in range(ACCUMULATE):
        logits, loss = model(X, Y)
        loss = loss / ACCUMULATE
        X, Y = carried["batch"] = get_batch("train")  # fxckpt, was: X, Y = get_batch("train")
        loss.backward()
    torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

print(f"END loss {loss.item():.6f} best {best['val']:.6f}")
finish(raw_model, optimizer, best)
