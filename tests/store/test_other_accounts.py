"""What a process of another account can do to a store, by what the umask left it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from storing import all_verify, start

NOBODY = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def store():
    """Makes a store with two checkpoints under a umask, in a place that everybody may enter."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    trainers = []

    def make(umask: int):
        before = os.umask(umask)
        try:
            trainers.append(start(place / "d"))
            trainers[0].save(1)
            trainers[0].save(2)
        finally:
            os.umask(before)
        return place / "d", trainers[0]

    yield make
    trainers[0].close()
    shutil.rmtree(place)


def as_nobody(deed: Callable[[], None]) -> int:
    """Begin it in a process of another account; returns the process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            deed()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return pid


def succeeded(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def refused(deed: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(PermissionError):
        deed(*arguments)


def test_with_a_umask_of_077_another_account_sees_nothing(store):
    root, trainer = store(0o077)

    def look() -> None:
        refused(os.listdir, root)
        for path in ("lock", "store.json", "step-000000002/model.safetensors", "step-000000002/commit.json"):
            refused(os.open, root / path, os.O_RDONLY)
            refused(os.stat, root / path)

    assert succeeded(as_nobody(look))
    trainer.save(3)


def test_who_may_read_can_copy_and_verify_and_change_nothing(store):
    root, trainer = store(0o022)
    files = [path for path in root.rglob("*") if path.is_file()]
    ready, done = os.pipe(), os.pipe()

    def read_and_try() -> None:
        all_verify(root)
        for path in files:
            assert path.read_bytes() or path.name == "lock"
            refused(os.open, path, os.O_RDWR)
            refused(os.unlink, path)
            refused(os.rename, path, f"{path}.bad")
            refused(os.chmod, path, 0o777)
        for path in {root, *(path.parent for path in files)}:
            refused(os.symlink, "/etc/passwd", path / "new")
        lock = os.open(root / "lock", os.O_RDONLY)
        with pytest.raises(OSError):
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OSError):
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the trainer has it
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.write(ready[1], b"x")
        os.read(done[0], 1)  # with the lock held, a trainer goes on

    pid = as_nobody(read_and_try)
    os.close(ready[1])
    os.read(ready[0], 1)
    for step in (3, 4, 5):
        trainer.save(step)
    os.write(done[1], b"x")
    assert succeeded(pid)
    all_verify(root)
