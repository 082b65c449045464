"""Turns of chance over three optimizers with a journal: whichever step, in whichever order, and whatever a script does between
them, each durable step has the bits of a run without a journal.

``FXCKPT_TURNS`` says how many trainings are made up (2); a failure names the seed of its own.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from digests import digest
from journal_lives import journalled, net

import fxckpt
from fxckpt.store.journaled import durable_steps

TRAININGS = int(os.environ.get("FXCKPT_TURNS", "2"))
TURNS = 18


class Life:
    """One life, which begins with a load. What its turns do hangs on the seed and on their number, so all lives do the same.
    ``states`` after each turn, by the steps there were; ``saved`` the steps that a named save in the middle of a turn has."""

    def __init__(self, root: Path, seed: int, step: int | None = None, **options):
        torch.manual_seed(seed)
        self.seed, self.model = seed, net()
        params = list(self.model.parameters())
        random.Random(seed).shuffle(params)
        self.opts = [
            torch.optim.AdamW(params[:3], lr=1e-2),
            torch.optim.SGD(params[3:5], lr=1e-2, momentum=0.9),
            torch.optim.Adafactor(params[5:], lr=1e-2),
        ]
        options = {"every": 1, "keep": 30, "journal": 6, "update": "native", **options}
        fxckpt.compile_step(self.opts, root, model=self.model, **options)
        self.restored = fxckpt.load() if step is None else fxckpt.load(step=step)
        self.at, self.states, self.saved = self.now(), {}, set[int]()

    def now(self) -> str:
        found = [opt.state_dict() for opt in self.opts]  # a load makes states in the parameters' order
        return digest(self.model, *({**each, "state": dict(sorted(each["state"].items()))} for each in found))

    def train(self) -> Life:
        for turn in fxckpt.steps(TURNS):
            self.turn(random.Random(f"{self.seed} {turn}"))
            self.states.setdefault(self.opts[0].ckpt.statistics()["steps"], self.now())
        return self

    def turn(self, chance: random.Random) -> None:
        """Some of the optimizers, with a backward before each, and now and then something between them."""
        order = chance.choices(
            [[0, 1, 2], [0, 1], [2, 1, 0], [1], [2], [0, 2, 0], []], weights=[6, 3, 3, 2, 2, 1, 1]
        )[0]  # fmt: skip
        self.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        for number in order:
            self.between(chance)
            if chance.random() < 0.4:
                self.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
            self.opts[number].step()
            if chance.random() < 0.7:
                self.opts[number].zero_grad(set_to_none=chance.random() < 0.7)
        if order:  # a turn without a step is none that a checkpoint is taken of
            self.between(chance)

    def between(self, chance: random.Random) -> None:
        """Most often nothing."""
        params = [p for opt in self.opts for group in opt.param_groups for p in group["params"]]
        what, param = chance.random(), chance.choice(params)
        if what < 0.04:
            with torch.no_grad():
                param.mul_(0.9)
        elif what < 0.10:
            param.grad = None
        elif what < 0.13 and param.grad is not None:
            param.grad.mul_(0.5)
        elif what < 0.20:
            chance.choice(self.opts).param_groups[0]["lr"] *= 0.8
        elif what < 0.23:
            self.opts[0].ckpt.flush()
        elif what < 0.25:
            self.opts[0].ckpt.save(f"at-{chance.random()}")
            self.saved.add(self.opts[0].ckpt.statistics()["steps"])

    def end(self) -> Life:
        self.opts[0].ckpt.shutdown()
        return self


@pytest.mark.parametrize("training", range(TRAININGS))
def test_whatever_turns_do_each_durable_step_has_the_bits_of_a_run_without_a_journal(root, one_thread, training):
    seed = random.SystemRandom().randrange(2**32)
    stock = Life(root / "stock", seed, journal=1).train().end()
    life = Life(root / "a", seed).train().end()
    assert life.states == stock.states, f"seed {seed}: training itself has other bits"
    assert life.opts[0].ckpt.statistics()["checkpoints_failed"] == 0, f"seed {seed}"
    assert len(journalled(root / "a")) >= 3, f"seed {seed}: hardly anything is journalled"
    for step in sorted(({*durable_steps(root / "a")} & stock.states.keys()) - life.saved)[::2]:
        found = Life(root / "a", seed, step, on_error="raise").end()
        assert found.restored.skipped == (), f"seed {seed}: {found.restored.skipped}"
        assert (found.restored.step, found.at) == (step, stock.states[step]), f"seed {seed}, step {step}"
