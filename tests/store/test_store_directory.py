"""One writer per directory: what was there before, the lock, and readers of a slot that is to be rewritten."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import instruments
import pytest
from safetensors.torch import load_file
from storing import CHUNK, names, start

from fxckpt.errors import (
    Cancelled,
    NotAStore,
    SetupError,
    StoreError,
    StoreLocked,
    StoreNotLoaded,
)
from fxckpt.store.files import in_use
from fxckpt.store.reader import candidates, checkpoints, latest
from fxckpt.store.slots import Store

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


FOREIGN = {"lock": b"12345\n", "store.json": b"{}", "step-000000001": None, "named": None, "slot-1.partial": b"",
           "notes.bad": b"x", "lock.tmp": b"x"}  # fmt: skip
"""What others may have under a name that a store gives; None: a directory with a file in it."""


def put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.mkdir(parents=True)
        (path / "weights.pt").write_bytes(b"mine")
    else:
        path.write_bytes(content)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_a_directory_in_which_others_use_a_name_of_ours_is_refused_and_left_alone(root, name):
    root.mkdir()
    (root / "config.yaml").write_text("lr: 1")
    put(root / name, FOREIGN[name])
    before = tree(root)
    with pytest.raises(NotAStore, match=f"{root} holds '{name}'"):
        Store(root)
    with pytest.raises(NotAStore):
        checkpoints(root)
    assert tree(root) == before


def test_files_of_others_stay_as_they_are_beside_a_store_whatever_becomes_of_store_json(root):
    """A run's usual output directory."""
    root.mkdir()
    put(root / "config.yaml", b"lr: 1")
    put(root / "tensorboard", None)
    put(root / "step-1", None)
    put(root / "model.safetensors", b"of somebody else")
    others = tree(root)
    assert checkpoints(root) == [] and latest(root) is None
    for step in (1, 2, 3):
        trainer = start(root, keep=1)
        trainer.save(step)
        trainer.close()
        assert latest(root).step == step
        if step != 2:
            (root / "store.json").unlink()  # as a power cut may
    assert others.items() <= tree(root).items()


@pytest.mark.parametrize("left", [
    {"lock": b""}, {"lock": b"monitor", "store.json": b""}, {"lock": b"", "store.json": b"\0" * 64},
    {"lock": b"", "store.json.tmp": b"", "slot-0.partial": None}, {"lock": b"", "store.json": b"", "named/x.partial": None},
], ids=str)  # fmt: skip
def test_what_a_power_cut_left_of_a_first_run_beside_files_of_others_is_gone_on_with(root, left):
    root.mkdir()
    (root / "config.yaml").write_text("lr: 1")
    for name, content in left.items():
        put(root / name, content)
    trainer = start(root)
    trainer.save(1)
    trainer.close()
    assert latest(root).step == 1 and (root / "config.yaml").read_text() == "lr: 1"


def test_whose_a_store_without_store_json_is_can_be_asked_without_losing_its_lock(root):
    """To close any descriptor of the lock file ends the lock that tells others who has it."""
    trainer = start(root)
    (root / "config.yaml").write_text("lr: 1")
    (root / "store.json").unlink()
    assert checkpoints(root) == []
    code = "import sys; from fxckpt.store.lock import holder; print(holder(sys.argv[1]))"
    said = subprocess.run([sys.executable, "-c", code, str(root)], check=True, capture_output=True, text=True, timeout=60).stdout
    assert said.strip() == str(os.getpid())
    trainer.close()


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
    trainer = start(root)
    trainer.save(1)
    trainer.close()
    for nth in (1, 2, 3):  # store.json, the lock, the record
        store = Store(root)
        instruments.fail(nth, errno.EMFILE, "open")
        with pytest.raises(OSError, match="Too many open files"):
            store.open()
        instruments.fail_none()
        store.open()
        store.close()


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
    slot.remember("plan", {"model.safetensors": {0: 1}, "optimizer.safetensors": {0: 2}}, CHUNK)
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
