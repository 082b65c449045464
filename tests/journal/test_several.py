"""Several optimizers in one run with a journal: a record holds the step of each that stepped, and they are made again with the
bits that training had."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from digests import digest
from journal_lives import journalled, net, whole
from torch import nn

import fxckpt
from fxckpt.store.journaled import durable_steps
from fxckpt.store.reader import candidates, records

STEPS = 16


class Pair(nn.Module):
    """A generator and a discriminator."""

    def __init__(self):
        super().__init__()
        self.g = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
        self.d = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Tanh(), nn.Linear(6, 1))


@dataclass(frozen=True)
class Case:
    """A training: its model, its optimizers, one turn of it, and which of its steps, counted from the first record on, are no
    records. ``order``: the optimizers of most records."""

    model: Callable[[], nn.Module]
    make: Callable[[Any], list[torch.optim.Optimizer]]
    turn: Callable[[Life, int], object]
    order: Sequence[tuple[int, ...]]


class Life:
    """One life of a case, which begins with a load. ``states`` after each step, by its number; ``at`` what a load gave."""

    def __init__(self, root: Path, case: Case, *, boundaries: bool, load: dict[str, Any] | None = None, **options: Any):
        torch.manual_seed(0)
        self.case, self.boundaries = case, boundaries
        self.model = case.model()
        self.opts = case.make(self.model)
        self.schedulers = [torch.optim.lr_scheduler.ExponentialLR(self.opts[0], 0.95)]
        self.schedulers += [torch.optim.lr_scheduler.OneCycleLR(each, 0.02, total_steps=200) for each in self.opts[1:]]
        self.scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4) for _ in self.opts]
        options = {"every": 1, "keep": 9, "journal": 6, "update": "native", **options}
        self.before: Callable[[int], object] = lambda step: None
        kept = {"schedulers": self.schedulers, **{f"scaler{i}": each for i, each in enumerate(self.scalers)}}
        fxckpt.compile_step(self.opts, root, model=self.model, extra=kept, **options)
        self.restored = fxckpt.load(**(load or {}))
        self.at = self.now()
        self.states: dict[int, str] = {}

    @property
    def run(self) -> Any:
        return self.opts[0].ckpt

    def now(self) -> str:
        """A digest of model, optimizers, schedulers and scalers."""
        return digest(self.model, *(dict(opt.state_dict().items()) for opt in self.opts), *self.schedulers,
                      *(each.state_dict() for each in self.scalers))  # fmt: skip

    def numbers(self, upto: int) -> Iterator[int]:
        yield from fxckpt.steps(upto) if self.boundaries else range(self.run.statistics()["steps"], upto)

    def train(self, upto: int) -> Life:
        """Make steps until there are so many."""
        for step in self.numbers(upto):
            self.before(step)
            self.case.turn(self, step)
            for each in self.schedulers:
                each.step()
            self.states[step + 1] = self.now()
        return self

    def end(self) -> Life:
        self.run.shutdown()
        return self


def of_matrices_and_others(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The weights of a module and its bias have different ones."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [torch.optim.RMSprop(matrices, lr=1e-3, momentum=0.9), torch.optim.AdamW(others, lr=1e-2)]


def both_at_once(life: Life, step: int) -> None:
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    nn.utils.clip_grad_norm_(life.model.parameters(), 0.5)
    if step % 3 == 2:
        life.model[0].bias.grad = None
    for opt in life.opts:
        opt.step()
    for opt in life.opts:
        opt.zero_grad()


def second_now_and_then(life: Life, step: int) -> None:
    """The first steps in each turn, behind it the second in every third, with what was accumulated."""
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    life.opts[0].step()
    life.opts[0].zero_grad()
    if step % 3 == 1:
        life.opts[1].step()
        life.opts[1].zero_grad()


def first_now_and_then(life: Life, step: int) -> None:
    """The other way round: in a loop without boundaries the last one of the list steps last."""
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    for number in (0, 1) if step % 3 == 1 else (1,):
        life.opts[number].step()
        life.opts[number].zero_grad()


def of_the_pair(model: Pair) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.d.parameters(), lr=1e-2, momentum=0.9), torch.optim.Adam(model.g.parameters(), lr=1e-2)]


def in_turns(life: Life, step: int) -> None:
    """As in the usual script: the generator's backward adds to the gradients that the discriminator's step used."""
    model, (d, g) = life.model, life.opts
    d.zero_grad()
    fake = model.g(torch.randn(5, 3))
    (model.d(torch.randn(5, 4)).mean() - model.d(fake.detach()).mean()).backward()
    d.step()
    g.zero_grad()
    model.d(fake).mean().backward()
    g.step()


def clipped_weights(life: Life, step: int) -> None:
    """The discriminator's weights are clamped between the two steps."""
    model, (d, g) = life.model, life.opts
    (model.d(torch.randn(5, 4)).mean() - model.d(model.g(torch.randn(5, 3)).detach()).mean()).backward()
    d.step()
    with torch.no_grad():
        model.d[0].weight.clamp_(-0.3, 0.3)
    d.zero_grad()
    model.d(model.g(torch.randn(5, 3))).mean().backward()
    g.step()
    for opt in (d, g):
        opt.zero_grad()


def scaled(life: Life, step: int) -> None:
    """Each with a scaler; now and then there is an inf in the gradients of one only, or in both."""
    life.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
    for number, (opt, scaler) in enumerate(zip(life.opts, life.scalers)):
        scaler.scale(torch.zeros(()))
        if step % 7 in (number + 2, 5):
            opt.param_groups[0]["params"][0].grad.view(-1)[0] = float("inf")
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()


CASES = {
    "both": Case(net, of_matrices_and_others, both_at_once, [(0, 1)]),
    "second now and then": Case(net, of_matrices_and_others, second_now_and_then, [(0,), (0, 1)]),
    "first now and then": Case(net, of_matrices_and_others, first_now_and_then, [(1,), (0, 1)]),
    "in turns": Case(Pair, of_the_pair, in_turns, [(0, 1)]),
    "clamped": Case(Pair, of_the_pair, clipped_weights, [(0, 1)]),
    "scaled": Case(net, of_matrices_and_others, scaled, [(0, 1), (0,), (1,)]),
}
PLAIN = [name for name in CASES if name != "second now and then"]


def orders(root: Path) -> set[tuple[int, ...]]:
    return {whole(each).record.journal.order for each in records(root)}


@pytest.mark.parametrize(
    ("case", "boundaries"), [*((name, True) for name in CASES), *((name, False) for name in PLAIN)], ids=str
)
def test_every_step_of_two_optimizers_goes_on_with_the_bits_of_a_run_without_a_journal(root, one_thread, case, boundaries):
    def life(place: str, **options: Any) -> Life:
        return Life(root / place, CASES[case], boundaries=boundaries, **options)

    stock = life("stock", journal=1).train(STEPS).end()
    through = life("through", journal=6).train(STEPS).end()
    assert through.states == stock.states
    steps = durable_steps(root / "through")
    print(case, boundaries, sorted(whole(each).record.step for each in candidates(root / "through")), orders(root / "through"), journalled(root / "through"))
    for step in steps[-7:]:
        shutil.copytree(root / "through", root / f"from {step}")
        found = life(f"from {step}", load={"step": step})
        assert found.restored.step == step and found.at == stock.states[step], step
        found.train(STEPS).end()
        assert found.states == {at: state for at, state in stock.states.items() if at > step}, step
