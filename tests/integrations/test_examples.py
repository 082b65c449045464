"""The examples: without fxckpt, with it, and killed twice, they end with the same weights."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from digests import digest
from loop_runs import Loop
from repository import ROOT
from safetensors.torch import load_file

OURS = re.compile(r"^(import fxckpt.*| *fxckpt\..*)\n", re.MULTILINE)


def without_fxckpt(example: str) -> str:
    """The example as it was before: our lines go, and the loops are over what they went over."""
    plain = re.sub(r"fxckpt\.batches\((\w+)\)", r"\1", re.sub(r"fxckpt\.(epochs|steps)", "range", OURS.sub("", example)))
    assert "fxckpt." not in plain.split('"""', 2)[2]
    return plain


def weights(folder: Path) -> str:
    """What a run has saved at its end."""
    saved = folder / "model" / "model.safetensors"
    return digest(load_file(saved) if saved.exists() else torch.load(folder / "last.pt"))


SERVERS = {
    "finetune_trainer": "trainers_server",
    "train_accelerate": "trainers_server",
    "train_lightning": "lightning_server",
    "train_gan": "fork_server",
    "train_diffusion": "fork_server",
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_killed_example_ends_with_the_same_weights(name, request, tmp_path):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    loop = Loop(request.getfixturevalue(SERVERS[name]), text, tmp_path)
    (tmp_path / "plain.py").write_text(without_fxckpt((tmp_path / "loop.py").read_text()))
    plain, whole = loop.plain(), loop.whole()
    assert weights(tmp_path / "plain") == weights(tmp_path / "whole")
    assert whole.backwards == plain.backwards and whole.committed >= plain.backwards // 3
    seed = random.SystemRandom().randrange(2**32)
    loop.killed(2, plain.backwards, seed)
    assert weights(tmp_path / f"killed-{seed}") == weights(tmp_path / "plain"), f"seed {seed}"
