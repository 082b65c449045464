"""Ranks that write one store, where one of them does something else than the others: it is said, and nobody hangs."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace

import pytest
from digests import differences, snapshot
from joint_ranks import Job, Normed, plain
from small_training import Training
from storing import a_record

import fxckpt
from fxckpt.errors import RanksDisagree, SetupError
from fxckpt.loading import apply, made_again
from fxckpt.loading import load as loading
from fxckpt.saving import flights
from fxckpt.store import names
from fxckpt.store.parts import layers_of
from fxckpt.store.reader import Reader, candidates, checkpoints
from fxckpt.store.record import LayerRecord

pytestmark = pytest.mark.usefixtures("one_thread")


def patience(job, seconds: float) -> None:
    """How long a checkpoint waits for a disk, or for other ranks."""
    for run in job.runs:
        run.opt.ckpt._run.saver.loop.stuck_after = seconds


def test_what_one_rank_cannot_begin_the_others_do_not_wait_for(job):
    job.begin(every=2)
    job.train(1)
    assert job.each(lambda rank: job.runs[rank].opt.ckpt.save(name="best")) == [None, None]
    refused = job.each(lambda rank: job.runs[rank].opt.ckpt.save(name="best"))
    assert isinstance(refused[0], SetupError) and isinstance(refused[1], RanksDisagree)
    assert "has a checkpoint 'best' already" in str(refused[1])
    job.train(2)
    assert job.flush() == [None, None]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_save_that_one_rank_alone_calls_fails_and_says_whom_it_waited_for(alone, job, root):
    job.begin(every=2)
    patience(job, 0.5)
    job.train(1)
    with pytest.raises(fxckpt.SaveFailed, match=f"waiting for .*rank.* {1 - alone}.*All ranks must call save"):
        job.runs[alone].opt.ckpt.save(name="best")
    patience(job, 20)
    job.train(2)
    assert job.flush() == [None, None] and [each.step for each in checkpoints(root)] == [2]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_rank_that_ends_with_an_exception_does_not_wait_long_for_those_that_are_dead(alone, job, root, monkeypatch):
    job.begin()
    job.train(1)
    job.flush()
    run = job.runs[alone].train(1).opt.ckpt._run  # the other one makes no second step
    monkeypatch.setattr(flights, "FAREWELL", 0.2)
    ended: list[BaseException | None] = []

    def end():
        with pytest.raises(RanksDisagree, match=f"ends with an exception.* waiting for .*rank.* {1 - alone}") as caught:
            run.end(failed=True)
        ended.append(caught.value)

    job.runs[alone].opt.ckpt.end_step()
    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(60)
    assert len(ended) == 1
    assert [each.step for each in checkpoints(root)] == [1]


def test_a_load_that_failed_on_one_rank_can_be_made_again(job, root, monkeypatch):
    job.begin()
    job.train(2)
    job.end()
    assert job.begin(load=False) == []
    restore = loading._restore

    def failing(found, target, strict, skipped, rank, *more):
        if rank == 1:
            raise fxckpt.LayoutMismatch("for the test")
        return restore(found, target, strict, skipped, rank, *more)

    monkeypatch.setattr(loading, "_restore", failing)
    assert [type(each) for each in job.load()] == [RanksDisagree, fxckpt.LayoutMismatch]
    monkeypatch.setattr(loading, "_restore", restore)
    assert [each.step for each in job.load()] == [2, 2]
    patience(job, 2)
    job.train(1)
    assert job.flush() == [None, None] and checkpoints(root)[-1].step == 3


def failing_on_1(module, name, error, monkeypatch, job):
    """Have a function of a load raise, on rank 1."""
    real = getattr(module, name)

    def found(*given):
        if job.rank == 1:
            raise error
        return real(*given)

    monkeypatch.setattr(module, name, found)


def test_nothing_was_touched_where_one_rank_finds_before_it_reads_that_it_cannot_go_back(job, monkeypatch):
    job.begin()
    job.train(2)
    job.flush()
    before = [snapshot(run.model, run.opt) for run in job.runs]
    failing_on_1(loading, "check_match", fxckpt.LayoutMismatch("for the test"), monkeypatch, job)
    assert [type(each) for each in job.load(step=1)] == [RanksDisagree, fxckpt.LayoutMismatch]
    assert all(not differences(*each) for each in zip(before, (snapshot(run.model, run.opt) for run in job.runs)))
    job.train(1)
    assert job.flush() == [None, None]


def test_no_rank_trains_a_mixture_where_one_cannot_read_what_all_go_back_to(job, monkeypatch):
    job.begin()
    job.train(2)
    job.flush()
    with monkeypatch.context() as patched:
        failing_on_1(apply, "read_tensors", OSError(5, "for the test"), patched, job)
        assert [type(each) for each in job.load(step=1)] == [RanksDisagree, OSError]
    for run in job.runs:
        with pytest.raises(SetupError, match="parts of a corrupt checkpoint: one could not be read to its end"):
            run.train(1)
    assert [each.step for each in job.load(step=1)] == [1, 1]
    job.train(1)


def test_nothing_is_applied_on_any_rank_before_all_have_read_all(job, monkeypatch):
    """The last record's buffers, too, which each rank has for itself."""
    job.begin(make=Normed, every=1, journal=8, update="native")
    job.train(3)
    job.end()
    job.begin(make=Normed, every=1, journal=8, update="native", load=False)
    failing_on_1(made_again, "set_what_is_whole", OSError(5, "for the test"), monkeypatch, job)
    assert [type(each) for each in job.load()] == [RanksDisagree, OSError]
    assert [dict(run.opt.state) for run in job.runs] == [{}, {}]


def test_rank_0_tells_what_became_of_checkpoints_in_the_order_in_which_they_began(job, root):
    """Who hears of the second one takes it that the first was given up, and writes into files that rank 0 is about to move."""
    job.begin(max_async=2)
    first = job.runs[0].opt.ckpt._run.store
    slots = [first.acquire(), first.acquire()]
    for step, slot in enumerate(slots):
        first.begin(slot, step, [], step)
    first.abandon(slots[1], bad=False)
    assert not first._others._said.words
    first.abandon(slots[0], bad=False)
    assert list(first._others._said.words) == ["0.1", "1.1"]


def test_ranks_that_would_save_at_other_steps_are_refused_at_the_start(job, root):
    failed = job.each(lambda rank: Training(root, make=plain, every=2 + rank))
    assert len(failed) == 2 and all(isinstance(each, SetupError) and "the same every=" in str(each) for each in failed)


def test_one_process_goes_on_says_so_and_leaves_nothing_of_the_others(root, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        job = Job(root, patched, world=3)
        job.begin(make=Normed, keep=1)
        job.train(3)
        job.end()
    assert any((root / names.RANKS).rglob("slot-*"))
    alone = Training(root, make=Normed)
    assert fxckpt.load(optimizer=alone.opt).step == 3
    assert "was written by 3 ranks, and 1 goes on from it" in caplog.text
    assert os.listdir(root / names.RANKS) == []
    assert [each.step for each in checkpoints(alone.train(1).end() and root)][-1] == 4


def test_layers_of_one_name_are_two_layers_of_the_whole(job, root):
    """Two optimizers may share a module."""
    layer = LayerRecord(0, "h", "update", 1, 0.0, 3, 0, ())
    records = [a_record(1, (), (layer, replace(layer, parameters=4)), rank=rank) for rank in range(2)]
    assert [each.parameters for each in layers_of(records)] == [3, 4]


def test_the_directory_of_ranks_is_made_anew_when_somebody_removes_it(job, root):
    job.begin()
    job.train(1)
    job.flush()
    shutil.rmtree(root / names.RANKS)
    job.train(2)
    job.flush()  # what was being written there is lost
    job.train(1)
    assert job.flush() == [None, None] and checkpoints(root)[-1].step == 4
    Reader(candidates(root)[0].path).verify()
