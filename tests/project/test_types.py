"""What a user's strict script sees: the optimizer keeps its class and has a typed ``.ckpt``, and nothing public is ``Any``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT
from torch import nn

import fxckpt

SCRIPT = """
from __future__ import annotations

import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fxckpt


class Lion(Optimizer):
    momentum = 0.9


def train(model: torch.nn.Module, opt: AdamW, ckpt: fxckpt.Handle) -> int | None:
    ckpt.note(loss=0.5)
    statistics: fxckpt.Statistics = ckpt.statistics()
    return statistics["last_committed_step"]


model = torch.nn.Linear(2, 2)
compiled = torch.compile(model, backend=fxckpt.backend)
opt = fxckpt.compile_step(AdamW(model.parameters(), lr=0.1), "checkpoints/", model=model, every="auto", writer="monitor")
scheduler = LambdaLR(opt, lambda step: 0.9**step)
scaler = torch.amp.GradScaler("cpu")
start = fxckpt.load().step
for step in fxckpt.steps(10, optimizer=opt):
    opt.step()
    scaler.step(opt)
    scheduler.step()
    opt.param_groups[0]["lr"] = 0.1
opt.ckpt.flush(timeout=1.5)
train(model, opt, opt.ckpt)

lion = fxckpt.compile_step(Lion(model.parameters(), {}), on_layer=lambda name, step, tensors: print(name, step, len(tensors)))
reveal_type(opt)  # AdamW
reveal_type(opt.ckpt)  # Handle
reveal_type(opt.ckpt.graph)  # StepGraph
reveal_type(start)  # int
reveal_type(fxckpt.compile_step([opt, SGD(model.parameters())]))  # list[Checkpointed]
reveal_type(fxckpt.latest("checkpoints"))  # CheckpointInfo | None
reveal_type(lion)  # Checkpointed
assert isinstance(lion, Lion)
reveal_type(lion.momentum)  # float
reveal_type(lion.ckpt)  # Handle
"""


def mypy(script: Path) -> subprocess.CompletedProcess:
    """What ``mypy --strict`` says of a script that uses the package as it lies here."""
    pytest.importorskip("mypy", reason="make lint installs it")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(script)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)


@pytest.mark.slow
def test_a_strict_script_needs_no_any_and_sees_the_types_that_are_promised(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = mypy(script)
    assert done.returncode == 0, done.stdout
    revealed = [re.sub(r"\b[\w.]+\.(?=\w+)", "", each) for each in re.findall(r'Revealed type is "(.*)"', done.stdout)]
    assert revealed == re.findall(r"reveal_type\(.*\)  # (.*)", SCRIPT)


@pytest.mark.slow
def test_a_strict_script_with_a_wrong_option_does_not_pass(tmp_path):
    for at, wrong in enumerate(("everyy=1", 'writer="treads"', "keep=None")):
        (tmp_path / f"wrong{at}.py").write_text(
            f"import torch, fxckpt\nfxckpt.compile_step(torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), {wrong})\n"
        )
        done = mypy(tmp_path / f"wrong{at}.py")
        assert done.returncode == 1 and "call-overload" in done.stdout, wrong


def test_an_optimizer_of_a_run_is_an_instance_of_checkpointed_and_others_are_not(tmp_path):
    parameters = [nn.Parameter(torch.ones(1))]
    plain = torch.optim.SGD(parameters)
    assert not isinstance(plain, fxckpt.Checkpointed)
    opt = fxckpt.compile_step(plain, tmp_path / "store")
    assert opt is plain and isinstance(opt, fxckpt.Checkpointed) and isinstance(opt.ckpt, fxckpt.Handle)
    assert not isinstance(torch.optim.SGD(parameters), fxckpt.Checkpointed)


def test_statistics_have_the_keys_and_types_that_are_declared(tmp_path):
    opt = fxckpt.compile_step(torch.optim.SGD([nn.Parameter(torch.ones(1))]), tmp_path / "store")
    found, declared = opt.ckpt.statistics(), fxckpt.Statistics.__annotations__
    assert list(found) == list(declared)
    allowed = {name: getattr(each, "__forward_arg__", str(each)).split(" | ") for name, each in declared.items()}
    assert {k: type(v).__name__ for k, v in found.items() if type(v).__name__.replace("Type", "") not in allowed[k]} == {}


def test_public_names_are_all_listed_and_all_there():
    assert set(fxckpt.__all__) <= set(dir(fxckpt))
    assert [name for name in fxckpt.__all__ if not getattr(getattr(fxckpt, name), "__doc__", None)] == []
