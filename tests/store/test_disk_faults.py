"""What a failing disk may and may not cost: promise 7, as far as the store keeps it."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import logging
import os
import weakref
from pathlib import Path

import instruments
import pytest
from storing import all_verify, names, start

from fxckpt.errors import (
    Corrupt,
    SaveFailed,
    SetupError,
    StoreError,
)
from fxckpt.store.reader import Reader, latest


@pytest.fixture(autouse=True)
def no_faults():
    yield
    instruments.fail_none()


def test_a_slot_whose_sync_failed_is_renamed_and_never_used_again(root, caplog):
    trainer = start(root, keep=1, max_async=1)
    trainer.save(1)
    slot, checkpoint = trainer.begin(2)
    assert checkpoint.durable(10)
    instruments.fail(1, errno.EIO, "fsync")
    with pytest.raises(SaveFailed, match=r"fsync .*commit.json.tmp: \[errno 5\]"):
        trainer.finish(2, slot, checkpoint)
    assert [name for name in names(root) if name.endswith(".bad")] == ["slot-1.bad"]
    for step in range(3, 7):
        trainer.save(step)
    assert (root / "slot-1.bad").is_dir() and all_verify(root) == [6]
    assert "not used again" in caplog.text
    trainer.close()
    trainer = start(root, keep=1, max_async=1)
    trainer.save(7)
    assert (root / "slot-1.bad").is_dir()
    trainer.close()


def test_a_full_disk_fails_one_checkpoint_and_the_slot_is_used_again(root):
    trainer = start(root, keep=1, max_async=1)
    trainer.save(1)
    slot, checkpoint = trainer.begin(2)
    assert checkpoint.durable(10)
    instruments.fail(1, errno.ENOSPC, "pwrite")
    with pytest.raises(SaveFailed) as caught:
        trainer.finish(2, slot, checkpoint)
    assert (caught.value.operation, caught.value.errno, caught.value.offset) == ("pwrite", errno.ENOSPC, 0)
    assert caught.value.path.endswith("state.safetensors")
    assert latest(root).step == 1
    trainer.save(3)
    assert names(root) == ["slot-0.partial", "step-000000003"]
    trainer.close()


def test_a_disk_on_which_everything_goes_bad_is_not_filled_with_bad_slots(root, caplog):
    trainer = start(root, keep=1, max_async=1)
    trainer.save(1)
    for _ in range(20):
        try:
            slot = trainer.store.acquire()
        except StoreError as error:
            assert "failing" in str(error)
            break
        trainer.store.abandon(slot, bad=True)
    else:
        pytest.fail("bad slots without end")
    assert latest(root).step == 1
    trainer.close()


def test_the_error_of_a_failed_commit_is_in_no_cycle(root):
    """The collector would take its frames apart, and Python 3.11 crashes at the memoryviews of what was being written."""
    trainer = start(root)
    slot, checkpoint = trainer.begin(1)
    assert checkpoint.durable(10)
    instruments.fail(1, errno.ENOSPC, "pwrite")
    gc.disable()
    try:
        try:
            trainer.finish(1, slot, checkpoint)
        except SaveFailed as error:
            failed = weakref.ref(error)
        assert failed() is None
    finally:
        gc.enable()
    trainer.close()


def test_a_size_that_is_not_the_record_s_is_noticed_before_the_commit(root):
    trainer = start(root)
    slot, checkpoint = trainer.begin(1)
    assert checkpoint.durable(10)
    os.truncate(os.path.join(slot.path, "model.safetensors"), 4096)
    with pytest.raises(SaveFailed, match="4096 bytes"):
        trainer.finish(1, slot, checkpoint)
    assert latest(root) is None
    trainer.close()


def run_with_a_fault(root: Path, first: int) -> int:
    """Open, resume and save three times, whatever fails; returns the newest generation that was acknowledged."""
    acknowledged, trainer = 0, None
    try:
        trainer = start(root, keep=1, max_async=1, items=20)
    except (OSError, SaveFailed):
        return 0
    for step in range(first, first + 3):
        try:
            path = trainer.save(step)
            acknowledged = int(json.loads((path / "commit.json").read_text())["generation"])
        except (SaveFailed, StoreError):
            continue
    trainer.close()
    return acknowledged


@pytest.mark.parametrize("code, there_before", [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, True)])
def test_a_fault_at_the_nth_call_costs_at_most_the_checkpoint_it_hits(root, code, there_before, caplog):
    caplog.set_level(logging.CRITICAL)
    for nth in itertools.count(1):
        store = root / f"{nth}"
        if there_before:
            assert run_with_a_fault(store, 1) == 3
        before = instruments.calls()
        instruments.fail(nth, code)
        acknowledged = run_with_a_fault(store, 4)
        hit = instruments.calls() - before >= nth
        instruments.fail_none()
        all_verify(store)
        newest = latest(store)
        assert (newest.generation if newest else 0) >= max(acknowledged, 3 if there_before else 0)
        trainer = start(store, keep=1, max_async=1, items=20)
        trainer.save(99)
        trainer.close()
        assert latest(store).step == 99
        if not hit:
            break
    assert nth > 100


def test_no_file_outside_the_commit_is_left_in_a_checkpoint(root):
    trainer = start(root)
    path = trainer.save(1)
    record = Reader(path).record
    assert {each.name for each in path.iterdir()} == {file.name for file in record.files} | {"commit.json"}
    assert all(not os.path.isabs(file.name) for file in record.files)
    assert str(root) not in (path / "commit.json").read_text()
    trainer.close()


def test_a_corrupt_state_of_a_partial_does_not_stop_the_next_life(root):
    trainer = start(root, keep=1, max_async=1)
    trainer.save(1)
    trainer.save(2)
    trainer.close()
    (slot,) = root.glob("slot-*.partial")
    (slot / "commit.json").write_bytes(b"\xff" * 100)
    with pytest.raises(Corrupt):
        Reader(slot)
    trainer = start(root, keep=1, max_async=1)
    trainer.save(3)
    trainer.close()


def test_a_named_save_that_is_taken_again_is_the_old_one_or_the_new_one_whatever_fails(tmp_path):
    """A run goes on from before a named save, and takes it once more."""
    for nth in range(1, 100):
        store = tmp_path / str(nth)
        trainer = start(store)
        trainer.save(1)
        trainer.save(2, name="best")
        trainer.close()
        trainer = start(store, load=False)
        trainer.store.mark_loaded(1)
        before = instruments.calls()
        instruments.fail(nth, errno.EIO)
        try:
            trainer.save(3, name="best")
            steps = {3}
        except (SaveFailed, SetupError):
            steps = {2}
        hit = instruments.calls() - before >= nth
        instruments.fail_none()
        best = Reader(store / "named/best")
        best.verify()
        assert best.record.step in steps, nth
        trainer.close()
        start(store).close()
        assert {"best"} <= set(os.listdir(store / "named")) <= {"best", "best.bad"}
        if not hit:
            return
    raise AssertionError("more calls than there are faults")
