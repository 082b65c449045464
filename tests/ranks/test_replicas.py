"""Ranks that write one store compare what they have: a wrong bit is named, and so is who has it."""

from __future__ import annotations

import pytest
import torch
from joint_ranks import Job, Normed

import fxckpt
from fxckpt.errors import RanksDisagree
from fxckpt.store.about import diverged
from fxckpt.store.reader import candidates, checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


def spoil(run, name="0.weight"):
    """One low bit of one weight, on one replica."""
    weight = dict(run.model.named_parameters())[name]
    weight.data.view(torch.int32).view(-1)[3] ^= 1


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


def test_replicas_without_a_difference_are_never_accused(root, monkeypatch, caplog):
    job = Job(root, monkeypatch, world=3)
    job.begin(make=Normed)
    job.train(12)
    job.flush()
    assert "differ" not in caplog.text and len(checkpoints(root)) > 5
    job.end()


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
