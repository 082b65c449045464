"""Optimizers that trainers wrap: the inner one is compiled, before or after; a wrapper itself is refused by name.

The stand-ins hand steps on as the wrappers of Accelerate and Lightning do; where Accelerate is installed it is used itself.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxckpt


class AcceleratedOptimizer(torch.optim.Optimizer):
    """Keeps the optimizer, and never calls ``Optimizer.__init__``."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class LightningOptimizer:
    """Takes over the optimizer's attributes, and a class made of both, so that it is an instance of the inner class."""

    def __init__(self, optimizer):
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


WRAPPERS = [AcceleratedOptimizer, LightningOptimizer]


def trained(model, wrapper, opt, steps=3):
    for _ in range(steps):
        model(torch.ones(2, 4)).sum().backward()
        wrapper.step()
        wrapper.zero_grad()
    assert opt.ckpt.statistics()["steps"] == steps
    assert opt.ckpt.statistics()["checkpoints_started"] == steps
    return [p.detach().clone() for p in model.parameters()]


def made():
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def ours(opt, model):
    return fxckpt.compile_step(opt, writer="mock", every=1, model=model)


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda w: w.__name__)
def test_steps_through_a_wrapper_are_steps_of_the_run(wrap):
    plain, stock = made()
    for _ in range(3):
        plain(torch.ones(2, 4)).sum().backward()
        stock.step()
        stock.zero_grad()
    for before in (True, False):
        model, opt = made()
        wrapper = wrap(ours(opt, model)) if before else wrap(opt)
        assert before or ours(wrapper.optimizer, model) is opt
        bits = trained(model, wrapper, opt)
        assert all(map(torch.equal, bits, plain.parameters()))


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda w: w.__name__)
def test_a_wrapper_is_refused_by_name_and_left_as_it_was(wrap):
    model, opt = made()
    wrapper = wrap(opt)
    kind = type(wrapper)
    with pytest.raises(fxckpt.FxckptError, match=rf"{kind.__name__} .* only wraps the AdamW .* inner optimizer"):
        ours(wrapper, model)
    assert type(wrapper) is kind
    assert type(opt) is torch.optim.AdamW


def test_accelerates_own_wrapper():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt = made()
    model, wrapper = accelerator.prepare(model, ours(opt, model))
    trained(model, wrapper, opt)
    model, opt = made()
    model, wrapper = accelerator.prepare(model, opt)
    ours(wrapper.optimizer, model)
    trained(model, wrapper, opt)
    model, opt = made()
    model, wrapper = accelerator.prepare(model, opt)
    assert ours(wrapper, model) is wrapper
    trained(model, wrapper, opt)
