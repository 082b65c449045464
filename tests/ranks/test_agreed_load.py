"""All ranks of a job load one step, or none of them loads: two runs in two threads talk over one store, as ranks do."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from small_training import Training

import fxckpt
from fxckpt.compat.ranks import default_store
from fxckpt.errors import LayoutMismatch, RanksDisagree
from fxckpt.loading import load as loading
from fxckpt.ranks.agreement import Agreement, newest_common


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Starts two ranks that load; returns what became of each: what was restored, or the error."""
    store = dist.HashStore()

    def begin(ranks=(0, 1), limit=20.0, **asked):
        runs = {rank: Training(tmp_path / f"rank{rank}", seed=0) for rank in ranks}
        of = {id(run.opt): rank for rank, run in runs.items()}
        monkeypatch.setattr(loading, "agreement_for", lambda target: Agreement(store, of[id(target.optimizers[0])], 2, limit))

        def one(run):
            try:
                return fxckpt.load(optimizer=run.opt, **asked)
            except Exception as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(one, runs.values()))
        return list(runs.values()), found

    return begin


def train(runs, *steps):
    for run, count in zip(runs, steps):
        run.train(count)
        run.opt.ckpt.shutdown()


def test_both_start_at_the_newest_step_that_both_have(two):
    runs, found = two()
    assert [each.step for each in found] == [0, 0]
    train(runs, 5, 3)
    _, found = two()
    assert [each.step for each in found] == [3, 3]


def test_one_bad_chunk_takes_both_back(two, tmp_path):
    runs, _ = two()
    train(runs, 3, 3)
    damage(tmp_path / "rank1" / "step-000000003")
    _, found = two()
    assert [each.step for each in found] == [2, 2]


def test_a_step_of_another_life_is_no_common_one(two):
    runs, _ = two()
    train(runs, 5, 3)
    runs, _ = two()  # both at 3; rank 0 has 4 and 5 of the life before
    train(runs, 0, 2)
    _, found = two()
    assert [each.step for each in found] == [3, 3]


def test_no_fresh_start_beside_a_resumed_one(two, tmp_path):
    runs, _ = two()
    train(runs, 2, 2)
    shutil.rmtree(tmp_path / "rank1")
    _, found = two()
    assert [type(each) for each in found] == [RanksDisagree, RanksDisagree]
    assert "rank 0: steps 2, 1" in str(found[1]) and "rank 1: steps none" in str(found[0])


def test_a_step_that_was_asked_for_must_be_on_both(two):
    runs, _ = two()
    train(runs, 3, 2)
    runs, found = two(step=2)
    assert [each.step for each in found] == [2, 2]
    train(runs, 0, 0)
    assert [type(each) for each in two(step=3)[1]] == [RanksDisagree, RanksDisagree]


def test_a_rank_that_is_missing_is_named(two):
    _, found = two(ranks=(0,), limit=0.2)
    assert isinstance(found[0], RanksDisagree) and "rank 1 of 2 said nothing" in str(found[0])


def test_what_cannot_be_restored_on_one_rank_stops_both(two, monkeypatch):
    runs, _ = two()
    train(runs, 1, 1)
    restore = loading._restore

    def failing(found, *rest):
        if "rank1" in str(found.path):
            raise LayoutMismatch("another model")
        return restore(found, *rest)

    monkeypatch.setattr(loading, "_restore", failing)
    _, found = two()
    assert [type(each) for each in found] == [RanksDisagree, LayoutMismatch] and "rank 1" in str(found[0])


def test_a_store_that_died_is_an_error_of_ours():
    with pytest.raises(RanksDisagree, match="store cannot be reached"):
        server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=2), wait_for_workers=False)
        client = dist.TCPStore("127.0.0.1", server.port, None, False, timeout=timedelta(seconds=2))
        del server
        Agreement(client, 0, 2, 1.0).exchange("has", 1)


def test_the_store_of_the_process_group_is_found_with_its_timeout():
    assert default_store() is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    try:
        store, limit = default_store()
        assert isinstance(store, dist.Store) and limit > 0
        assert store.add("a", 1) == 1 and store.check(["a"]) and not store.check(["b"])
    finally:
        dist.destroy_process_group()


def test_the_newest_common_key_is_in_the_order_of_rank_0():
    a, b, c = (3, 3, "x"), (2, 2, "x"), (1, 1, "x")
    assert newest_common([[a, b, c], [c, b]], set()) == b
    assert newest_common([[a, b, c], [c, b]], {b}) == c
    assert newest_common([[a], [b]], set()) is None


def damage(path: Path) -> None:
    """Flip a bit in the middle of its largest file."""
    file = max(path.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
