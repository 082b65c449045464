"""Disk space: what a run needs is reckoned and set aside at its first checkpoint; and full disks, where they can be mounted."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import instruments
import pytest
from small_models import mlp
from small_training import Training, all_good
from storing import names, start

import fxckpt
from fxckpt.store.reader import latest

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}"


@contextlib.contextmanager
def mounted(tmp: Path, kind: str, megabytes: int):
    """A small file system of its own, a tmpfs or ext4 on a loop device; skips the test where mounting is not allowed."""
    at = tmp / kind
    at.mkdir()
    if kind == "tmpfs":
        wrong = run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(at))
    else:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("there is no mkfs.ext4")
        image = tmp / "image"
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        wrong = run("mkfs.ext4", "-q", "-m", "0", str(image)) or run("mount", "-o", "loop", str(image), str(at))
    if wrong:
        pytest.skip(f"cannot mount here: {wrong}")
    try:
        yield at
    finally:
        assert run("umount", "-l", str(at)) == ""


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request, tmp_path):
    with mounted(tmp_path, request.param, 24) as at:
        yield at


def wide():
    """A model of 1 MiB, 3 MiB with its state."""
    return mlp(20_000)


def fill(at: Path, leave: int = 0) -> Path:
    """Take all the room there is but ``leave`` bytes."""
    path = at / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            while True:
                found = os.statvfs(at)
                if found.f_bavail * found.f_frsize - size < leave:
                    break
                try:
                    file.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    break
    return path


def test_a_run_that_cannot_fit_is_told_so_at_its_first_checkpoint_with_the_numbers(small_disk):
    training = Training(small_disk / "d", make=wide, keep=9)
    with pytest.raises(fxckpt.SetupError) as raised:
        training.train(2)
    text = str(raised.value).replace(",", "")
    size, need, free = (
        int(re.search(pattern, text)[1])
        for pattern in (r"checkpoints of (\d+) bytes", r"need (\d+) bytes more", r"which has (\d+) bytes free")
    )
    assert need > 11 * size > 0 and free < need and "keep=9" in str(raised.value) and str(small_disk / "d") in text
    assert names(small_disk / "d") == [], "what was made for it is gone"


def test_what_is_set_aside_is_there_when_somebody_else_fills_the_disk(small_disk):
    """All but what the records take; and with nothing left at all saves fail, and recover when there is room."""
    training = Training(small_disk / "d", make=wide, keep=2).train(1)
    training.opt.ckpt.flush()
    assert len(names(small_disk / "d")) == 4
    filler = fill(small_disk, leave=256 << 10)
    training.train(5)
    training.opt.ckpt.flush()
    assert training.found["checkpoints_failed"] == 0
    fill(small_disk)
    training.train(4)
    with contextlib.suppress(fxckpt.SaveFailed):
        training.opt.ckpt.flush()
    assert all_good(small_disk / "d", training)[0] == training.found["last_committed_step"] >= 6
    filler.unlink()
    training.train(1)
    training.opt.ckpt.flush()
    assert all_good(small_disk / "d", training)[0] == 11
    training.opt.ckpt.shutdown()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EMFILE, errno.EACCES])
def test_trouble_that_says_nothing_of_the_disk_s_content_costs_checkpoints_and_not_slots(code, tmp_path):
    training = Training(tmp_path / "d", keep=2).train(2)
    training.opt.ckpt.flush()
    for _ in range(6):  # more than there are slots
        instruments.fail(1, code, "open")
        training.train(1)
        with contextlib.suppress(fxckpt.SaveFailed, OSError, fxckpt.StoreError):
            training.opt.ckpt.flush()
        instruments.fail_none()
    training.train(2)
    training.opt.ckpt.flush()
    assert all_good(tmp_path / "d", training)[0] == 10
    assert not list((tmp_path / "d").glob("*.bad"))


def test_a_process_that_has_no_file_descriptor_left_trains_on_and_saves_again_when_it_has(tmp_path):
    training = Training(tmp_path / "d", keep=2).train(2)
    training.opt.ckpt.flush()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), before[1]))
    try:
        hoard = []
        with contextlib.suppress(OSError):
            while True:
                hoard.append(os.open("/dev/null", os.O_RDONLY))
        training.train(6)
        with pytest.raises((fxckpt.SaveFailed, OSError), match="Too many open files"):
            training.opt.ckpt.flush()
        assert training.found["last_committed_step"] == 2 and training.found["steps"] == 8
    finally:
        for fd in hoard:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    training.train(2)
    training.opt.ckpt.flush()
    assert all_good(tmp_path / "d", training)[0] == 10


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_quota_that_only_the_reservation_meets_is_told_too(tmp_path, code):
    trainer = start(tmp_path / "d", keep=1, max_async=1)
    instruments.fail(2, code, "fallocate")
    with pytest.raises(fxckpt.SetupError, match=os.strerror(code)):
        trainer.store.reserve({"model.safetensors": 1 << 20, "optimizer.safetensors": 1 << 20})
    assert names(tmp_path / "d") == []
    trainer.store.reserve({"model.safetensors": 1 << 20, "optimizer.safetensors": 1 << 20})
    assert len(names(tmp_path / "d")) == 2
    trainer.close()


def test_a_file_system_that_cannot_reserve_is_only_asked_for_its_free_space(tmp_path):
    trainer = start(tmp_path / "d", keep=1, max_async=1)
    instruments.fail(1, errno.EOPNOTSUPP, "fallocate")
    trainer.store.reserve({"model.safetensors": 1 << 20})
    trainer.save(1)
    with pytest.raises(fxckpt.SetupError, match="bytes free"):
        trainer.store.reserve({"model.safetensors": 1 << 60})
    trainer.save(2)
    trainer.close()


def test_what_is_set_aside_really_has_blocks_and_somebody_s_hard_link_is_left_alone(tmp_path):
    trainer = start(tmp_path / "d", keep=1, max_async=1)
    trainer.save(1)
    trainer.save(2)
    (free,) = (tmp_path / "d").glob("slot-*.partial")
    os.link(free / "model.safetensors", tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    trainer.store.reserve({"model.safetensors": 5 << 20})
    assert (free / "model.safetensors").stat().st_blocks * 512 >= 5 << 20
    assert (tmp_path / "backup").read_bytes() == before
    trainer.close()


def test_a_second_life_needs_no_more_room(small_disk):
    training = Training(small_disk / "d", make=wide, keep=2).train(4)
    training.opt.ckpt.shutdown()
    filler = fill(small_disk, leave=300 << 10)
    training = Training(small_disk / "d", make=wide, keep=2)
    assert fxckpt.load(small_disk / "d", optimizer=training.opt).step == 4
    training.train(3)
    training.opt.ckpt.flush()
    assert latest(small_disk / "d").step == 7
    training.opt.ckpt.shutdown()
    filler.unlink()
