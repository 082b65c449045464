"""Promise 2: taking checkpoints changes no bits, however often and with whichever writer."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from digests import digest
from small_models import GPT, Loader, conv, eager, mlp
from torch.nn import functional as F
from waiting import committed

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")

NEVER = 10**9

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "Adam foreach": lambda params: torch.optim.Adam(params, lr=1e-2, foreach=True, amsgrad=True),
    "SGD nesterov": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}

MODELS = {"mlp": (mlp, lambda: Loader.of(8)), "conv": (conv, lambda: Loader.of(3, 8, 8)), "gpt": (GPT, Loader.of_tokens)}


def train(model: str, optimizer: str, directory, *, steps: int = 15, compiled=None, **options) -> list[str]:
    """The digest after every step. With ``directory=None`` plain PyTorch trains."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    m, loader = MODELS[model][0](), MODELS[model][1]()
    forward = m if compiled is None else compiled(m)
    opt = OPTIMIZERS[optimizer](m.parameters())
    s = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 7)
    if directory is not None:
        fxckpt.compile_step(opt, directory, model=m, extra={"s": s, "data": loader}, **options)
    out = []
    for _ in range(steps):
        x, y = next(loader)
        F.cross_entropy(forward(x), y).backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
        s.step()
        out.append(digest(m, opt, s, loader, torch.get_rng_state(), np.random.get_state()[1:], random.getstate()))
    if directory is not None:
        opt.ckpt.flush()
        written = opt.ckpt.statistics()["checkpoints_committed"]
        assert written == (steps // options["every"] if options.get("writer") != "mock" else 0)
        opt.ckpt.shutdown()
    return out


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [("mlp", "SGD nesterov"), ("mlp", "Adafactor"), ("conv", "AdamW"), ("conv", "Adam foreach"), ("gpt", "AdamW fused")],
)
def test_native_steps_with_and_without_checkpoints_are_those_of_plain_pytorch(model, optimizer, tmp_path):
    plain = train(model, optimizer, None)
    for every, compiled in ((NEVER, None), (1, eager if model == "gpt" else None), (7, None)):
        found = train(model, optimizer, tmp_path / str(every), update="native", every=every, compiled=compiled)
        assert found == plain, f"every={every}: differs from step {first_difference(found, plain)} on"


@pytest.mark.parametrize(("model", "optimizer"), [("mlp", "AdamW"), ("conv", "Adam foreach")])
def test_the_monitor_leaves_the_same_bits(model, optimizer, tmp_path):
    """The smallest ring there can be: every step waits for slots."""
    plain = train(model, optimizer, None)
    found = train(model, optimizer, tmp_path / "d", update="native", every=1, writer="monitor", chunk_mb=1, staging_mb=2)
    assert found == plain


def test_the_mock_leaves_the_same_bits(tmp_path):
    plain = train("mlp", "AdamW", None)
    for every in (NEVER, 1, 7):
        assert train("mlp", "AdamW", tmp_path / str(every), update="native", every=every, writer="mock") == plain


@pytest.mark.slow
def test_compiled_steps_are_the_same_bits_with_and_without_checkpoints(tmp_path, inductor_cache):
    runs = {
        (every, writer): train("mlp", "AdamW", tmp_path / f"{every}{writer}", every=every, writer=writer)
        for every, writer in ((NEVER, "mock"), (1, "thread"), (7, "thread"))
    }
    reference = runs[NEVER, "mock"]
    for how, found in runs.items():
        assert found == reference, f"{how}: differs from step {first_difference(found, reference)} on"


def test_a_tiny_engine_leaves_the_same_bits(tmp_path):
    """No staging, one thread, one checkpoint in flight: every step waits for the one before."""
    plain = train("conv", "AdamW", None)
    found = train("conv", "AdamW", tmp_path / "d", update="native", every=1, threads=1, chunk_mb=1, staging_mb=0, max_async=1)
    assert found == plain


def test_the_mock_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("mlp", "AdamW", "d", update="native", every=1, writer="mock")
    assert list(tmp_path.iterdir()) == []


def test_the_mock_hands_over_but_never_commits(tmp_path):
    m = mlp()
    opt = fxckpt.compile_step(torch.optim.SGD(m.parameters(), lr=0.1), tmp_path / "d", model=m, every=1, writer="mock")
    m(torch.zeros(1, 8)).sum().backward()
    opt.step()
    opt.ckpt.flush()
    found = opt.ckpt.statistics()
    assert (found["last_handed_over_step"], found["last_committed_step"], found["bytes_written"]) == (1, None, 0)
    assert found["checkpoints_started"] == 1 and found["checkpoints_committed"] == 0


@pytest.mark.parametrize("writer", ["disk", "", None])
def test_a_writer_that_cannot_start_raises_and_nothing_else_takes_its_place(writer, tmp_path):
    opt = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(fxckpt.SetupError, match="writer"):
        fxckpt.compile_step(opt, tmp_path / "d", writer=writer)
    assert type(opt) is torch.optim.SGD and not (tmp_path / "d").exists()


def test_what_belongs_to_one_process_is_not_pickled_or_copied(tmp_path):
    m = mlp()
    opt = fxckpt.compile_step(torch.optim.SGD(m.parameters(), lr=0.1), tmp_path / "d", model=m, update="native")
    twin = copy.deepcopy(opt)
    assert type(twin) is torch.optim.SGD and "ckpt" not in dir(twin)
    assert isinstance(opt, torch.optim.SGD) and opt.ckpt is not None
    assert committed(tmp_path / "d") == []


def first_difference(found: list[str], reference: list[str]) -> int:
    return next(i for i, (a, b) in enumerate(zip(found, reference)) if a != b)
