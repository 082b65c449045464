"""Damage of a journal is noticed, named, and costs no more than the steps behind it."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch
from journal_lives import Life, net, whole

import fxckpt
from fxckpt.errors import Corrupt, NoCheckpoint
from fxckpt.store.reader import Reader, candidates, records

EVERY = int(os.environ.get("FXCKPT_FLIP_EVERY", "29"))
"""Of so many bytes of a record one has a bit flipped; 1: all of them."""


def tiny() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.Flatten(), torch.nn.Linear(32, 2))


def damage(file, at, bit=0):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1 << bit
    file.write_bytes(raw)


@pytest.fixture
def trained(root, one_thread):
    """A life of eleven steps, with the full ones, and the records behind the newest."""
    life = Life(root).train(11).end()
    fulls = sorted(whole(each).record.step for each in candidates(root))
    rows = sorted((whole(each) for each in records(root)), key=lambda each: each.record.step)
    return life, fulls, [each for each in rows if each.record.step > fulls[-1]], rows


def test_every_flipped_bit_of_a_record_is_noticed(root, one_thread):
    Life(root, model=tiny).train(4).end()
    path = whole(records(root)[0]).path
    chance = random.Random()
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        for at in range(chance.randrange(EVERY), len(raw), EVERY):
            changed = bytearray(raw)
            changed[at] ^= 1 << chance.randrange(8)
            with file.open("r+b") as out:
                out.write(changed)
            with pytest.raises(Corrupt):
                Reader(path).verify()
        file.write_bytes(raw)
    Reader(path).verify()


@pytest.mark.parametrize("name", ["gradients.safetensors", "state.safetensors", "commit.json"])
def test_the_step_before_a_damaged_record_is_loaded_and_it_is_said(root, trained, name):
    life, _fulls, rows, _ = trained
    damage(rows[2].path / name, -100)
    found = Life(root)
    assert found.restored.step == rows[1].record.step and found.at == life.states[found.restored.step]
    assert rows[2].path.name in found.restored.skipped[0][0] + found.restored.skipped[0][1]
    assert found.train(13).end().states[13] == Life(root.with_name("through")).train(13).end().states[13]


def test_a_run_that_has_trained_keeps_what_it_has_until_the_step_is_verified(root, trained):
    life, _, rows, _ = trained
    other = Life(root.with_name("other")).train(3)
    damage(rows[2].path / "gradients.safetensors", -100)
    assert fxckpt.load(root, optimizer=other.opt).step == rows[1].record.step
    assert other.now() == life.states[rows[1].record.step]
    other.end()


def test_a_missing_record_costs_those_behind_it(root, trained):
    life, _, rows, _ = trained
    shutil.rmtree(rows[1].path)
    found = Life(root)
    assert found.restored.step == rows[0].record.step and found.at == life.states[found.restored.step]
    assert "missing" in found.restored.skipped[0][1]


def test_with_a_damaged_base_the_steps_before_it_are_loaded(root, trained):
    life, fulls, _rows, _all_rows = trained
    damage(root / f"step-{fulls[-1]:09d}" / "optimizer.safetensors", -50)
    found = Life(root)
    assert found.restored.step == fulls[-1] - 1 and found.at == life.states[found.restored.step]
    assert f"step-{fulls[-1]:09d}" in found.restored.skipped[0][1]


def test_a_damaged_step_that_was_asked_for_is_an_error(root, trained):
    _, _, rows, _ = trained
    damage(rows[1].path / "gradients.safetensors", -100)
    for step in (rows[1].record.step, rows[2].record.step):
        with pytest.raises(Corrupt, match=rows[1].path.name):
            Life(root, load={"step": step})
        for run in list(fxckpt.run.run.live_runs):
            run.shutdown()
    shutil.rmtree(rows[0].path)
    with pytest.raises((Corrupt, NoCheckpoint), match="missing"):
        Life(root, load={"step": rows[2].record.step})
    for run in list(fxckpt.run.run.live_runs):
        run.shutdown()


def test_a_bit_that_flips_in_memory_while_a_step_is_made_again_is_noticed(root, trained, monkeypatch):
    from fxckpt.journal.replay import Again

    life, _fulls, rows, _ = trained
    step, made = Again.step, []

    def flipping(self, groups, gradients):
        made.append(True)
        if len(made) == 2:  # that of rows[1]
            for param in self.params.values():
                param.data[(0,) * param.dim()].view(torch.int32).bitwise_xor_(1)
        return step(self, groups, gradients)

    monkeypatch.setattr(Again, "step", flipping)
    found = Life(root)
    assert found.restored.step < rows[2].record.step and found.at == life.states[found.restored.step]
    assert "made again" in found.restored.skipped[0][1]


def test_records_of_another_checkpoint_are_damage_in_its_place(root, trained):
    _, _, rows, _ = trained
    shutil.rmtree(rows[2].path)
    shutil.copytree(rows[1].path, rows[2].path)
    assert any(isinstance(each, Corrupt) and "another checkpoint" in str(each) for each in records(root))
    assert Life(root).end().restored.step == rows[1].record.step


def test_weights_alone_fall_back_too(root, trained):
    _life, _, rows, _ = trained
    damage(rows[1].path / "gradients.safetensors", -100)
    model = net()
    assert fxckpt.load(root, model=model).step == rows[0].record.step
