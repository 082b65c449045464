"""Accelerate: ``compile_step`` on what ``prepare`` returned, loops that are killed at random, and states beside ours.

``FXCKPT_INTEGRATIONS`` says how many kills each loop gets (``make integrations``: 30).
"""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from digests import digest
from loop_runs import Loop
from torch import nn

import fxckpt
from fxckpt.compat.accelerate import is_prepared, scaler_of, steps_elsewhere
from fxckpt.compat.wrappers import unwrapped
from fxckpt.run.stepping import Stepping

KILLS = int(os.environ.get("FXCKPT_INTEGRATIONS", "2"))

SCRIPT = """
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from script_prelude import finish
from torch import nn
from torch.utils.data import DataLoader, Dataset
import fxckpt  # fxckpt

class Noisy(Dataset):
    rows = torch.randn(22, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 22

    def __getitem__(self, i):
        return self.rows[i] + 0.1 * torch.randn(8), self.rows[i].sum()

set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **{accelerator})
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))
opt = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 20)
loader, test = DataLoader(Noisy(), 2, shuffle=True, num_workers={workers}), DataLoader(Noisy(), 4)
if {scaler}:
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
model, opt, loader, test, scheduler = accelerator.prepare(model, opt, loader, test, scheduler)
extra = {{"scheduler": scheduler}}
fxckpt.compile_step(opt, "ckpt", model=model, every=1, extra=extra, update="native")  # fxckpt
fxckpt.load()  # fxckpt
batches = 0
for epoch in fxckpt.epochs(3):  # fxckpt, was: for epoch in range(3):
    for x, y in fxckpt.batches(loader):  # fxckpt, was: for x, y in loader:
        with accelerator.accumulate(model):
            loss = (model(x).squeeze(-1) - y).square().mean()
            if {scaler} and 0.9 < y.abs().max() < 1.1:
                loss = loss * float("inf")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    model.eval()
    with torch.no_grad():
        print("END", epoch, sum((model(x).squeeze(-1) - y).square().sum() for x, y in test).item().hex())
    model.train()
finish(model, opt.optimizer, scheduler.state_dict())
"""

LOOPS = {
    "bf16, workers": {"accelerator": {"mixed_precision": "bf16"}, "workers": 2, "scaler": False},
    "scaler": {"accelerator": {"step_scheduler_with_optimizer": False}, "workers": 0, "scaler": True},
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_accelerate_ends_with_the_same_bits(name, trainers_server, tmp_path, counted):
    loop = Loop(trainers_server, SCRIPT.format(**LOOPS[name]), tmp_path)
    plain, whole = loop.plain(), loop.whole()
    assert whole == plain, "fxckpt changed an uninterrupted training"
    assert whole.dropped == 0
    for seed, resumed in loop.killed_anew(KILLS // 2, 2, plain.backwards):
        assert resumed.lines == plain.lines[-len(resumed.lines) :], f"seed {seed}"
        counted("kills of a loop of Accelerate", 2)


def prepared(scaler=False):
    """A model and its optimizer as Accelerate prepares them, in a process in which it was not used before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), nn.Linear(4, 4)
    if scaler:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return accelerator, model, opt


def turns(accelerator, model, opt, count, infinite=()):
    for step in fxckpt.steps(count, optimizer=opt):
        accelerator.backward(model(torch.ones(2, 4)).sum() * (float("inf") if step in infinite else 1))
        opt.step()
        opt.zero_grad()


def test_what_prepare_returned_comes_back_and_has_ckpt(tmp_path):
    accelerator, model, opt = prepared()
    assert fxckpt.compile_step(opt, tmp_path / "ckpt", model=model, every=1, update="native") is opt
    assert isinstance(opt, AcceleratedOptimizer) and isinstance(opt, fxckpt.Checkpointed)
    assert type(opt).__name__ == "AcceleratedOptimizer"
    assert fxckpt.load(optimizer=opt).step == 0
    turns(accelerator, model, opt, 2)
    assert opt.ckpt is opt.optimizer.ckpt and opt.ckpt.statistics()["checkpoints_started"] == 2
    assert not hasattr(pickle.loads(pickle.dumps(opt)), "ckpt") and copy.deepcopy(opt).param_groups


@pytest.mark.parametrize("infinite", [(), (1, 2)])
def test_steps_through_a_scaler_that_prepare_gave_are_steps_of_the_run(tmp_path, infinite, monkeypatch):
    foreign = []
    monkeypatch.setattr(Stepping, "foreign_step_begins", lambda self, opt: foreign.append(opt))
    accelerator, model, opt = prepared(scaler=True)
    plain = prepared(scaler=True)
    fxckpt.compile_step(opt, tmp_path / "ckpt", model=model, every=1, update="native")
    turns(accelerator, model, opt, 4, infinite)
    for step in range(4):
        plain[0].backward(plain[1](torch.ones(2, 4)).sum() * (float("inf") if step in infinite else 1))
        plain[2].step()
        plain[2].zero_grad()
    assert digest(model) == digest(plain[1]) and opt.scaler.state_dict() == plain[2].scaler.state_dict()
    opt.ckpt.flush()
    counted = opt.ckpt.statistics()
    assert counted["steps"] == counted["checkpoints_committed"] == 4
    assert foreign == [], "steps came by another way than the class that was swapped"
    assert opt.ckpt.state_dict() == {"step": 4, "updates": 4 - len(infinite), "iteration": 4}
    opt.ckpt.shutdown()
    scale = opt.scaler.get_scale()
    _, other, again = prepared(scaler=True)
    fxckpt.compile_step(again, tmp_path / "ckpt", model=other)
    assert fxckpt.load(optimizer=again).updates == 4 - len(infinite)
    assert again.scaler.get_scale() == scale and digest(other) == digest(model)


def test_a_scaler_is_kept_once_and_under_its_name(tmp_path):
    _, model, opt = prepared(scaler=True)
    with pytest.raises(fxckpt.SetupError, match=r"extra\['scaler'\]"):
        fxckpt.compile_step(opt, tmp_path / "ckpt", model=model, update="native", extra={"scaler": {}})
    fxckpt.compile_step(opt, tmp_path / "ckpt", model=model, update="native", extra={"mine": opt.scaler})
    assert [each.name for each in opt.ckpt._run.capture.extras] == ["mine"]


def test_states_of_accelerate_and_ours_agree_on_the_step(tmp_path):
    accelerator, model, opt = prepared()
    fxckpt.compile_step(opt, tmp_path / "ckpt", model=model, every=1, update="native")
    accelerator.register_for_checkpointing(opt.ckpt)
    turns(accelerator, model, opt, 3)
    accelerator.save_state(tmp_path / "state")
    at_three = digest(model)
    turns(accelerator, model, opt, 5)
    opt.ckpt.flush()
    at_five = digest(model)
    accelerator.load_state(tmp_path / "state")
    assert digest(model) == at_three and opt.ckpt.state_dict() == {"step": 3, "updates": 3, "iteration": 3}
    assert opt.ckpt.statistics()["last_committed_step"] == 5
    turns(accelerator, model, opt, 5)
    assert digest(model) == at_five
    opt.ckpt.shutdown()
    _, other, again = prepared()
    fxckpt.compile_step(again, tmp_path / "ckpt", model=other)
    assert fxckpt.load(optimizer=again).step == 5 and digest(other) == at_five
    with pytest.raises(fxckpt.SetupError, match="step, updates, iteration"):
        again.ckpt.load_state_dict({"step": 3})


def test_wrappers_whose_engine_makes_the_steps_are_refused_by_name():
    class DeepSpeedOptimizerWrapper(AcceleratedOptimizer):
        pass

    _, model, opt = prepared()
    opt.__class__ = DeepSpeedOptimizerWrapper
    assert steps_elsewhere(opt) and not is_prepared(opt) and unwrapped(opt) is opt and scaler_of(opt) is None
    with pytest.raises(fxckpt.SetupError, match=r"DeepSpeedOptimizerWrapper leaves its steps.*save_state"):
        fxckpt.compile_step(opt, writer="mock", model=model)
