"""Ranks that write one store compare what they have: a wrong bit is named, and so is who has it."""

from __future__ import annotations

import os
import random
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from joint_ranks import Job, Normed, plain

import fxckpt
from fxckpt.errors import RanksDisagree
from fxckpt.store.about import diverged
from fxckpt.store.reader import candidates, checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


def spoil(run, name="0.weight", bit=0):
    """One bit of one weight, on one replica; a low one unless said otherwise."""
    weight = dict(run.model.named_parameters())[name]
    weight.data.view(torch.int32).view(-1)[3] ^= 1 << bit


def test_a_flipped_bit_on_one_replica_is_named(job, root, caplog):
    job.begin()
    job.train(2)
    job.flush()
    assert "replicas differ" not in caplog.text
    spoil(job.runs[1])
    job.train(1)
    job.flush()
    assert "replicas differ at step 3" in caplog.text and "0.weight" in caplog.text
    assert "with two ranks nobody can tell" in caplog.text
    record = candidates(root)[0].record
    assert record.step == 3 and any("0.weight" in tensors for *_, tensors in diverged(record))
    assert diverged(candidates(root)[1].record) == []
    job.end()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_with_three_replicas_it_is_said_which_one(bad, root, monkeypatch, caplog):
    job = Job(root, monkeypatch, world=3)
    job.begin()
    job.train(2)
    job.flush()
    assert "replicas differ" not in caplog.text
    spoil(job.runs[bad])
    job.train(4)
    job.flush()
    assert f"it is rank {bad} that went wrong" in caplog.text
    assert not any(f"it is rank {other} that" in caplog.text for other in {0, 1, 2} - {bad})
    job.end()


class Alone(torch.nn.Linear):
    """Gradients that hang on no weight, as DDP has them: a wrong bit stays in its tensor. Two tensors."""

    def forward(self, x):
        return x[:, :4] + 0 * (self.weight.sum() + self.bias.sum())


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_with_three_replicas_it_is_said_which_one_whoever_writes_the_tensor(name, bad, root, monkeypatch, caplog):
    job = Job(root, monkeypatch, world=3)
    job.begin(make=lambda: Alone(8, 4))
    job.train(1)
    job.flush()
    spoil(job.runs[bad], name)
    job.train(4)
    job.end()
    assert f"it is rank {bad} that went wrong" in caplog.text
    assert not any(f"it is rank {other} that" in caplog.text for other in {0, 1, 2} - {bad})
    assert "went wrong" not in caplog.text.split("replicas differ")[1]  # one look tells of a difference only


def test_with_raise_the_next_step_of_rank_0_says_so_and_no_such_checkpoint_is_made(job, root):
    job.begin(on_divergence="raise")
    job.train(1)
    job.flush()
    spoil(job.runs[1])
    job.train(1)
    failed = job.flush()
    assert isinstance(failed[0], fxckpt.Diverged) and isinstance(failed[1], RanksDisagree)
    assert [each.step for each in checkpoints(root)] == [1]
    job.end()


def a_run(dice: random.Random) -> dict[str, Any]:
    """Options of a run of chance."""
    optimizer = dice.choice([torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, partial(torch.optim.SGD, momentum=0.9)])
    return {
        "make": dice.choice([plain, Normed]), "optimizer": optimizer, "every": dice.randint(1, 2), "keep": dice.randint(1, 3),
        "max_async": dice.randint(2, 3), "threads": dice.randint(1, 2), "read_back": dice.choice(["off", "all"]),
    }  # fmt: skip


def test_replicas_are_accused_once_a_bit_is_flipped_and_never_before(tmp_path, monkeypatch, caplog, counted):
    """``FXCKPT_LIVES`` runs of chance, of two to four ranks each."""
    dice = random.SystemRandom()
    for n in range(int(os.environ.get("FXCKPT_LIVES", "2"))):
        with monkeypatch.context() as patched:  # which else holds every job to the end
            job, options = Job(tmp_path / str(n), patched, world=dice.randint(2, 4)), a_run(dice)
            assert not [each for each in job.begin(**options) if isinstance(each, Exception)]
            for _ in range(dice.randint(1, 4)):
                job.train(dice.randint(1, 3))
                assert job.flush() == [None] * job.world
            assert "differ" not in caplog.text, options
            name = "0.weight" if options["make"] is plain else "inner.0.weight"
            spoil(job.runs[-1], name, bit=20)  # no update that is far larger than the weight rounds this difference away
            for _ in range(4 * job.world):  # each looks at another one in turn
                job.train(1)
                job.flush()
                if named := "have other bits in layer" in caplog.text:
                    break
            assert named, options
            job.end()
        caplog.clear()
        counted("runs of replicas", 1)
        shutil.rmtree(job.root)


def test_ranks_that_train_models_of_their_own_make_no_mixture(job, root):
    job.begin()
    with torch.no_grad():
        job.runs[1].model[0].weight.add_(1)
    job.train(1)
    failed = job.flush()
    assert "the ranks are no replicas" in str(failed[0]) and isinstance(failed[1], RanksDisagree)
    assert checkpoints(root) == []
    job.end()


def test_nobody_looks_if_that_is_asked_for(job, caplog):
    job.begin(on_divergence="off")
    spoil(job.runs[1])
    job.train(2)
    job.flush()
    assert "differ" not in caplog.text
    job.end()
