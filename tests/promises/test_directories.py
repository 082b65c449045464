"""A directory is where its name says: home for "~"; what only looks like a path is refused, and no folder is made of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fxckpt
from fxckpt.cli import main


def run_in(directory) -> torch.optim.Optimizer:
    model = nn.Linear(2, 1)
    opt = fxckpt.compile_step(torch.optim.SGD(model.parameters(), lr=0.1), directory, model=model, every=1)
    fxckpt.load(optimizer=opt)
    model(torch.ones(2, 2)).sum().backward()
    opt.step()
    return opt


WRONG = ["s3://bucket/run", Path("gs://bucket/run"), b"hf://me/run", "$SCRATCH/run", "runs/${ID}"]


@pytest.mark.parametrize("directory", WRONG, ids=str)
@pytest.mark.parametrize("use", [run_in, fxckpt.checkpoints, fxckpt.latest, lambda d: fxckpt.load(d, model=nn.Linear(2, 1))])
def test_a_url_and_a_variable_that_is_not_set_are_refused_wherever_a_directory_is_named(use, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("SCRATCH", "ID"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(fxckpt.SetupError, match=r"is a URL|names a variable"):
        use(directory)
    assert os.listdir(tmp_path) == []


def test_the_environments_directory_is_looked_at_like_one_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FXCKPT_DIR", "s3://bucket/run")
    with pytest.raises(fxckpt.SetupError, match="is a URL"):
        run_in(None)
    assert os.listdir(tmp_path) == []


def test_a_tilde_is_home_for_training_loading_listing_and_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_in("~/run").ckpt.shutdown()
    assert os.listdir(tmp_path) == ["home"]
    assert [each.step for each in fxckpt.checkpoints("~/run")] == [1] and fxckpt.latest("~/run").step == 1
    assert fxckpt.load("~/run", model=nn.Linear(2, 1)).step == 1
    assert main(["verify", "~/run"]) == 0 and "step-000000001" in capsys.readouterr().out


def test_the_command_line_says_that_a_url_is_no_directory(capsys):
    assert main(["ls", "s3://bucket/run"]) == 2
    assert "is a URL" in capsys.readouterr().err
