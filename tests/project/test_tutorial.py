"""The tutorial: its script is the one in ``examples/``, changed in eight lines; killed anywhere it ends with the same bits."""

from __future__ import annotations

import difflib
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fork_server import ForkServer
from repository import ROOT

import fxckpt

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
EXAMPLE = (ROOT / "examples" / "train_classifier.py").read_text()
EPOCHS, BATCHES = 3, 16

DYING = """
def dying(function, at, behind=0):
    import os, signal, time
    calls = iter(range(1, at + 1))
    def called(*args):
        if next(calls) == at:
            while behind and fxckpt.checkpoints("ckpt")[-1].step < behind:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return called
"""
"""A function that ends the process in its call of that number, once the step ``behind`` is committed."""

IN_THE_SECOND_EPOCH = "F.cross_entropy = dying(F.cross_entropy, 24)"
IN_ITS_VALIDATION = f"accuracy = dying(accuracy, 1, behind={2 * BATCHES})"


def block(kind: str, of: str) -> str:
    """The tutorial's only block of this kind that contains a text."""
    (found,) = (each for each in re.findall(rf"```{kind}\n(.*?)```", TUTORIAL, re.DOTALL) if of in each)
    return found


def plain_script() -> str:
    """The script as it is before fxckpt."""
    return block("python", "train_loader")


def test_the_two_scripts_are_those_of_the_tutorial_and_differ_in_eight_lines():
    differ = list(difflib.unified_diff(plain_script().splitlines(), EXAMPLE.splitlines(), n=1, lineterm=""))[2:]
    shown = block("diff", "train_loader").splitlines()
    assert [line for line in shown if line != " ..."] == [line for line in differ if not line.startswith("@@")]
    assert sum(line.startswith("+") and line != "+" for line in differ) == 8
    assert "fxckpt" not in plain_script()


def test_a_reader_who_changes_the_lines_of_the_diff_has_the_example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from tutorial_scripts import scripts

    assert scripts() == (plain_script(), EXAMPLE)


class Script:
    """One of the two, shorter, in a folder of its own."""

    def __init__(self, server: ForkServer, text: str, folder: Path):
        self._server, self._folder = server, folder
        assert text.count("(8)") == text.count("T_max=8") == 1
        self._text = text.replace("(8)", f"({EPOCHS})").replace("T_max=8", f"T_max={EPOCHS}")

    def run(self, dies: str = "") -> str:
        """Its output. ``dies``: a line that makes it kill itself."""
        script = self._folder.with_suffix(".py")
        script.write_text(self._text.replace("\nif __name__", f"{DYING if dies else ''}\n{dies}\nif __name__"))
        run = self._server.start(script, self._folder)
        output = run.wait()
        assert run.returncode == (-signal.SIGKILL if dies else 0), output
        return output

    def bits(self) -> list[torch.Tensor]:
        """Everything in the files that it leaves."""
        found: list[torch.Tensor] = []
        for name in ("best.pt", "last.pt"):
            _collect(torch.load(self._folder / name), found)
        return found


def _collect(value: object, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        _collect(each, found)


def epochs_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("epoch ")]


@pytest.mark.slow
def test_the_tutorials_script_killed_in_an_epoch_and_in_a_validation_ends_with_the_bits_of_the_plain_one(fork_server, tmp_path):
    plain, whole, killed = (
        Script(fork_server, text, tmp_path / name)
        for name, text in (("plain", plain_script()), ("whole", EXAMPLE), ("killed", EXAMPLE))
    )
    told = epochs_of(plain.run())
    assert len(told) == EPOCHS and epochs_of(whole.run()) == told
    first = killed.run(IN_THE_SECOND_EPOCH)
    assert epochs_of(first) == told[:1]
    assert BATCHES < newest(tmp_path / "killed") <= 23
    second = killed.run(IN_ITS_VALIDATION)
    assert epochs_of(second) == []
    assert newest(tmp_path / "killed") == 2 * BATCHES, "what is left is a validation, without a batch before it"
    assert epochs_of(killed.run()) == told[1:]
    for one, other in pairwise((plain.bits(), whole.bits(), killed.bits())):
        assert len(one) == len(other) > 40
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def newest(folder: Path) -> int:
    """The step that a next run goes on from."""
    return fxckpt.checkpoints(folder / "ckpt")[-1].step
