"""After minGPT's Trainer: a loader that never ends, an iterator that is asked by hand, callbacks, and a `break` at the end."""

from __future__ import annotations

from collections import defaultdict

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

import fxckpt  # fxckpt


class SortDataset(Dataset):
    """Sequences of digits, followed by the same digits sorted."""

    def __len__(self):
        return 500

    def __getitem__(self, i):
        digits = torch.randint(3, (4,))
        both = torch.cat([digits, digits.sort().values])
        return both[:-1], torch.where(torch.arange(7) < 3, -1, both[1:])


class GPT(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(3, width), nn.Parameter(torch.zeros(7, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 24, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 3)
        self.register_buffer("mask", torch.full((7, 7), float("-inf")).triu(1))

    def forward(self, x, y):
        logits = self.head(self.block(self.tokens(x) + self.positions, self.mask))
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


class Trainer:
    def __init__(self, model: nn.Module, train_dataset: Dataset, max_iters: int):
        self.model, self.train_dataset, self.max_iters = model, train_dataset, max_iters
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), foreach=True)
        self.callbacks = defaultdict(list)
        self.iter_num = 0

    def add_callback(self, onevent: str, callback):
        self.callbacks[onevent].append(callback)

    def trigger_callbacks(self, onevent: str):
        for callback in self.callbacks[onevent]:
            callback(self)

    def run(self):
        sampler = RandomSampler(self.train_dataset, replacement=True, num_samples=int(1e10))
        train_loader = DataLoader(self.train_dataset, sampler=sampler, batch_size=8)
        self.model.train()
        fxckpt.compile_step(self.optimizer, "ckpt", model=self.model, every=1, extra={"curve": curve})  # fxckpt
        self.iter_num = fxckpt.load().iteration  # fxckpt, was: self.iter_num = 0
        data_iter = iter(fxckpt.batches(train_loader))  # fxckpt, was: data_iter = iter(train_loader)
        while True:
            try:
                batch = next(data_iter)
            except StopIteration:
                data_iter = iter(train_loader)
                batch = next(data_iter)
            _, self.loss = self.model(*batch)
            self.model.zero_grad(set_to_none=True)
            self.loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.trigger_callbacks("on_batch_end")
            self.iter_num += 1
            if self.iter_num >= self.max_iters:
                break


def batch_end_callback(trainer: Trainer):
    if trainer.iter_num % 5 == 0:
        trainer.model.eval()
        with torch.no_grad():
            test = [trainer.train_dataset[i] for i in range(10)]
            _, loss = trainer.model(torch.stack([x for x, _ in test]), torch.stack([y for _, y in test]))
        curve.append((trainer.iter_num, loss.item()))
        trainer.model.train()


torch.manual_seed(3407)
curve: list[tuple[int, float]] = []
trainer = Trainer(GPT(), SortDataset(), max_iters=30)
trainer.add_callback("on_batch_end", batch_end_callback)
trainer.run()
print(f"END iter {trainer.iter_num} loss {trainer.loss.item():.6f} curve {curve}")
finish(trainer.model, trainer.optimizer, curve)
