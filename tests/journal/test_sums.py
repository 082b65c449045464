"""Optimizers that add elements up: their steps are made again where sums have the same bits, and elsewhere it is said."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import sums
import torch
from digests import digest
from journal_lives import Life, journalled, net, whole
from torch import nn

import fxckpt
from fxckpt.errors import Corrupt
from fxckpt.journal.machine import machine, processor
from fxckpt.store.reader import Reader, candidates, records

FULL = os.environ.get("FXCKPT_OPTIMIZERS") == "full"


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8] if FULL else [1, 3])
def test_sums_have_the_same_bits_wherever_tensors_lie_and_in_any_process(one_thread, threads):
    """``FXCKPT_OPTIMIZERS=full``: in processes of their own, too, one of them on one core."""
    first = dict(sums.checksums(threads, 0))
    for offset in (1, 3, 16) if FULL else (3,):
        assert dict(sums.checksums(threads, offset)) == first, offset
    for offset, prefix in ((0, ()), (3, ()), (0, ("taskset", "1"))) if FULL else ():
        command = [*prefix, sys.executable, sums.__file__, str(threads), str(offset)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        assert out.split("\n")[:-1] == [f"{name}: {crc}" for name, crc in first.items()], (offset, prefix)


def adafactor(params, lr):
    return torch.optim.Adafactor(params, lr=lr)


@pytest.fixture
def trained(root, one_thread):
    """A life of eleven steps."""
    return Life(root, adafactor).train(11).end()


def last_full(root) -> int:
    return max(whole(each).record.step for each in candidates(root))


def test_steps_with_sums_are_not_made_again_on_another_machine_and_it_is_said(root, trained, monkeypatch):
    monkeypatch.setattr("fxckpt.journal.machine.processor", lambda: "another one")
    found = Life(root, adafactor)
    assert found.restored.step == last_full(root) < 11 and found.at == trained.states[found.restored.step]
    assert "sums may have other bits" in found.restored.skipped[0][1] and "another one" in found.restored.skipped[0][1]
    found.end()
    with pytest.raises(Corrupt, match="sums may have other bits"):
        Life(root, adafactor, load={"step": 11})
    [run] = [each for each in fxckpt.run.run.live_runs if not each.status.stopped]
    run.shutdown()


def test_those_before_the_first_that_another_machine_made_are(root, trained):
    elsewhere = max((whole(each) for each in records(root)), key=lambda each: each.record.step)
    record = Reader(elsewhere.path).record
    vars(record.journal)["machine"] = "another one"
    (elsewhere.path / "commit.json").write_bytes(record.to_bytes())
    found = Life(root, adafactor)
    assert found.restored.step == 10 in journalled(root) and found.at == trained.states[10]


def test_steps_without_sums_are_made_again_on_any_machine(root, one_thread, monkeypatch):
    life = Life(root).train(11).end()
    monkeypatch.setattr("fxckpt.journal.machine.processor", lambda: "another one")
    found = Life(root)
    assert found.restored.step == 11 in journalled(root) and found.at == life.states[11]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_what_chooses_kernels_is_part_of_the_machine(monkeypatch):
    usual = machine(sums=True)
    assert processor() in usual and machine(sums=False) in usual
    with torch.backends.mkldnn.flags(enabled=False):
        assert machine(sums=True) != usual and machine(sums=False) in usual
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    assert machine(sums=True) != usual
    torch.set_float32_matmul_precision(precision)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine(sums=True) != usual


class UnderAutocast(Life):
    """The step is made inside of it."""

    def train(self, upto: int) -> UnderAutocast:
        with torch.autocast("cpu", torch.bfloat16):
            return super().train(upto)


def test_steps_with_sums_under_autocast_are_stored_in_full_and_it_is_said(root, one_thread, caplog):
    with caplog.at_level(logging.WARNING, "fxckpt"):
        life = UnderAutocast(root, adafactor).train(8).end()
    assert journalled(root) == [] and sum("made under autocast" in text for text in caplog.messages) == 1
    assert UnderAutocast(root, adafactor).end().at == life.states[8]
    UnderAutocast(root.with_name("other")).train(5).end()
    assert journalled(root.with_name("other")), "others are the same under it"


def test_a_load_inside_of_autocast_makes_steps_as_they_were(root, trained):
    with torch.autocast("cpu", torch.bfloat16):
        assert Life(root, adafactor).at == trained.states[11]


class Both(Life):
    """Muon for the matrix, another one for all else."""

    def __init__(self, root, **options):
        torch.manual_seed(0)
        self.model = net()
        matrix = self.model[6].weight
        self.opts = [
            torch.optim.Muon([matrix], lr=1e-2),
            torch.optim.AdamW([p for p in self.model.parameters() if p is not matrix]),
        ]
        options = {"every": 1, "keep": 2, "journal": 6, "update": "native", **options}
        self.opt, _ = fxckpt.compile_step(self.opts, root, model=self.model, **options)
        self.restored = fxckpt.load()
        self.states, self.at = {}, self.now()

    def now(self) -> str:
        return digest(self.model, *(dict(each.state_dict().items()) for each in self.opts))

    def train(self, upto: int) -> Both:
        for step in fxckpt.steps(upto):
            self.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            for opt in self.opts:
                opt.step()
                opt.zero_grad()
            self.states[step + 1] = self.now()
        return self


def test_muon_for_matrices_and_adamw_for_the_rest_go_on_from_a_record(root, one_thread):
    stock = Both(root / "stock", journal=1).train(13).end()
    Both(root).train(11).end()
    found = Both(root)
    assert found.restored.path.name == "journal-000000011" and found.at == stock.states[11]
    assert found.train(13).end().states[13] == stock.states[13]
