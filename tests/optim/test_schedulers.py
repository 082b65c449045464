"""Every scheduler of ``torch.optim.lr_scheduler``: its numbers are inputs, so nothing is compiled again; and it resumes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from digests import digest
from small_models import eager
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler as S
from torch.optim.swa_utils import SWALR

import fxckpt
from fxckpt.graph.update import inductor
from fxckpt.optim import programs

STEPS, LOADED = 50, 30

MAKE: dict[str, Callable] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda epoch: 0.97),
    "StepLR": lambda o: S.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [5, 20, 20, 35], 0.5),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 33),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, 1.0, 40),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 45, 2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 40),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 7, 2),
    "CyclicLR": lambda o: S.CyclicLR(o, 1e-3, 0.1, 6, mode="triangular2"),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, "max", 0.7, 3),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o, 0.2, 1.0, 9), S.ExponentialLR(o, 0.96)]),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 8), S.CosineAnnealingLR(o, 35)], [8]),
    "SWALR": lambda o: SWALR(o, 0.01, 20),
}
BETAS = {"OneCycleLR"}  # changes betas[0] of an Adam; with the others SGD's momentum stays or is cycled


@pytest.fixture(autouse=True)
def no_old_graphs():
    torch._dynamo.reset()
    counters.clear()


def build(name: str, directory: Path, seed: int):
    """A model, its compiled form, its stepped optimizer and its scheduler."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    if name in BETAS:
        opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    else:
        opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = MAKE[name](opt)
    fxckpt.compile_step(opt, directory, model=model, every=10, keep=9, update="inductor", extra={"sched": scheduler})
    return model, eager(model), opt, scheduler


def train(forward, opt, scheduler, first: int, last: int) -> list[float]:
    """Returns the learning rates."""
    rates = []
    for step in range(first, last):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        loss = forward(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        scheduler.step(loss.item()) if isinstance(scheduler, S.ReduceLROnPlateau) else scheduler.step()
        rates.append(opt.param_groups[0]["lr"])
    return rates


def test_every_scheduler_of_this_torch_is_tried():
    found = {name for name, value in vars(S).items() if inspect.isclass(value) and issubclass(value, S.LRScheduler)}
    assert set(MAKE) - {"SWALR"} == {name for name in found if not name.startswith("_")} - {"LRScheduler"}


@pytest.mark.parametrize("name", MAKE)
def test_fifty_steps_compile_nothing_and_a_resume_has_the_same_bits(name, tmp_path, one_thread, inductor_cache):
    model, forward, opt, scheduler = build(name, tmp_path / "d", 0)
    rates = train(forward, opt, scheduler, 0, 3)
    stepper = opt.ckpt._run.steppers[0]
    before = sum(map(len, programs._shared_programs.values())), set(inductor._compiled)
    assert counters["stats"]["unique_graphs"] == 1
    assert any(member.flat for member in stepper.bindings.members), "nothing was compiled, so nothing was tested"
    rates += train(forward, opt, scheduler, 3, STEPS)
    assert counters["stats"]["unique_graphs"] == 1, counters
    assert not counters["recompiles"]
    assert (sum(map(len, programs._shared_programs.values())), set(inductor._compiled)) == before
    assert len(set(rates)) > 1, "the scheduler did nothing"
    whole = digest(model, opt, scheduler)
    opt.ckpt.shutdown()
    model, forward, opt, scheduler = build(name, tmp_path / "d", 1)
    assert fxckpt.load(step=LOADED).step == LOADED
    assert train(forward, opt, scheduler, LOADED, STEPS) == rates[LOADED:]
    assert digest(model, opt, scheduler) == whole
