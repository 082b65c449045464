"""The writer of a store: slots, retention, lineage, the lock, and what a failing disk may and may not cost."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from crash import fast_directory, start
from safetensors.torch import load_file

from fxckpt.engine import io
from fxckpt.errors import (
    Cancelled,
    Corrupt,
    NotAStore,
    SaveFailed,
    SetupError,
    StoreError,
    StoreLocked,
    StoreNotLoaded,
)
from fxckpt.store.files import in_use
from fxckpt.store.reader import Reader, candidates, checkpoints, latest
from fxckpt.store.retention import Standing, ancestors, surplus
from fxckpt.store.slots import Store


@pytest.fixture
def root(tmp_path):
    """Where a store will be: in memory where possible, so that syncs take no time."""
    with fast_directory(tmp_path) as directory:
        yield directory / "checkpoints"


@pytest.fixture(autouse=True)
def no_faults():
    yield
    io.fail_none()


def names(root: Path) -> list[str]:
    """The directories of a store, ``named`` apart."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "named")


def inodes(root: Path) -> set[int]:
    return {path.stat().st_ino for path in root.glob("*/model.safetensors")}


def all_verify(root: Path) -> list[int]:
    """Verify every checkpoint; returns their generations, newest first."""
    found = candidates(root)
    for each in found:
        Reader(each.path).verify()
    return [each.record.generation for each in found]


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
        "model.safetensors", "optimizer.safetensors", "state.safetensors", "commit.json"}
    trainer.close()


def test_what_was_written_is_recalled_only_while_it_is_sure(root):
    trainer = start(root, keep=1, max_async=1)

    def save(step, token="plan"):
        slot, checkpoint = trainer.begin(step)
        recalled = slot.recall("plan")
        slot.remember(token, {"model.safetensors": {0: step}})
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
    slot.remember("plan", {})
    checkpoint.cancel()
    assert checkpoint.settled(10)
    trainer.store.abandon(slot, bad=False)
    assert trainer.store.acquire().recall("plan") == {}, "given up half way"
    trainer.close()


# ---- retention and lineage ----


def choose(checkpoints, keep, lineage=(), pinned=None):
    """The generation that ``surplus`` chooses, from (generation, trust) pairs."""
    chosen = surplus([Standing(generation, None, trust) for generation, trust in checkpoints], keep, lineage, pinned)
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


def test_a_checkpoint_that_is_found_bad_while_running_goes_first(root):
    trainer = start(root, keep=2)
    trainer.save(1)
    trainer.save(2)
    trainer.store.mark_bad(2)
    trainer.save(3)
    assert [each.step for each in checkpoints(root)] == [1, 3]
    trainer.close()


def test_keep_one_says_what_it_cannot_survive(root, caplog):
    start(root, keep=1).close()
    assert "one damaged block" in caplog.text


# ---- a store that was there before ----


def test_starting_over_a_store_that_was_not_loaded_is_an_error_that_says_what_to_do(root):
    trainer = start(root)
    trainer.save(1)
    trainer.close()
    trainer = start(root, load=False)
    with pytest.raises(StoreNotLoaded, match=r"fxckpt.load\(\).*fresh=True"):
        trainer.store.acquire()
    trainer.store.mark_loaded(1)
    trainer.save(2)
    trainer.close()


def test_fresh_gives_the_old_ones_up_only_as_new_ones_become_durable(root):
    trainer = start(root, keep=2)
    for step in (7, 8):
        trainer.save(step)
    trainer.close()
    trainer = start(root, load=False, keep=2, fresh=True)
    trainer.save(1)
    assert {each.step for each in checkpoints(root)} >= {1, 8}
    trainer.save(2)
    trainer.save(3)
    assert [each.step for each in checkpoints(root)] == [2, 3]
    assert candidates(root)[-1].record.parent == 3, "generation 3 was step 1, the first of the new line"
    trainer.close()


@pytest.mark.parametrize("content", ["notes.txt", "step-1", "model.safetensors", "store.json"])
def test_a_directory_of_something_else_is_refused_and_left_alone(root, content):
    root.mkdir()
    (root / content).write_text("{}")
    (root / "other").mkdir()
    with pytest.raises(NotAStore, match=str(root)):
        Store(root)
    with pytest.raises(NotAStore):
        checkpoints(root)
    assert sorted(os.listdir(root)) == sorted([content, "other"])


def test_a_file_in_place_of_the_directory_is_refused(root):
    root.write_text("")
    with pytest.raises(NotAStore, match="not a directory"):
        Store(root)


def test_a_store_of_a_newer_format_is_refused(root):
    start(root).close()
    (root / "store.json").write_text(json.dumps({"format": 2, "store_id": "x"}))
    with pytest.raises(NotAStore, match="newer"):
        Store(root)


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b'{"format":1}', b"[[[["])
def test_a_damaged_store_json_is_rebuilt_from_the_commits(root, damage):
    trainer = start(root)
    trainer.save(1)
    trainer.close()
    old = trainer.store.store_id
    (root / "store.json").write_bytes(damage)
    assert latest(root).step == 1
    trainer = start(root)
    assert trainer.store.store_id == old == json.loads((root / "store.json").read_text())["store_id"]
    trainer.close()


def test_a_checkpoint_of_another_store_is_loaded_but_never_given_up(root, caplog):
    other = root.parent / "other"
    trainer = start(other)
    trainer.save(50)
    trainer.close()
    trainer = start(root)
    trainer.save(1)
    trainer.close()
    (other / "step-000000050").rename(root / "step-000000050")
    trainer = start(root, keep=1)
    for step in (2, 3, 4):
        trainer.save(step)
    assert {each.step for each in checkpoints(root)} == {4, 50} and "another store" in caplog.text
    trainer.close()


def test_construction_touches_nothing(root):
    Store(root / "a")
    assert not root.exists()


@pytest.mark.parametrize("options", [{"keep": 0}, {"max_async": 0}])
def test_limits_below_one_are_refused(root, options):
    with pytest.raises(SetupError):
        Store(root, **options)


def test_a_store_that_is_not_open_says_so(root):
    store = Store(root)
    with pytest.raises(StoreError, match="not open"):
        store.acquire()


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


# ---- readers of a slot that is to be rewritten ----


def test_a_tensor_from_load_file_keeps_its_values_while_its_slot_is_recycled(tmp_path):
    trainer = start(tmp_path / "d", keep=1, max_async=1)
    held = load_file(trainer.save(1) / "model.safetensors")
    for step in range(2, 7):
        trainer.save(step)
        assert len(names(tmp_path / "d")) <= 2
    assert all((tensor == 1).all() for tensor in held.values())
    trainer.close()


def test_a_hard_link_keeps_its_bytes_while_its_slot_is_recycled(tmp_path):
    trainer = start(tmp_path / "d", keep=1, max_async=1)
    os.link(trainer.save(1) / "model.safetensors", tmp_path / "backup")
    for step in range(2, 5):
        trainer.save(step)
    assert (load_file(tmp_path / "backup")["a.weight"] == 1).all()
    trainer.close()


def test_what_somebody_else_sees_is_known_in_each_way_of_seeing_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    assert in_use(str(path)) is None
    with open(path, "rb") as file:
        assert "open or mapped" in in_use(str(path))
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert "open or mapped" in in_use(str(path))
    mapping.close()
    assert in_use(str(path)) is None
    with subprocess.Popen(["sleep", "60"], stdin=path.open("rb")) as other:
        time.sleep(0.05)
        assert "open or mapped" in in_use(str(path))
        other.kill()
    os.link(path, tmp_path / "link")
    assert "hard link" in in_use(str(path))


def test_recalled_chunks_of_a_file_that_was_replaced_are_forgotten(tmp_path):
    trainer = start(tmp_path / "d", keep=1, max_async=1)
    slot, checkpoint = trainer.begin(1)
    slot.remember("plan", {"model.safetensors": {0: 1}, "optimizer.safetensors": {0: 2}})
    held = load_file(trainer.finish(1, slot, checkpoint) / "model.safetensors")
    trainer.save(2)
    slot = trainer.store.acquire()
    assert slot.recall("plan") == {"optimizer.safetensors": {0: 2}} and held
    trainer.close()


def test_somebody_opening_the_file_while_it_is_checked_does_not_end_the_process(tmp_path):
    """A lease that is broken while it is held sends a signal to the holder; by default that is SIGIO, which kills."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    code = "import sys\nwhile True: open(sys.argv[1], 'r+b').close()"
    openers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 1.5
        busy = 0
        while time.monotonic() < deadline:
            busy += in_use(str(path)) is not None
        assert busy > 0
    finally:
        for opener in openers:
            opener.kill()
            opener.wait()
    assert signal.getsignal(signal.SIGURG) == signal.SIG_DFL


# ---- the lock ----

CHILD = """
import sys
from fxckpt.errors import StoreLocked
from fxckpt.store.slots import Store
store = Store(sys.argv[1])
try:
    store.open()
except StoreLocked as error:
    print("locked", error)
else:
    print("open")
"""


def other_process(root) -> str:
    """What another process finds when it opens the store."""
    return subprocess.run([sys.executable, "-c", CHILD, str(root)], check=True, capture_output=True, text=True).stdout


def test_a_second_process_is_told_who_has_the_store(root):
    store = Store(root)
    store.open()
    assert f"pid {os.getpid()}" in other_process(root)
    store.close()
    assert other_process(root) == "open\n"
    store.open()
    store.close()


def test_a_second_store_in_this_process_is_refused_and_does_not_end_the_lock(root):
    store = Store(root)
    store.open()
    (root.parent / "link").symlink_to(root)
    for path in (root, root.parent / "link"):
        with pytest.raises(StoreLocked, match=f"this process \\(pid {os.getpid()}\\)"):
            Store(path).open()
    assert "locked" in other_process(root)
    store.close()


def test_listing_and_verifying_do_not_end_the_lock(root):
    trainer = start(root)
    trainer.save(1)
    checkpoints(root)
    latest(root)
    Store(root)
    assert "locked" in other_process(root)
    trainer.close()


def test_a_dropped_store_gives_its_lock_back(root):
    store = Store(root)
    store.open()
    del store
    assert other_process(root) == "open\n"


def test_a_forked_worker_neither_keeps_the_lock_nor_uses_the_store(root):
    store = Store(root)
    store.open()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            store.acquire()
            os.write(write, b"used")
        except Cancelled:
            store.close()  # must not release the parent's
            os.write(write, b"refused")
        finally:
            time.sleep(30)
            os._exit(0)
    try:
        assert os.read(read, 10) == b"refused"
        assert "locked" in other_process(root)
        store.close()
        assert other_process(root) == "open\n", "the worker is still alive"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_killed_process_leaves_no_lock(root):
    code = CHILD + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code, str(root)]).returncode == -signal.SIGKILL
    Store(root).open()


def test_a_failed_open_leaves_no_lock(root):
    start(root).close()
    (root / "step-000000001").mkdir()
    (root / "step-000000001" / "commit.json").mkdir()  # neither missing nor readable
    with pytest.raises(OSError):
        Store(root).open()
    os.rmdir(root / "step-000000001" / "commit.json")
    Store(root).open()


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


# ---- a failing disk ----


def test_a_slot_whose_sync_failed_is_renamed_and_never_used_again(root, caplog):
    trainer = start(root, keep=1, max_async=1)
    trainer.save(1)
    slot, checkpoint = trainer.begin(2)
    assert checkpoint.durable(10)
    io.fail(1, errno.EIO, "fsync")
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
    io.fail(1, errno.ENOSPC, "pwrite")
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
    for step in range(2, 20):
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
        before = io.calls()
        io.fail(nth, code)
        acknowledged = run_with_a_fault(store, 4)
        hit = io.calls() - before >= nth
        io.fail_none()
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
