"""While ranks train, each with a store of its own, a step that all of them have is never given up."""

from __future__ import annotations

import os
import random
import signal
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
import torch.distributed as dist
from small_training import Training
from storing import start
from waiting import until

from fxckpt.compiled_optimizer import together
from fxckpt.errors import SaveFailed, SetupError
from fxckpt.ranks.common import Decision, Holder, Promise, decide, least_kept
from fxckpt.ranks.peers import Peers
from fxckpt.store.about import job
from fxckpt.store.reader import candidates, checkpoints, read_record

RANKS, WINDOW = 3, 3


class Rank:
    """A rank of the model: it commits steps in order, misses some, and keeps the newest ``WINDOW`` and what it must hold."""

    def __init__(self, rank):
        self.holder, self.disk, self.heard = Holder(rank, None), [], Decision(None, (-1,) * RANKS)

    def commit(self, step):
        self.disk.append((step, step, "life"))

    def retain(self, held):
        newest = self.disk[-WINDOW:]
        self.disk = [key for key in self.disk if key in newest or key in held]


def play(seed, hold=lambda holder: holder.held()):
    """A random interleaving of commits, promises and messages that come late; yields after each step of it what was decided and
    all ranks."""
    draw = random.Random(seed)
    ranks = [Rank(rank) for rank in range(RANKS)]
    said, decision, sent = [Promise() for _ in ranks], Decision(None, (-1,) * RANKS), [Decision(None, (-1,) * RANKS)]
    steps = [0] * RANKS
    for _ in range(200):
        at = draw.randrange(RANKS)
        rank = ranks[at]
        match draw.randrange(4):
            case 0 if steps[at] < min(steps) + WINDOW:  # gradients are averaged: nobody is far ahead
                steps[at] += 1
                if draw.random() < 0.7:  # else this one failed
                    rank.commit(steps[at])
            case 1 if not rank.holder.waits:
                said[at] = rank.holder.make(rank.disk[-WINDOW:])
            case 2:
                decision = decide(decision, said)
                sent.append(decision)
            case 3:
                rank.heard = max(rank.heard, draw.choice(sent[-3:]), key=lambda each: each.seen)
                rank.holder.hear(rank.heard)
        rank.retain(hold(rank.holder))
        yield decision, ranks


def violations(**how):
    """How many of many interleavings lose a step that was decided."""
    return sum(
        any(now.common is not None and any(now.common not in each.disk for each in ranks) for now, ranks in play(seed, **how))
        for seed in range(300)
    )


def test_what_was_decided_is_held_by_every_rank_whatever_comes_late():
    assert violations() == 0
    found = [list(play(seed))[-1][0].common for seed in range(50)]
    assert sum(each is not None for each in found) > 45  # and there is progress


def test_a_rank_that_goes_by_what_it_believes_to_be_common_loses_it():
    assert violations(hold=lambda holder: {holder.common} if holder.common else set()) > 0
    assert violations(hold=lambda holder: set(holder.promise.keys)) > 0


class Job:
    """Ranks with real stores and one key-value store between them."""

    def __init__(self, root, store, keep=2):
        self.trainers = [start(root / f"rank{rank}", keep=least_kept(keep, 1), max_async=1) for rank in range(2)]
        self.peers = [
            Peers(store, rank, 2, "p", trainer.store.hold, least_kept(keep, 1), None)
            for rank, trainer in enumerate(self.trainers)
        ]
        for each in self.peers:
            each.start()

    def commit(self, rank, step):
        generation = read_record(str(self.trainers[rank].save(step))).generation
        self.peers[rank].committed((step, step, "life"), generation)

    def steps(self, rank):
        return {each.step for each in checkpoints(self.trainers[rank].store.root)}

    def close(self):
        for each in self.peers:
            each.stop()
        for each in self.trainers:
            each.close()
        assert not any(thread.name == "fxckpt-ranks" for thread in threading.enumerate())


@pytest.mark.parametrize("slow", [0, 1])
def test_with_two_to_keep_and_a_slow_rank_a_common_step_stays(root, slow):
    job = Job(root, dist.HashStore())
    job.commit(slow, 1)
    job.commit(1 - slow, 1)
    until(lambda: all(each.common == (1, 1, "life") for each in job.peers), 5.0)
    for step in range(2, 12):  # the other's disk fails, for a while
        job.commit(1 - slow, step)
    assert {1, 10, 11} <= job.steps(1 - slow) and job.steps(slow) == {1}
    assert len(job.steps(1 - slow)) <= 1 + 3 * least_kept(2, 1)  # the common one, two promises, the newest
    job.commit(slow, 11)
    until(lambda: all(each.common == (11, 11, "life") for each in job.peers), 5.0)
    for step in (12, 13, 14, 15):
        job.commit(0, step)
        job.commit(1, step)
    until(lambda: all(each.common == (15, 15, "life") for each in job.peers), 5.0)
    assert 1 not in job.steps(0) | job.steps(1)  # and room is given back
    job.close()


def test_when_the_store_of_the_process_group_dies_checkpoints_go_on_and_the_common_step_stays(root, caplog):
    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=2), wait_for_workers=False)
    job = Job(root, dist.TCPStore("127.0.0.1", server.port, None, False, timeout=timedelta(seconds=2)))
    job.commit(0, 1)
    job.commit(1, 1)
    until(lambda: all(each.common is not None for each in job.peers), 5.0)
    del server
    until(lambda: "hears nothing of the others" in caplog.text, 5.0)
    for step in range(2, 9):
        job.commit(0, step)
    assert {1, 7, 8} <= job.steps(0) and len(job.steps(0)) <= 1 + 3 * least_kept(2, 1)
    job.close()


def test_a_monitor_holds_what_other_ranks_rely_on_and_so_does_the_one_that_takes_its_place(root, caplog):
    run = Training(root, keep=2, writer="monitor", on_error="warn").train(1)
    run.opt.ckpt.flush()
    store, (first,) = run.opt.ckpt._run.store, candidates(root)

    def steps():
        with suppress(SaveFailed):  # of a step whose slot the dead monitor had made ready
            run.opt.ckpt.flush()
        return {each.step for each in checkpoints(root)}

    assert store.hold([first.record.generation, 99]) == [first.record.generation]
    run.train(4)
    assert {1, 4, 5} <= steps()
    pid = store.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: "SIGKILL" in caplog.text)
    run.train(5)
    assert {1, 10} <= steps() and store.pid != pid
    assert store.hold([]) == []
    run.train(4)
    assert 1 not in steps()
    run.end()


@pytest.fixture
def group(monkeypatch):
    """This process is rank 0 of 2, and nobody else is there: a group of torch's for tests, whose collectives do nothing. Nobody
    is asked where his store is: each has one of its own."""
    monkeypatch.setattr(together, "agreement_here", lambda: None)
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers its backend

    store = dist.HashStore()
    dist.init_process_group("fake", rank=0, world_size=2, store=store)
    yield store
    dist.destroy_process_group()


@pytest.mark.parametrize("every", ["auto", "continuous"])
def test_ranks_that_would_checkpoint_at_other_steps_are_refused(every, root, group):
    with pytest.raises(SetupError, match=f"every='{every}' has each rank take its checkpoints.*every=N"):
        Training(root, every=every)


def test_each_rank_keeps_what_the_slowest_may_need_and_a_record_tells_its_life_without_a_load(root, group):
    run = Training(root, keep=1, max_async=2).train(6)
    run.opt.ckpt.shutdown()
    found = [job(each.record) for each in candidates(root)]
    assert len(found) >= 3 and len({each.life for each in found}) == 1 and found[0].life
    again = Training(root, keep=1, fresh=True).train(1)
    again.opt.ckpt.shutdown()
    newest = candidates(root)[0]
    assert newest.record.step == 1 and job(newest.record).life not in ("", found[0].life)
