"""What training changes and no checkpoint holds is said at the second checkpoint, with the way out; nothing else is."""

from __future__ import annotations

import copy
import logging
from collections import deque

import pytest
import torch
from lives import batch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, SequentialLR, StepLR

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES, ATTRIBUTES, SCHEDULER = "these modules change", "these attributes of modules", "a scheduler of this run's optimizer"


class Net(nn.Module):
    """Keeps tensors beside its parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.bank, self.constant, self.hidden = torch.zeros(3, 4), torch.ones(4), None

    def forward(self, x):
        return self.layer(x) * self.constant


class Loss(nn.Module):
    """A loss that keeps an average, as DINO's center."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(4))

    def forward(self, y):
        self.center = self.center * 0.9 + y.detach().mean(0) * 0.1
        return (y - self.center).square().mean()


def train(store, caplog, turn, model=None, given=None, extra=None, plain=False, steps=4) -> str:
    """Make some turns of ``turn(model, opt, y)``, which runs behind the step, and return what was said."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    extra = extra(opt) if callable(extra) else extra
    fxckpt.compile_step(opt, store, model=model if given is None else given, every=1, update="native", extra=extra)
    with caplog.at_level(logging.WARNING, logger="fxckpt"):
        for step in range(steps) if plain else fxckpt.steps(steps, optimizer=opt):
            y = model(batch(step, 6, 4))
            y.square().mean().backward()
            opt.step()
            opt.zero_grad()
            turn(model, opt, y)
        opt.ckpt.shutdown()
    return caplog.text


def said(text: str) -> list[int]:
    return [text.count(each) for each in (MODULES, ATTRIBUTES, SCHEDULER)]


@pytest.mark.parametrize("plain", [False, True])
def test_tensors_in_attributes_that_change_are_named_once(plain, tmp_path, caplog):
    def turn(model, opt, y):
        model[0].bank[0] = y[0].detach()
        model[0].hidden = (y, y.detach())

    text = train(tmp_path, caplog, turn, nn.Sequential(Net()), plain=plain)
    assert said(text) == [0, 1, 0] and "0.bank, 0.hidden." in text and "constant" not in text


def test_tensors_in_attributes_that_extra_holds_or_the_module_saves_are_not_named(tmp_path, caplog):
    class Saves(Net):
        def get_extra_state(self):
            return self.hidden

        def set_extra_state(self, state):
            self.hidden = state

    model = nn.Sequential(Net(), Saves())

    def turn(model, opt, y):
        model[0].bank[0] = y[0].detach()
        model[1].hidden = y.detach()

    assert said(train(tmp_path, caplog, turn, model, extra={"bank": model[0].bank})) == [0, 0, 0]


def test_what_hooks_of_torch_compute_from_parameters_is_not_named(tmp_path, caplog):
    with pytest.warns(FutureWarning):
        model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 4)), torch.nn.utils.spectral_norm(nn.Linear(4, 4)))
    assert said(train(tmp_path, caplog, lambda *_: None, model)) == [0, 0, 0]


def averaging(teacher):
    """An average of the weights, as most write it: past all version counters."""

    def turn(model, opt, y):
        for old, new in zip(teacher.parameters(), model.parameters()):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)

    return turn


def test_a_loss_and_a_teacher_that_change_are_named_once(tmp_path, caplog):
    loss, model = Loss(), Net()
    teacher = nn.Sequential(copy.deepcopy(model))
    average = averaging(teacher)
    model.teacher = [teacher]  # in a list, so that its parameters are not the model's

    def turn(model, opt, y):
        loss(y)
        average(model, opt, y)

    text = train(tmp_path, caplog, turn, model)
    assert said(text) == [1, 0, 0] and "Loss (Loss.center), Sequential (Linear.weight)." in text


def test_modules_that_model_or_extra_or_another_run_holds_are_not_named(tmp_path, caplog):
    loss, model, other = Loss(), Net(), Net()
    teacher = nn.Sequential(copy.deepcopy(model))
    unchanged = nn.Sequential(copy.deepcopy(model))
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    fxckpt.compile_step(second, tmp_path / "second", model=other, every=1, update="native")
    average = averaging(teacher)

    def turn(model, opt, y):
        loss(y)
        average(model, opt, y)
        other(y.detach()).sum().backward()
        second.step()

    text = train(tmp_path / "first", caplog, turn, model, given=[model, teacher], extra={"loss": loss})
    second.ckpt.shutdown()
    assert said(text) == [0, 0, 0] and len(unchanged) == 1


def test_a_scheduler_that_is_not_in_extra_is_named_once_by_the_outermost(tmp_path, caplog):
    held = []

    def turn(model, opt, y):
        if not held:
            held.append(SequentialLR(opt, [LinearLR(opt), StepLR(opt, 2)], [2]))
        held[0].step()

    text = train(tmp_path, caplog, turn)
    assert said(text) == [0, 0, 1] and "fxckpt: SequentialLR: a scheduler" in text


class Keeper:
    """Has a scheduler somewhere inside, and saves it."""

    def __init__(self, scheduler):
        self.inner = deque([{"a": (scheduler,)}])
        self.state_dict, self.load_state_dict = scheduler.state_dict, scheduler.load_state_dict


@pytest.mark.parametrize("way", ["itself", "sequential", "inside", "closure", "of another optimizer"])
def test_a_scheduler_in_extra_or_inside_of_what_is_there_is_not_named(way, tmp_path, caplog):
    held = []

    class Closing:
        def __init__(self, scheduler):
            self.state_dict, self.load_state_dict = (
                (lambda: {"": scheduler.state_dict()}),
                lambda s: scheduler.load_state_dict(s[""]),
            )

    def extra(opt):
        if way == "of another optimizer":
            opt = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        scheduler = StepLR(opt, 2)
        if way == "sequential":
            scheduler = SequentialLR(opt, [scheduler, LinearLR(opt)], [2])
        held.append(scheduler)
        ways = {"inside": lambda: Keeper(scheduler), "closure": lambda: Closing(scheduler)}
        return {} if way == "of another optimizer" else {"kept": ways.get(way, lambda: scheduler)()}

    assert said(train(tmp_path, caplog, lambda *_: held[0].step(), extra=extra)) == [0, 0, 0]
