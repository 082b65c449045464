"""Committed checkpoints are read back: what the disk lost is an error while training runs, and its directory is put aside."""

from __future__ import annotations

import errno
import time
from types import SimpleNamespace

import instruments
import pytest
import torch
from storing import all_verify, names, start
from waiting import until

import fxckpt
from fxckpt.errors import Corrupt, SetupError
from fxckpt.monitor import launch
from fxckpt.monitor.checkpoints import Checkpoints
from fxckpt.monitor.link import Link
from fxckpt.store import read_back
from fxckpt.store.read_back import ReadBack
from fxckpt.store.reader import latest

IDLE, BUSY = (lambda: False), (lambda: True)


def damage(path, name="model.safetensors"):
    """Flip a bit of a committed file."""
    with (path / name).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


@pytest.mark.parametrize("mode", ["sampled", "all"])
def test_a_checkpoint_that_does_not_verify_is_named_and_put_aside(root, mode):
    trainer = start(root, read_back=mode)
    trainer.save(1)
    assert trainer.store.read_back(IDLE) is None
    trainer.store._read_back._next = 0
    damage(trainer.save(2))
    step, error = trainer.store.read_back(IDLE)
    assert step == 2 and isinstance(error, Corrupt) and "step-000000002" in str(error)
    assert [name for name in names(root) if name.endswith(".bad")] and all_verify(root) == [1]
    assert trainer.store.read_back(IDLE) is None, "once"
    trainer.save(3)
    assert all_verify(root) == [3, 1]
    trainer.close()


def test_a_named_save_that_does_not_verify_is_put_aside(root):
    trainer = start(root, read_back="all")
    damage(trainer.save(1, name="best"))
    assert trainer.store.read_back(IDLE)[0] == 1
    assert (root / "named/best.bad").is_dir() and latest(root) is None
    trainer.close()


@pytest.mark.parametrize("way", ["removed", "moved away and linked"])
def test_a_checkpoint_that_somebody_takes_a_file_from_is_named_and_left_to_him(root, way, caplog):
    trainer = start(root, read_back="all")
    path = trainer.save(1)
    file = path / "model.safetensors"
    if way == "removed":
        file.unlink()
    else:
        file.rename(root.parent / "archive")
        file.symlink_to(root.parent / "archive")
    assert trainer.store.read_back(IDLE) == (1, None) and path.is_dir()
    assert "the checkpoint of step 1 is not counted on any more" in caplog.text
    trainer.save(2)
    assert latest(root).step == 2
    trainer.close()


def test_a_disk_that_cannot_be_read_counts_as_damage(root):
    trainer = start(root, read_back="all")
    trainer.save(1)
    instruments.fail(1, errno.EIO, "pread")
    assert trainer.store.read_back(IDLE)[0] == 1
    instruments.fail_none()
    trainer.save(2)
    instruments.fail(1, errno.EMFILE, "open")
    assert trainer.store.read_back(IDLE) is None, "that says nothing about the disk"
    instruments.fail_none()
    assert all_verify(root) == [2]
    trainer.close()


def test_a_sample_waits_for_its_time_and_for_the_disk_to_be_idle(root, monkeypatch):
    trainer = start(root, read_back="sampled")
    path = trainer.save(1)
    damage(path)
    assert trainer.store.read_back(BUSY) is None
    assert trainer.store.read_back(IDLE) is not None
    damage(trainer.save(2))
    assert trainer.store.read_back(IDLE) is None, "its time has not come"
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 2 * read_back.LEAST)
    assert trainer.store.read_back(IDLE) is not None
    trainer.close()


def test_a_sample_stops_when_there_is_something_to_commit_and_is_made_up_for(root):
    trainer = start(root, read_back="sampled")
    damage(trainer.save(1), "state.safetensors")
    answers = iter([False, True])
    assert trainer.store.read_back(lambda: next(answers)) is None
    assert trainer.store.read_back(IDLE) is not None
    trainer.close()


def test_nothing_is_read_when_it_is_off_or_what_was_committed_is_gone(root):
    trainer = start(root, read_back="off")
    damage(trainer.save(1))
    assert trainer.store.read_back(IDLE) is None
    trainer.close()
    trainer = start(root, read_back="all", keep=1)
    trainer.save(2)
    waiting = trainer.store._read_back._waiting
    for step in (3, 4):
        trainer.save(step)
    trainer.store._read_back._waiting = waiting
    assert trainer.store.read_back(IDLE) is None, "it was given up"
    trainer.close()


def test_other_modes_are_refused(tmp_path):
    with pytest.raises(SetupError, match="read_back='sometimes': expected one of 'off', 'sampled', 'all'"):
        ReadBack("sometimes")
    opt = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(SetupError, match="read_back"):
        fxckpt.compile_step(opt, tmp_path / "c", read_back=True)


DAMAGING = """
import sys
from fxckpt.monitor.process import main
from fxckpt.store.read_back import ReadBack

real = ReadBack.read

def read(self, busy):
    if self._waiting is not None and self._waiting[1] == 2:
        with open(self._waiting[0].path + "/model.safetensors", "r+b") as file:
            file.write(b"garbage")
    return real(self, busy)

ReadBack.read = read
"""


def test_a_monitor_tells_of_files_that_somebody_took_and_of_no_failure():
    checkpoints, link, told = object.__new__(Checkpoints), object.__new__(Link), []
    checkpoints.store, checkpoints._tell, link.rotten = SimpleNamespace(read_back=lambda busy: (3, None)), told.append, []
    checkpoints.rest(IDLE)
    link._hear(told[0])
    assert link.rotten == [(3, None)]


@pytest.mark.parametrize("writer", ["thread", "monitor"])
def test_a_run_counts_it_as_a_failed_checkpoint_and_no_longer_as_the_last_one(root, writer, monkeypatch, caplog, tmp_path):
    """The second one is damaged when it was committed. With a monitor that is told when the next one has ended."""
    script = tmp_path / "monitor.py"
    script.write_text(DAMAGING + "sys.exit(main(sys.argv[1:]))\n")
    monkeypatch.setattr(launch, "PROGRAM", (str(script),))
    monkeypatch.setattr(ReadBack, "read", ReadBack.read)  # it is put back
    exec(DAMAGING, {})
    model = torch.nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    fxckpt.compile_step(opt, root, model=model, every=1, update="native", writer=writer, read_back="all")
    fxckpt.load()
    for _ in range(3 if writer == "monitor" else 2):
        opt.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        opt.step()
        opt.ckpt.end_step()
        opt.ckpt._run.saver.flights.wait_for_all(60)
    until(lambda: opt.ckpt.statistics()["checkpoints_failed"] == 1)
    assert opt.ckpt.statistics()["last_committed_step"] == (3 if writer == "monitor" else 1)
    with pytest.raises(fxckpt.FxckptError, match="step-000000002"):
        opt.ckpt.flush()
    assert "the checkpoint of step 2 failed" in caplog.text
    assert 2 not in [each.step for each in fxckpt.checkpoints(root)]
    opt.ckpt.shutdown()
