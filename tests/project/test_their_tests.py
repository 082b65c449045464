"""The script that runs test files of others with fxckpt attached: it says what differs, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

from repository import ROOT

EXAMPLE = """
import os

import torch
from accelerate import Accelerator


def prepared():
    model = torch.nn.Linear(2, 1)
    return Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_that_passes_with_both():
    optimizer, model = prepared()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_that_does_not_want_ours():
    assert not hasattr(prepared()[0], "ckpt"), "it is attached"


def test_that_never_passes():
    assert False
"""


def run(tmp_path, *files: str) -> subprocess.CompletedProcess[str]:
    """The script over a file of Accelerate's kind."""
    command = [sys.executable, str(ROOT / "tools/their_tests.py"), "accelerate", *files]
    return subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=120)


def test_what_passes_only_without_fxckpt_is_named_and_what_never_passes_is_not(tmp_path):
    (tmp_path / "test_example.py").write_text(EXAMPLE)
    done = run(tmp_path, "test_example.py")
    assert done.returncode == 1, done.stderr
    assert "failed: test_example.py::test_that_does_not_want_ours\n    AssertionError: it is attached" in done.stdout
    assert "never" not in done.stdout
    assert "2 of 3 tests pass without fxckpt, 1 of these with it" in done.stdout


def test_a_file_without_tests_is_an_error_and_no_agreement(tmp_path):
    (tmp_path / "test_nothing.py").write_text("import a_package_that_nobody_has\n")
    done = run(tmp_path, "test_nothing.py")
    assert done.returncode == 1 and "no test ran" in done.stderr
