"""Buffers and frozen parameters that a script replaces behind a step, not in place, are in its checkpoint as they are then."""

from __future__ import annotations

import pytest
import torch
from journal_lives import Life
from torch import nn

import fxckpt


class Averaged(nn.Module):
    """With an average of its weights in a buffer, in one that no state dict has, and in a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        for name, persistent in (("kept", True), ("transient", False)):
            self.register_buffer(name, torch.zeros(2), persistent)
        self.fixed = nn.Parameter(torch.zeros(2), requires_grad=False)

    def __getitem__(self, index):
        return self.inner[index]

    def forward(self, x):
        return self.inner(x)


def make(params, lr):
    return torch.optim.AdamW([p for p in params if p.requires_grad], lr=lr)


def kept(life, step):
    life.model.kept = 0.5 * life.model.kept + life.model[2].bias.detach()


def resized(life, step):
    life.model.kept = torch.full((2 + step % 2,), float(step))


def transient(life, step):
    life.model.transient = 0.5 * life.model.transient + life.model[2].bias.detach()


def fixed(life, step):
    if step % 2:
        average = 0.5 * life.model.fixed.detach() + life.model[2].bias.detach()
        life.model.fixed = nn.Parameter(average, requires_grad=False)


def both(life):
    return life.model.kept, life.model.transient, life.model.fixed


CASES = [
    *((change, "bounded", journal) for change in (kept, transient, fixed) for journal in (1, 6)),
    *((change, "plain", journal) for change in (kept, transient) for journal in (1, 6)),
    (resized, "bounded", 1),
]
"""In a plain loop only what fits into the place of what it replaces; no model loads a checkpoint of other shapes."""


@pytest.mark.parametrize(("change", "loop", "journal"), CASES)
def test_what_replaces_it_behind_the_step_is_in_the_checkpoint_of_the_step(root, one_thread, monkeypatch, change, loop, journal):
    seen = {}

    def between(life, step):
        change(life, step)
        seen[step + 1] = [each.clone() for each in both(life)]

    life = Life(root, make, model=Averaged, between=between, journal=journal, keep=9)
    if loop == "plain":
        monkeypatch.setattr(fxckpt, "steps", range)
    life.train(7)
    life.opt.ckpt.flush()
    life.end()
    for step in (5, 6, 7) if change is not resized else (5, 7):  # the shape of a new model's is that of these
        again = Life(root, make, model=Averaged, journal=journal, keep=9, load={"step": step})
        assert again.restored.step == step and again.at == life.states[step]
        assert all(torch.equal(a, b) for a, b in zip(both(again), seen[step]))
        again.end()
