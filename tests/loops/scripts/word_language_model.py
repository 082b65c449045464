"""After the word-level language model: a hidden state carried from batch to batch, lr divided when validation is no better."""

from __future__ import annotations

import copy

import torch
from script_prelude import finish
from torch import nn

import fxckpt  # fxckpt

BPTT, BATCH, EPOCHS, WORDS = 5, 4, 5, 20


class RNNModel(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(WORDS, width)
        self.rnn = nn.LSTM(width, width, 2, dropout=0.2)
        self.decoder = nn.Linear(width, WORDS)

    def forward(self, words, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(words)), hidden)
        return self.decoder(self.drop(output)).view(-1, WORDS), hidden

    def init_hidden(self, batch: int):
        return torch.zeros(2, batch, 12), torch.zeros(2, batch, 12)


def batchify(data, batch: int):
    return data[: len(data) // batch * batch].view(batch, -1).t().contiguous()


def get_batch(source, i: int):
    length = min(BPTT, len(source) - 1 - i)
    return source[i : i + length], source[i + 1 : i + 1 + length].reshape(-1)


def evaluate():
    model.eval()
    hidden, total = model.init_hidden(BATCH), 0.0
    with torch.no_grad():
        for i in range(0, len(val_data) - 1, BPTT):
            data, targets = get_batch(val_data, i)
            output, hidden = model(data, hidden)
            total += len(data) * criterion(output, targets).item()
    return total / (len(val_data) - 1)


def train():
    model.train()
    fresh = model.init_hidden(BATCH)
    carried["hidden"] = carried["hidden"] if opt.ckpt.batch else fresh  # fxckpt, was: carried["hidden"] = fresh
    for i in fxckpt.batches(range(0, len(train_data) - 1, BPTT)):  # fxckpt, was: for i in range(0, len(train_data) - 1, BPTT):
        data, targets = get_batch(train_data, i)
        opt.zero_grad()
        hidden = tuple(h.detach() for h in carried["hidden"])
        output, carried["hidden"] = model(data, hidden)
        loss = criterion(output, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        opt.step()


torch.manual_seed(1111)
text = torch.randint(0, WORDS, (300,), generator=torch.Generator().manual_seed(1))
train_data, val_data = batchify(text[:180], BATCH), batchify(text[180:], BATCH)
model, criterion = RNNModel(), nn.CrossEntropyLoss()
opt = torch.optim.SGD(model.parameters(), lr=60.0)
carried, best = {}, {"val_loss": None, "model": None}
extra = {"carried": carried, "best": best}  # fxckpt
fxckpt.compile_step(opt, "ckpt", model=model, every=1, update="native", extra=extra)  # fxckpt
fxckpt.load()  # fxckpt
for epoch in fxckpt.epochs(EPOCHS):  # fxckpt, was: for epoch in range(EPOCHS):
    train()
    val_loss = evaluate()
    print(f"| end of epoch {epoch} | valid loss {val_loss:.4f}")
    if not best["val_loss"] or val_loss < best["val_loss"]:
        best.update(val_loss=val_loss, model=copy.deepcopy(model.state_dict()))
    else:
        opt.param_groups[0]["lr"] /= 4.0
final = copy.deepcopy(model.state_dict())
model.load_state_dict(best["model"])
print(f"END lr {opt.param_groups[0]['lr']} valid loss {evaluate():.6f}")
finish(final, model, opt, best["val_loss"], *carried["hidden"])
