"""Small models and the data that they learn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fxckpt


def mlp(width: int = 16) -> nn.Sequential:
    """With dropout, so that the random state matters."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 4))


def eager(model: nn.Module) -> nn.Module:
    """Through our backend, with nothing compiled behind it: fast where compiled code is not the point."""
    return torch.compile(model, backend=fxckpt.backend, options={"inner": "eager"})


def conv() -> nn.Sequential:
    """With BatchNorm: its running statistics change in the forward; weights in channels_last order."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(8, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    return model.to(memory_format=torch.channels_last)


class GPT(nn.Module):
    """One block of a transformer; the output layer is the embedding. Classifies the first of its tokens' successor."""

    def __init__(self, vocabulary: int = 11, width: int = 16):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(6, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.tokens(x) + self.positions)[:, -1])


def frozen() -> nn.Sequential:
    """A pretrained part that is not trained, a norm that only collects statistics, and a head."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    model[:2].requires_grad_(False)
    return model


class Loader:
    """Endless shuffled batches of 8 from a data set of 50: iterable, with a generator and a position as its state."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, seed: int = 1):
        self.inputs, self.targets = inputs, targets
        self.generator, self.order, self.at = torch.Generator().manual_seed(seed), [], 0

    @classmethod
    def of(cls, *shape: int, classes: int = 4) -> Loader:
        g = torch.Generator().manual_seed(2)
        return cls(torch.randn(50, *shape, generator=g), torch.randint(0, classes, (50,), generator=g))

    @classmethod
    def of_tokens(cls, vocabulary: int = 11) -> Loader:
        g = torch.Generator().manual_seed(2)
        text = torch.randint(0, vocabulary, (50, 7), generator=g)
        return cls(text[:, :-1], text[:, -1])

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.at + 8 > len(self.order):
            self.order, self.at = torch.randperm(50, generator=self.generator).tolist(), 0
        chosen = self.order[self.at : self.at + 8]
        self.at += 8
        return self.inputs[chosen], self.targets[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": list(self.order), "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.at = list(state["order"]), state["at"]
