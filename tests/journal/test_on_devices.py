"""Gradients on a device that the fake driver plays: records hold those of their step, however late the copies run. That steps
made again on a device have the same bits, only a device can show; until one has, nothing there is journalled."""

from __future__ import annotations

import logging

import pytest
import torch
from journal_lives import whole
from small_training import Training, all_made_again
from standin import device, library
from torch.nn import functional as F

import fxckpt
from fxckpt.errors import Corrupt
from fxckpt.journal import repeatable
from fxckpt.saving.guard import Guard
from fxckpt.store.reader import candidates, records

__all__ = ["device", "library"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def test_on_devices_steps_are_stored_in_full_and_it_is_said(tmp_path, device, caplog):
    with caplog.at_level(logging.WARNING, "fxckpt"):
        training = Training(tmp_path, journal=6).train(5).end()
    assert records(tmp_path) == [] and all_made_again(tmp_path, training) == [1, 2, 3, 4, 5]
    assert sum("parameters lie on a device" in text for text in caplog.messages) == 1


@pytest.fixture
def journalled(device, monkeypatch):
    """A device on which steps are journalled all the same; its copies are later than a step takes."""
    monkeypatch.setattr("fxckpt.journal.chain.why_not", lambda steppers, on_device, n: repeatable.why_not(steppers, False, n))
    device.fake.late(3000)
    return device


def adamw(params, lr):
    return torch.optim.AdamW(params, lr=lr, foreach=True)


def steps_of(found) -> list[int]:
    return sorted(whole(each).record.step for each in found)


def test_records_hold_the_gradients_of_their_step_however_late_the_copies_run(tmp_path, journalled):
    training = Training(tmp_path, optimizer=adamw, journal=6).train(14).end()
    assert all_made_again(tmp_path, training) == [*range(1, 15)]
    assert len(steps_of(records(tmp_path))) >= 9 and training.found["checkpoints_failed"] == 0
    assert journalled.fake.violations() == ""


def test_gradients_that_nobody_holds_until_they_are_copied_would_be_seen(tmp_path, journalled, monkeypatch):
    """What the test above rests on: their memory is given to others."""
    monkeypatch.setattr(Guard, "watch_now", lambda self, layer, tensors: None)
    training = Training(tmp_path, optimizer=adamw, journal=6).train(14).end()
    with pytest.raises((AssertionError, Corrupt)):
        all_made_again(tmp_path, training)


class Clearing(Training):
    """Its loop has boundaries, and clears gradients in place."""

    def train(self, steps: int = 1) -> Clearing:
        for _ in fxckpt.steps(steps):
            x, y = next(self.loader)
            F.cross_entropy(self.forward(x), y).backward()
            self.opt.step()
            self.reference[self.found["steps"]] = self.now()
            self.opt.zero_grad(set_to_none=False)
            self.scheduler.step()
        return self


def test_gradients_that_are_cleared_in_place_cost_a_record_and_are_copied_on_the_device_from_then_on(tmp_path, journalled):
    training = Clearing(tmp_path, optimizer=adamw, journal=20).train(10).end()
    steps = all_made_again(tmp_path, training)
    assert len(steps) >= 8 and steps[-6:] == [5, 6, 7, 8, 9, 10]
    assert set(steps_of(records(tmp_path))) >= {6, 7, 8, 9, 10} and journalled.fake.violations() == ""


def test_gradients_of_two_optimizers_are_held_until_the_record_of_both_has_them(tmp_path, journalled):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
    opts = [adamw(model[0].parameters(), 1e-2), torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9, foreach=True)]
    fxckpt.compile_step(opts, tmp_path, model=model, every=1, keep=20, journal=6, update="native")
    expected = {}
    for step in fxckpt.steps(12):
        for opt in opts:
            model(torch.randn(5, 8)).square().mean().backward()
            opt.step()
            for each in opts:
                each.zero_grad()
        expected[step + 1] = {name: t.clone() for name, t in model.state_dict().items()}
    opts[0].ckpt.shutdown()
    assert steps_of(candidates(tmp_path)) == [1, 2, 8] and journalled.fake.violations() == ""
    for step, state in expected.items():
        assert fxckpt.load(tmp_path, model=model, step=step).step == step
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items()), step
