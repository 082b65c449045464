"""What somebody puts in the place of a store's files and directories: nothing is written through it, and training goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat

import instruments
import pytest
from storing import all_verify, fast_directory, start

from fxckpt.cli import main
from fxckpt.errors import Corrupt, FxckptError, SaveFailed
from fxckpt.store.reader import Reader, checkpoints, latest
from fxckpt.store.slots import Store

THINGS = ("link to a file", "link to nothing", "link to a directory", "pipe", "directory")
FILES = ("model.safetensors", "optimizer.safetensors", "state.safetensors", "commit.json", "commit.json.tmp")


@pytest.fixture
def base(tmp_path):
    """Where the store and what is beside it are: in memory where possible, so that syncs take no time."""
    with fast_directory(tmp_path) as directory:
        yield directory


@pytest.fixture
def root(base):
    return base / "checkpoints"


@pytest.fixture
def outside(base):
    """What is not the store's; the test fails if any of it is changed."""
    place = base / "outside"
    place.mkdir()
    (place / "precious").write_bytes(b"precious" * 1000)
    (place / "folder").mkdir()
    (place / "folder/model.safetensors").write_bytes(b"mine")
    before = content(place)
    yield place
    assert content(place) == before, "something outside the store was changed"


def content(place):
    """All files below a directory, with their bytes."""
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in sorted(place.rglob("*"))}


def put(thing, path, outside):
    """Put something in the place of a file or directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if thing == "pipe":
        os.mkfifo(path)
    elif thing == "directory":
        path.mkdir()
        (path / "inside").write_text("x")
    else:
        targets = {"link to a file": "precious", "link to nothing": "nothing", "link to a directory": "folder"}
        path.symlink_to(outside / targets[thing])


def aside(root):
    """What was put aside in the store's directory."""
    return sorted(path.name for path in root.iterdir() if path.name.endswith(".bad"))


def go_on(trainer, root, first):
    """Three more checkpoints; the last two of them are there and verify."""
    for step in range(first, first + 3):
        with contextlib.suppress(FxckptError):  # the one that is hit may fail, and says so
            trainer.save(step)
    assert {first + 1, first + 2} <= {each.step for each in checkpoints(root)}
    all_verify(root)


@pytest.mark.parametrize("writer", ["thread", "monitor"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("thing", THINGS)
def test_what_lies_in_the_place_of_a_file_of_a_waiting_slot_is_put_aside(root, outside, thing, file, writer, caplog):
    trainer = start(root, keep=2, max_async=1, writer=writer)
    for step in (1, 2, 3):
        trainer.save(step)
    (slot,) = root.glob("slot-*.partial")
    put(thing, slot / file, outside)
    go_on(trainer, root, 4)
    trainer.close()
    assert aside(root) == [f"{file}.bad"]
    if writer == "thread":
        assert f"{file} was " in caplog.text and "put aside" in caplog.text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("thing", THINGS)
def test_what_appears_in_a_slot_while_it_is_written_costs_that_checkpoint_at_most(root, outside, thing, file):
    trainer = start(root, keep=2, max_async=1)
    for step in (1, 2, 3):
        trainer.save(step)
    slot, checkpoint = trainer.begin(4)
    put(thing, root / slot.entry / file, outside)
    with contextlib.suppress(SaveFailed):
        trainer.finish(4, slot, checkpoint)
    go_on(trainer, root, 5)
    trainer.close()


@pytest.mark.parametrize("thing", THINGS)
def test_a_file_of_a_checkpoint_that_is_no_file_is_damage(root, outside, thing, caplog):
    trainer = start(root, keep=2, max_async=1)
    path = trainer.save(1)
    trainer.save(2)
    put(thing, path / "model.safetensors", outside)
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        Reader(path).verify()
    go_on(trainer, root, 3)
    trainer.close()


def test_a_file_that_was_moved_to_another_disk_and_linked_keeps_its_bytes(root, outside, base):
    trainer = start(root, keep=2, max_async=1)
    path = trainer.save(1)
    archive = base / "archive"
    shutil.move(path / "model.safetensors", archive)
    (path / "model.safetensors").symlink_to(archive)
    before = archive.read_bytes()
    go_on(trainer, root, 2)
    go_on(trainer, root, 5)
    trainer.close()
    assert archive.read_bytes() == before


@pytest.mark.parametrize("writer", ["thread", "monitor"])
@pytest.mark.parametrize("thing", [each for each in THINGS if each != "directory"])
def test_what_lies_in_the_place_of_a_waiting_slot_is_put_aside(root, outside, thing, writer):
    trainer = start(root, keep=2, max_async=1, writer=writer)
    for step in (1, 2, 3):
        trainer.save(step)
    (slot,) = root.glob("slot-*.partial")
    put(thing, slot, outside)
    go_on(trainer, root, 4)
    trainer.close()
    assert aside(root) == [slot.name + ".bad"]


@pytest.mark.parametrize("thing", THINGS)
def test_a_slot_that_is_exchanged_while_it_is_written_does_not_become_a_checkpoint(root, outside, base, thing):
    trainer = start(root, keep=2, max_async=1)
    for step in (1, 2, 3):
        trainer.save(step)
    slot, checkpoint = trainer.begin(4)
    (root / slot.entry).rename(base / "moved away")
    put(thing, root / slot.entry, outside)
    with pytest.raises(SaveFailed, match="in its place"):
        trainer.finish(4, slot, checkpoint)
    go_on(trainer, root, 5)
    trainer.close()


@pytest.mark.parametrize("thing", THINGS)
def test_a_checkpoint_that_was_moved_away_and_linked_is_left_alone(root, outside, base, thing):
    trainer = start(root, keep=2, max_async=1)
    path = trainer.save(1)
    trainer.save(2)
    path.rename(base / "moved away")
    before = content(base / "moved away")
    path.symlink_to(base / "moved away")
    go_on(trainer, root, 3)
    go_on(trainer, root, 6)
    trainer.close()
    assert content(base / "moved away") == before


@pytest.mark.parametrize("name", [
    "lock", "lock.tmp", "store.json", "store.json.tmp", "named", "slot-0.partial", "slot-1.partial", "slot-3.partial",
    "slot-0.bad", "step-000000002", "step-000000002-g2",
])  # fmt: skip
@pytest.mark.parametrize("thing", THINGS)
def test_names_that_are_taken_before_the_store_is_made_lead_nowhere(root, outside, thing, name):
    root.mkdir()
    put(thing, root / name, outside)
    trainer = start(root, keep=2, max_async=2)
    go_on(trainer, root, 1)
    with contextlib.suppress(FxckptError):
        trainer.save(4, name="best")
    trainer.save(5, name="better")
    assert latest(root).step == 5 and (root / "named/better").is_dir() and not (root / "named").is_symlink()
    assert stat.S_ISREG((root / "lock").lstat().st_mode)
    trainer.close()


@pytest.mark.parametrize("name", ["best.partial", "best"])
@pytest.mark.parametrize("thing", [each for each in THINGS if each != "directory"])
def test_the_place_of_a_named_save_that_is_taken_is_not_written_to(root, outside, thing, name):
    trainer = start(root)
    trainer.save(1, name="other")
    put(thing, root / "named" / name, outside)
    with contextlib.suppress(FxckptError):
        trainer.save(2, name="best")
    go_on(trainer, root, 3)
    trainer.close()


def test_a_bad_slot_does_not_follow_a_link_of_its_name(root, outside):
    trainer = start(root, keep=2, max_async=1)
    trainer.save(1)
    for number in range(4):
        (root / f"slot-{number}.bad").symlink_to(outside / "folder")
    instruments.fail(1, errno.EIO, "fdatasync")
    with pytest.raises(SaveFailed):
        trainer.save(2)
    instruments.fail_none()
    go_on(trainer, root, 3)
    trainer.close()


def test_pruning_removes_links_and_not_what_they_lead_to(root, outside, capsys):
    trainer = start(root, keep=3)
    for step in (1, 2, 3):
        trainer.save(step)
    trainer.close()
    (root / "step-000000001/extra").symlink_to(outside / "folder")
    (root / "model.safetensors.bad").symlink_to(outside / "precious")
    (root / "slot-9.bad").symlink_to(outside / "folder")
    (root / "step-000000009").symlink_to(outside / "folder")
    (root / "slot-8.partial").symlink_to(outside / "folder")
    assert main(["prune", str(root), "--keep", "1", "--bad"]) == 0
    assert aside(root) == [] and [each.step for each in checkpoints(root)] == [3]


def test_a_directory_that_is_exchanged_for_a_link_is_not_written_to(root, outside, base):
    trainer = start(root)
    trainer.save(1)
    root.rename(base / "moved away")
    root.symlink_to(outside / "folder")
    with pytest.raises(FxckptError):
        trainer.save(2)
    root.unlink()
    (base / "moved away").rename(root)
    go_on(trainer, root, 3)
    trainer.close()


@pytest.mark.parametrize("writer", ["thread", "monitor"])
def test_files_and_directories_get_the_permissions_that_the_umask_leaves(root, writer):
    before = os.umask(0o027)
    try:
        trainer = start(root, writer=writer)
        trainer.save(1)
        trainer.save(2, name="best")
        trainer.close()
    finally:
        os.umask(before)
    for path in [root, *root.rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_opening_a_store_a_second_time_after_all_this_finds_nothing_wrong(root, outside):
    root.mkdir()
    for name in ("lock", "store.json", "named"):
        put("link to a file", root / name, outside)
    Store(root).open()
    store = Store(root)
    store.open()
    store.close()
    assert aside(root) == ["lock.bad", "named.bad", "store.json.bad"]
