"""All ranks of a job load one step, or none of them loads: two runs in two threads talk over one store, as ranks do."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from small_training import Training

import fxckpt
from fxckpt.compat.ranks import default_store
from fxckpt.errors import LayoutMismatch, NoCheckpoint, RanksDisagree, SetupError
from fxckpt.loading import load as loading
from fxckpt.ranks import Agreement, newest_common


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Starts two ranks that load; returns what became of each: what was restored, or the error."""
    store = dist.HashStore()

    def begin(ranks=(0, 1), limit=20.0, silence=20.0, **asked):
        runs = {rank: Training(tmp_path / f"rank{rank}", seed=0) for rank in ranks}
        of = {id(run.opt): rank for rank, run in runs.items()}
        monkeypatch.setattr(
            loading,
            "agreement_for",
            lambda target, asked: Agreement(store, of[id(target.optimizers[0])], 2, limit, silence),
        )

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


def test_another_number_of_ranks_is_said(two, caplog):
    runs, _ = two()
    train(runs, 1, 1)  # in this process, their records say that there is one
    _, found = two()
    assert [each.step for each in found] == [1, 1] and "was written by 1 rank, and 2 go on from it" in caplog.text


def test_a_journal_that_one_process_left_is_not_gone_through_and_it_is_said(two, tmp_path, caplog):
    for rank in range(2):
        run = Training(tmp_path / f"rank{rank}", seed=0, every=1, update="native", journal=4)
        run.train(5)
        run.opt.ckpt.shutdown()
    runs, found = two()
    assert [each.step for each in found] == [2, 2] and "behind step 2, up to step 5, is not made again" in caplog.text
    train(runs, 2, 2)
    _, found = two()
    assert [each.step for each in found] == [4, 4]


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


@pytest.mark.parametrize("there", [0, 1])
def test_a_rank_that_is_missing_is_named(two, there):
    _, found = two(ranks=(there,), limit=0.2)
    assert isinstance(found[0], RanksDisagree) and f"rank {1 - there} of 2 did not come to its fxckpt.load()" in str(found[0])


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
    with pytest.raises(RanksDisagree, match="store, which lives in the launcher or in rank 0, cannot be reached"):
        server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=2), wait_for_workers=False)
        client = dist.TCPStore("127.0.0.1", server.port, None, False, timeout=timedelta(seconds=2))
        del server
        with Agreement(client, 0, 2, 1.0) as agreement:
            agreement.exchange("has", 1)


def test_the_store_of_the_process_group_is_found_with_its_timeout():
    assert default_store() is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    try:
        store, limit = default_store()
        assert isinstance(store, dist.Store) and limit > 0
        assert store.add("a", 1) == 1 and store.check(["a"]) and not store.check(["b"])
    finally:
        dist.destroy_process_group()


def test_what_an_earlier_attempt_of_the_launcher_said_is_not_heard(monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        default_store()[0].set("x", "stale")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert not default_store()[0].check(["x"])
    finally:
        dist.destroy_process_group()


def test_a_slow_restore_is_no_dead_rank(two, monkeypatch):
    runs, _ = two()
    train(runs, 1, 1)
    restore = loading._restore

    def slow(found, *rest):
        if "rank1" in str(found.path):
            time.sleep(1.5)
        return restore(found, *rest)

    monkeypatch.setattr(loading, "_restore", slow)
    assert [each.step for each in two(silence=0.5)[1]] == [1, 1]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_while_it_loads_is_named_by_the_others(dead):
    store = dist.HashStore()
    with Agreement(store, dead, 3, 60.0, 0.3) as victim:
        pass  # its heart stops before it has said anything
    assert victim.rank == dead
    others = [rank for rank in range(3) if rank != dead]

    def say(rank):
        with Agreement(store, rank, 3, 60.0, 0.3) as agreement, pytest.raises(RanksDisagree) as found:
            agreement.exchange("has", 1)
        return str(found.value)

    with ThreadPoolExecutor(2) as pool:
        assert all(
            f"rank {dead} of 3 was in its fxckpt.load() and has shown no sign of life" in each for each in pool.map(say, others)
        )


def test_a_rank_killed_before_its_first_commit_takes_all_back_to_the_beginning(two, caplog):
    runs, _ = two()
    train(runs, 2, 0)  # rank 1 committed nothing
    runs, found = two()
    assert [each.step for each in found] == [0, 0] and [each.path for each in found] == [None, None]
    assert "all ranks start from the beginning" in caplog.text and "rank 1: steps none" in caplog.text
    train(runs, 1, 1)
    assert [each.step for each in two()[1]] == [1, 1]


def test_what_is_damaged_is_not_taken_for_what_never_was(two, tmp_path):
    runs, _ = two()
    train(runs, 2, 0)
    (tmp_path / "rank0" / "step-000000001" / "commit.json").write_text("{}")
    assert [type(each) for each in two()[1]] == [RanksDisagree, RanksDisagree]


def test_a_first_checkpoint_that_is_damaged_is_not_taken_for_one_that_not_all_had(two, tmp_path):
    runs, _ = two()
    train(runs, 1, 1)
    damage(tmp_path / "rank1" / "step-000000001")
    _, found = two()
    assert [type(each) for each in found] == [RanksDisagree, RanksDisagree]
    assert all("1 common one(s) did not verify" in str(each) for each in found)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_ranks_without_a_process_group_are_refused(variable, tmp_path, monkeypatch):
    run = Training(tmp_path / "rank0")
    monkeypatch.setenv(variable, "2")
    with pytest.raises(SetupError, match=f"one of 2 ranks .{variable} says so.*init_process_group"):
        fxckpt.load()
    run.train(1)
    with pytest.raises(NoCheckpoint, match="no checkpoint of step 3"):  # the script has chosen
        fxckpt.load(step=3)
    run.opt.ckpt.shutdown()


def test_the_newest_common_key_is_in_the_order_of_rank_0():
    a, b, c = (3, 3, "x"), (2, 2, "x"), (1, 1, "x")

    def said(*ranks):
        return [{"keys": keys, "kept": []} for keys in ranks]

    assert newest_common(said([a, b, c], [c, b]), set()) == b
    assert newest_common(said([a, b, c], [c, b]), {b}) == c
    assert newest_common(said([a], [b]), set()) is None


def damage(path: Path) -> None:
    """Flip a bit in the middle of its largest file."""
    file = max(path.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
