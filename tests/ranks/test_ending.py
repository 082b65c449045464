"""Ranks that a signal asks to end take their last checkpoint of one step, wherever it finds them."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fxckpt.errors import RanksDisagree
from fxckpt.ranks import ending
from fxckpt.ranks.ending import Ending


class Lockstep:
    """Ranks whose steps begin with a collective: nobody makes a step before all have come to it."""

    def __init__(self, world, monkeypatch, patience=0.05):
        monkeypatch.setattr(ending, "PATIENCE", patience)
        self.store, self.world = dist.HashStore(), world
        self.barrier = threading.Barrier(world, timeout=20)

    def rank(self, rank, signalled, draw):
        """Steps from 1 on; the signal comes before this one begins its own part. Returns the step that it ended at."""
        mine = Ending(self.store, rank, self.world, "end")
        for step in range(1, 100):
            self.barrier.wait()  # the backward
            if draw.random() < 0.5:
                threading.Event().wait(draw.random() * 0.03)
            if step >= signalled and mine.is_here(step):
                return step
        return None

    def run(self, signalled, draw):
        draws = [random.Random(draw.random()) for _ in signalled]
        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(self.rank, range(self.world), signalled, draws))


@pytest.mark.parametrize("world", [2, 3])
def test_signals_on_both_sides_of_a_step_end_all_at_one(world, monkeypatch):
    for seed in range(12):
        draw = random.Random(seed)
        first = draw.randint(1, 3)
        ends = Lockstep(world, monkeypatch).run([first + draw.randint(0, 1) for _ in range(world)], draw)
        assert len(set(ends)) == 1 and ends[0] >= first, (seed, ends)


def test_a_rank_whose_signal_the_others_never_get_ends_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr(ending, "PATIENCE", 0.01)
    alone = Ending(dist.HashStore(), 0, 2, "end")
    assert [alone.is_here(step) for step in (5, 6, 7)] == [False, False, True]
    assert "not all ranks were asked to end: this one's last checkpoint is of step 7" in caplog.text


def test_a_store_that_is_gone_holds_nobody(monkeypatch, caplog):
    alone = Ending(dist.HashStore(), 0, 2, "end")

    def gone(step):
        raise RanksDisagree("gone")

    monkeypatch.setattr(alone, "_decided", gone)
    assert alone.is_here(3) and "a step that other ranks may not have" in caplog.text


def test_what_one_rank_has_decided_holds_for_one_that_comes_later(monkeypatch):
    """It had given this step up; the other one must not take what looks like its consent."""
    monkeypatch.setattr(ending, "PATIENCE", 0.01)
    store = dist.HashStore()
    early, late = Ending(store, 0, 2, "end"), Ending(store, 1, 2, "end")
    assert not early.is_here(4)
    assert not late.is_here(4)
