"""After LoRA fine-tuning: a frozen base, adapters with dropout, accumulation over the batches of an epoch, linear warm-up."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import fxckpt  # fxckpt

ACCUMULATE, EPOCHS, BATCHES = 4, 4, 10


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.1)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(self.dropout(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(15, 12), nn.LayerNorm(12), nn.Linear(12, 15)
        self.q, self.v = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + F.scaled_dot_product_attention(self.q(x), x, self.v(x), is_causal=True)
        return self.head(self.norm(x))


torch.manual_seed(0)
model = Model().requires_grad_(False)
model.q, model.v = LoRALinear(model.q), LoRALinear(model.v)
tokens = torch.randint(0, 15, (40, 9), generator=torch.Generator().manual_seed(1)).cumsum(1) % 15
loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=4, shuffle=True)
trainable = [p for p in model.parameters() if p.requires_grad]
opt = torch.optim.AdamW(trainable, lr=3e-2, weight_decay=0.0)
scheduler = LambdaLR(opt, lambda step: min(1.0, (step + 1) / 4))
extra = {"scheduler": scheduler}  # fxckpt
fxckpt.compile_step(opt, "ckpt", model=model, every=1, update="native", extra=extra)  # fxckpt
fxckpt.load()  # fxckpt
model.train()
for _epoch in fxckpt.epochs(EPOCHS):  # fxckpt, was: for _epoch in range(EPOCHS):
    batches = enumerate(fxckpt.batches(loader), start=opt.ckpt.batch)  # fxckpt, was: batches = enumerate(loader)
    for step, (inputs, labels) in batches:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
        (loss / ACCUMULATE).backward()
        if (step + 1) % ACCUMULATE == 0 or step + 1 == BATCHES:
            opt.step()
            scheduler.step()
            opt.zero_grad()
print(f"END loss {loss.item():.6f} lr {scheduler.get_last_lr()}")
finish(model, opt, scheduler)
