"""The writer of a store: slots that are recycled, retention, lineage, named saves."""

from __future__ import annotations

import os
import threading
import time

import pytest
from storing import CHUNK, a_record, all_verify, inodes, names, overlay, start

from fxckpt.errors import (
    SetupError,
    StoreError,
)
from fxckpt.store.reader import Reader, candidates, checkpoints, latest
from fxckpt.store.retention import CheckpointStatus, ancestors, surplus

# ---- slots ----


def test_slots_are_recycled_in_place_and_never_more_than_keep_and_in_flight(root):
    trainer = start(root, keep=2, max_async=2)
    for step in range(4):
        trainer.save(step)
    before = inodes(root)
    for step in range(4, 12):
        trainer.save(step)
        assert len(names(root)) <= 4 and len(all_verify(root)) == 2
    assert inodes(root) == before
    trainer.close()


def test_all_slots_are_in_use_with_everything_in_flight(root):
    trainer = start(root, keep=2, max_async=3)
    for first in range(0, 12, 3):
        begun = [(step, *trainer.begin(step)) for step in range(first, first + 3)]
        assert len({slot.path for _, slot, _ in begun}) == 3
        with pytest.raises(StoreError, match="3 checkpoints are in flight"):
            trainer.store.acquire()
        for each in begun:
            trainer.finish(*each)
        assert len(names(root)) <= 5
    assert all_verify(root) == [12, 11]
    trainer.close()


def test_commits_out_of_order_keep_generations_in_training_order(root):
    trainer = start(root, keep=3, max_async=2)
    first, second = trainer.begin(1), trainer.begin(2)
    trainer.finish(2, *second)
    trainer.finish(1, *first)
    trainer.save(3)
    found = {each.record.step: each.record for each in candidates(root)}
    assert [found[step].generation for step in (1, 2, 3)] == [1, 2, 3]
    assert found[3].parent == 2
    trainer.close()


def test_slots_left_by_a_killed_run_are_used_again(root):
    trainer = start(root, keep=2)
    for step in range(4):
        trainer.save(step)
    trainer.begin(4)
    trainer.begin(5)
    before, files = names(root), inodes(root)
    trainer.engine.close()
    trainer.store.close()
    trainer = start(root, keep=2)
    trainer.save(6)
    assert len(names(root)) == len(before) == 4 and inodes(root) == files
    trainer.close()


def test_a_lower_limit_is_reached_again(root):
    trainer = start(root, keep=5, max_async=3)
    for step in range(8):
        trainer.save(step)
    trainer.close()
    trainer = start(root, keep=2, max_async=1)
    for step in range(8, 12):
        trainer.save(step)
    assert len(names(root)) == 3 and all_verify(root) == [12, 11]
    trainer.close()


def test_files_of_an_earlier_plan_are_removed(root):
    trainer = start(root, keep=1, max_async=1)
    trainer.save(1)
    trainer.save(2)
    (slot,) = root.glob("slot-*.partial")
    (slot / "old.safetensors").write_bytes(b"x" * 5000)
    assert {path.name for path in trainer.save(3).iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.safetensors",
        "commit.json",
    }
    trainer.close()


def test_what_was_written_is_recalled_only_while_it_is_sure(root):
    trainer = start(root, keep=1, max_async=1)

    def save(step, token="plan"):
        slot, checkpoint = trainer.begin(step)
        recalled = slot.recall("plan")
        slot.remember(token, {"model.safetensors": {0: step}}, CHUNK)
        trainer.finish(step, slot, checkpoint)
        return recalled

    assert [save(1), save(2)] == [{}, {}]
    assert save(3) == {"model.safetensors": {0: 1}}
    save(4, token="another plan")
    save(5)
    assert save(6) == {}, "noted for another plan"
    trainer.save(7)
    trainer.save(8)
    assert save(9) == {}, "written since without a note"
    slot, checkpoint = trainer.begin(10)
    assert slot.recall("plan") == {}
    slot.remember("plan", {}, CHUNK)
    checkpoint.cancel()
    assert checkpoint.settled(10)
    trainer.store.abandon(slot, bad=False)
    assert trainer.store.acquire().recall("plan") == {}, "given up half way"
    trainer.close()


# ---- retention and lineage ----


def choose(checkpoints, keep, lineage=(), pinned=None):
    """The generation that ``surplus`` chooses, from (generation, trust) pairs."""
    chosen = surplus([CheckpointStatus(generation, None, trust) for generation, trust in checkpoints], keep, lineage, pinned)
    return chosen and chosen.generation


@pytest.mark.parametrize("checkpoints, keep, lineage, pinned, gone", [
    ([(1, "good"), (2, "good"), (3, "good")], 2, {1, 2, 3}, None, 1),  # the oldest
    ([(1, "good"), (2, "good"), (3, "good")], 2, {1, 3}, None, 2),  # an abandoned one before an older one
    ([(1, "good"), (2, "bad"), (3, "good")], 2, {1, 2, 3}, None, 2),  # a bad one before all
    ([(1, "good"), (2, "good")], 2, {1, 2}, None, None),  # none while no more than keep are good
    ([(1, "unknown"), (2, "unknown"), (3, "good")], 2, {1, 2, 3}, None, None),  # unknown ones do not count as good
    ([(1, "unknown"), (2, "good"), (3, "good")], 2, {1, 2, 3}, None, 1),
    ([(1, "good"), (2, "good"), (3, "good")], 2, {1, 2, 3}, 1, 2),  # never the loaded one
    ([(1, "bad"), (2, "good")], 2, {1, 2}, None, 1),  # a bad one is worth nothing
    ([(1, "bad"), (2, "unknown")], 1, {1, 2}, None, None),  # but nothing goes while nothing is known to be good
    ([], 1, (), None, None),
])  # fmt: skip
def test_retention_gives_up_bad_then_abandoned_then_oldest_and_keeps_enough(checkpoints, keep, lineage, pinned, gone):
    assert choose(checkpoints, keep, lineage, pinned) == gone


def test_ancestors_end_at_a_gap_and_survive_a_loop():
    assert ancestors({5: 3, 3: 2, 4: 3}, 5) == {5, 3, 2}
    assert ancestors({5: 4, 4: 5}, 5) == {5, 4}


def test_records_say_what_they_continue(root):
    trainer = start(root, keep=9)
    trainer.save(1)
    trainer.save(2)
    trainer.close()
    trainer = start(root, keep=9)
    trainer.save(3)
    trainer.store.mark_loaded(1)
    trainer.save(2)
    trainer.save(3)
    parents = {each.record.generation: each.record.parent for each in candidates(root)}
    assert parents == {1: None, 2: 1, 3: 2, 4: 1, 5: 4}
    trainer.close()


def test_a_step_that_an_earlier_life_left_gets_a_name_of_its_own(root):
    trainer = start(root, keep=9)
    trainer.save(1)
    trainer.save(2)
    trainer.store.mark_loaded(1)
    assert trainer.save(2).name == "step-000000002-g3"
    assert latest(root).path.name == "step-000000002-g3"
    trainer.close()


def test_after_a_rollback_the_abandoned_branch_goes_first(root):
    trainer = start(root, keep=3)
    for step in (1, 2, 3):
        trainer.save(step)
    trainer.store.mark_loaded(1)
    trainer.save(11)
    assert {each.step for each in checkpoints(root)} == {1, 3, 11}
    trainer.save(12)
    assert {each.step for each in checkpoints(root)} == {1, 11, 12}
    trainer.save(13)
    assert {each.step for each in checkpoints(root)} == {11, 12, 13}
    trainer.close()


def test_a_slot_taken_before_a_rollback_continues_what_was_loaded(root):
    trainer = start(root, keep=2)
    for step in (1, 2):
        trainer.save(step)
    slot = trainer.store.acquire()  # ahead of time, as a trainer that does not want to wait for it does
    trainer.store.mark_loaded(1)
    trainer.store.commit(slot, a_record(2), {})
    assert candidates(root)[0].record.parent == 1
    assert [each.generation for each in checkpoints(root)] == [1, 3], "the abandoned one went, not the new one"
    trainer.close()


def test_the_loaded_checkpoint_stays_until_a_newer_one_is_committed(root):
    trainer = start(root, keep=1, max_async=1)
    trainer.save(1)
    trainer.close()
    trainer = start(root, keep=1, max_async=1)
    slot, checkpoint = trainer.begin(2)
    assert latest(root).step == 1
    checkpoint.cancel()
    assert checkpoint.settled(10)
    trainer.store.abandon(slot, bad=False)
    assert latest(root).step == 1
    trainer.save(3)
    assert [each.step for each in checkpoints(root)] == [3]
    trainer.close()


def test_checkpoints_of_an_earlier_life_are_read_before_one_is_given_up_for_want_of_room(root):
    trainer = start(root, keep=3, max_async=1)
    for step in range(1, 4):
        trainer.save(step)
    trainer.close()
    (root / "step-000000001" / "optimizer.safetensors").write_bytes(b"rot")
    trainer = start(root, keep=3, max_async=1)
    for step in range(4, 7):
        trainer.save(step)
        assert len(names(root)) <= 4
    assert all_verify(root) == [6, 5, 4]
    trainer.close()


def test_a_damaged_checkpoint_goes_before_a_good_older_one(root):
    trainer = start(root, keep=2)
    trainer.save(1)
    trainer.save(2)
    trainer.close()
    (root / "step-000000002" / "commit.json").write_text("{}")
    trainer = start(root, keep=2)
    assert trainer.save(3).parent == root
    assert [each.step for each in checkpoints(root)] == [1, 3]
    assert len(names(root)) == 3
    trainer.close()


def test_keep_one_says_what_it_cannot_survive(root, caplog):
    start(root, keep=1).close()
    assert "one damaged block" in caplog.text


# ---- named saves ----


def test_a_named_save_is_never_recycled_and_does_not_count(root):
    trainer = start(root, keep=1, max_async=1)
    trainer.save(1)
    path = trainer.save(1, name="best so far")
    for step in range(2, 6):
        trainer.save(step)
    assert path == root / "named" / "best so far"
    assert Reader(path).record.name == "best so far"
    assert len(names(root)) == 2 and {each.name for each in checkpoints(root)} == {None, "best so far"}
    trainer.close()
    trainer = start(root, keep=1, max_async=1)
    trainer.save(6)
    assert path.is_dir()
    trainer.close()


def test_a_named_save_goes_beside_checkpoints_in_flight(root):
    trainer = start(root, keep=1, max_async=1)
    slot, checkpoint = trainer.begin(1)
    trainer.save(1, name="x")
    trainer.finish(1, slot, checkpoint)
    trainer.close()


def test_a_name_that_is_taken_is_refused_before_anything_is_written(root):
    trainer = start(root)
    trainer.save(1, name="best")
    with pytest.raises(SetupError, match="'best' already"):
        trainer.store.acquire("best")
    slot = trainer.store.acquire("other")
    with pytest.raises(SetupError, match="'other' already"):
        trainer.store.acquire("other")
    trainer.store.abandon(slot, bad=False)
    assert os.listdir(root / "named") == ["best"]
    trainer.close()


def test_a_run_that_goes_on_from_before_a_named_save_takes_it_again(root):
    trainer = start(root, keep=3)
    trainer.save(1)
    trainer.save(1, name="first")
    trainer.save(2)
    trainer.save(3, name="best")
    trainer.close()
    trainer = start(root, keep=3, load=False)
    trainer.store.mark_loaded(3)
    path = trainer.save(4, name="best")
    assert Reader(path).verify() is None and Reader(path).record.step == 4
    assert sorted(os.listdir(root / "named")) == ["best", "first"]
    for name in ("best", "first"):  # it was made in this life; this run goes on from behind it
        with pytest.raises(SetupError, match=f"{name!r} already"):
            trainer.store.acquire(name)
    trainer.close()


def test_a_run_that_begins_anew_keeps_the_named_saves_of_the_one_before(root):
    trainer = start(root)
    trainer.save(1, name="best")
    trainer.close()
    trainer = start(root, load=False, fresh=True)
    trainer.store.mark_loaded(None)
    with pytest.raises(SetupError, match="'best' already"):
        trainer.store.acquire("best")
    trainer.close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", ".hidden", "x.partial", "x.bad", "x" * 201, "a\0b", 5])
def test_a_name_that_cannot_be_a_directory_is_refused(root, name):
    trainer = start(root)
    with pytest.raises(SetupError):
        trainer.store.acquire(name)
    trainer.close()


def test_a_named_save_that_a_crash_cut_off_is_removed(root):
    trainer = start(root)
    trainer.save(1)
    trainer.begin(2, name="best")
    trainer.engine.close()
    trainer.store.close()
    trainer = start(root)
    assert os.listdir(root / "named") == []
    trainer.save(2, name="best")
    trainer.close()


# ---- threads ----


def test_committing_in_one_thread_while_acquiring_in_another(root):
    trainer = start(root, keep=2, max_async=2)
    errors = []

    def loop(steps):
        try:
            for step in steps:
                slot = trainer.store.acquire()
                trainer.store.abandon(slot, bad=False)
                time.sleep(0.0005 * (step % 3))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=loop, args=(range(200),))
    thread.start()
    for step in range(60):
        trainer.save(step)
    thread.join()
    assert not errors and len(names(root)) <= 4
    assert all_verify(root)[0] == max(all_verify(root))
    trainer.close()


def test_over_a_container_s_image_checkpoints_are_taken_and_those_of_the_image_stay(root, monkeypatch):
    trainer = start(root, keep=2)
    for step in range(1, 6):
        trainer.save(step)
    trainer.close()
    before = names(root)
    assert any(name.startswith("slot-") for name in before)
    overlay(monkeypatch, root)
    trainer = start(root, keep=2)
    for step in range(6, 14):
        trainer.save(step)
    trainer.close()
    all_verify(root)
    assert [each.step for each in checkpoints(root)] == [4, 5, 12, 13]
    assert not [name for name in names(root) if name.endswith(".bad")]
