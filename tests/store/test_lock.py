"""The lock of a directory: what ends one kind leaves the other, readers keep nobody out, and what is lost is noticed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from storing import all_verify, start

from fxckpt.cli import main
from fxckpt.errors import StoreLocked
from fxckpt.store import lock
from fxckpt.store.slots import Store

CHILD = """
import errno, sys
from fxckpt.errors import StoreLocked
from fxckpt.store import lock
from fxckpt.store.slots import Store

def unable(fd):
    raise OSError(errno.ENOLCK, "no locks")

for kind in sys.argv[2:]:
    lock.KINDS[kind] = unable
try:
    Store(sys.argv[1]).open()
except StoreLocked as error:
    print("locked", error)
else:
    print("open")
"""

READER = """
import fcntl, os, struct, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2] == "flock":
    fcntl.flock(fd, fcntl.LOCK_SH)
elif sys.argv[2] == "both":
    fcntl.flock(fd, fcntl.LOCK_EX)  # who may read may take this one, too
    fcntl.fcntl(fd, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
else:
    command = fcntl.F_OFD_SETLK if sys.argv[2] == "OFD" else fcntl.F_SETLK
    fcntl.fcntl(fd, command, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
print("has it", flush=True)
time.sleep(60)
"""

COMBINATIONS = [(), ("POSIX",), ("OFD",), ("OFD", "POSIX")]
"""Kinds that do not work on a file system."""


def other_process(root: Path, *without: str) -> str:
    """What another process finds when it opens the store, where these kinds of locks do not work."""
    command = [sys.executable, "-c", CHILD, str(root), *without]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def reader(path: Path, kind: str):
    """Another process that has the file locked for reading."""
    command = [sys.executable, "-c", READER, str(path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "has it\n"
        try:
            yield
        finally:
            process.kill()


def disable(monkeypatch, *kinds: str) -> None:
    """These kinds of locks do not work here."""

    def unable(fd: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    for kind in kinds:
        monkeypatch.setitem(lock.KINDS, kind, unable)


@pytest.mark.parametrize("without", COMBINATIONS, ids=lambda kinds: "without " + ",".join(kinds))
def test_a_second_process_is_refused_by_whichever_kind_of_lock_works(root, without, monkeypatch):
    disable(monkeypatch, *without)
    store = Store(root)
    store.open()
    assert "locked" in other_process(root, *without)
    store.close()
    assert other_process(root, *without) == "open\n"


def test_where_no_lock_works_no_store_is_opened(root, monkeypatch):
    disable(monkeypatch, *lock.KINDS)
    with pytest.raises(OSError, match="no kind of file lock"):
        Store(root).open()


def read_all(root: Path) -> None:
    """What a backup does in the trainer's process: it opens and closes every file."""
    backup = root.parent / "backup"
    shutil.copytree(root, backup)
    shutil.rmtree(backup)


def test_reading_all_of_the_directory_in_this_process_does_not_let_another_one_in(root):
    trainer = start(root)
    trainer.save(1)
    read_all(root)
    assert "locked" in other_process(root)
    trainer.save(2)
    assert f"pid {os.getpid()}" in other_process(root), "the commit took again what was lost"
    trainer.close()


def test_a_posix_lock_that_was_lost_is_taken_again_at_the_next_commit(root, monkeypatch):
    disable(monkeypatch, "OFD")
    trainer = start(root)
    trainer.save(1)
    read_all(root)
    trainer.save(2)
    assert "locked" in other_process(root, "OFD")
    trainer.close()


def test_a_lock_that_another_process_got_meanwhile_stops_this_one_before_it_changes_anything(root, monkeypatch):
    disable(monkeypatch, "OFD")
    trainer = start(root, keep=2)
    for step in (1, 2, 3):
        trainer.save(step)
    slot, checkpoint = trainer.begin(4)
    assert checkpoint.durable(10)
    read_all(root)
    held = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    code = f"import fcntl, os, time; fcntl.fcntl(os.open({str(root / 'lock')!r}, os.O_RDWR), fcntl.F_SETLK, {held!r}); "
    code += "print('has it', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        before = sorted(os.listdir(root))
        with pytest.raises(StoreLocked, match="lost the lock"):
            trainer.store.acquire()
        with pytest.raises(StoreLocked, match=f"another process has it \\(pid {other.pid}\\)"):
            trainer.store.commit(slot, trainer.record(4, checkpoint), trainer.state(4))
        assert sorted(os.listdir(root)) == before
        other.kill()
    checkpoint.release()
    trainer.close()


@pytest.mark.parametrize("kind", ["POSIX", "OFD", "flock"])
@pytest.mark.parametrize("without", COMBINATIONS, ids=lambda kinds: "without " + ",".join(kinds))
def test_a_lock_for_reading_keeps_nobody_out_and_lets_nobody_in(root, kind, without, monkeypatch):
    disable(monkeypatch, *without)
    start(root).close()
    mode = stat.S_IMODE((root / "lock").stat().st_mode)
    with reader(root / "lock", kind):
        trainer = start(root)
        trainer.save(1)
        assert "locked" in other_process(root, *without)
        trainer.save(2)
        all_verify(root)
        trainer.close()
    assert stat.S_IMODE((root / "lock").stat().st_mode) == mode
    assert not (root / "lock.tmp").exists()


@pytest.mark.parametrize("without", COMBINATIONS[:-1], ids=lambda kinds: "without " + ",".join(kinds))
def test_every_lock_that_who_may_read_can_take_together_keep_nobody_out(root, without, monkeypatch):
    disable(monkeypatch, *without)
    start(root).close()
    with reader(root / "lock", "both"):
        trainer = start(root)
        trainer.save(1)
        assert "locked" in other_process(root, *without)
        trainer.close()


def test_a_lock_for_reading_taken_after_the_lock_was_lost_does_not_stop_the_trainer(root, monkeypatch):
    disable(monkeypatch, "OFD")
    trainer = start(root)
    trainer.save(1)
    read_all(root)
    with reader(root / "lock", "POSIX"):
        trainer.save(2)
        assert "locked" in other_process(root, "OFD")
    trainer.close()


@pytest.mark.parametrize("fork", ["os.fork", "C"])
def test_a_forked_child_that_outlives_the_trainer_does_not_keep_the_lock(root, fork):
    """Whoever forks it: the child closes its copy of the descriptor."""
    code = f"""
import os, sys, time
from fxckpt.store.slots import Store
store = Store({str(root)!r}); store.open()
if os.fork() == 0:
    os.close(1)
    time.sleep(30); os._exit(0)
time.sleep(0.2)
"""
    if fork == "C":
        code = code.replace("os.fork()", "__import__('ctypes').CDLL(None).fork()")
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert other_process(root) == "open\n"


def test_a_lock_file_with_a_second_name_is_locked_and_not_written_to(root, tmp_path):
    start(root).close()
    (root / "lock").write_text("precious")
    os.link(root / "lock", root.parent / "other")
    trainer = start(root)
    assert "locked" in other_process(root)
    trainer.save(1)
    trainer.close()
    assert (root.parent / "other").read_text() == "precious"


def test_doctor_says_which_kinds_of_locks_work(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 0
    assert "file locks" in (said := capsys.readouterr().out) and "OFD, POSIX, flock" in said
