"""What a slot is believed to hold: of a file that somebody touched while it waited nothing, and of the rest what is read back."""

from __future__ import annotations

import contextlib
import os
import shutil

import pytest
import torch
from storing import all_verify, names
from waiting import until

import fxckpt
from fxckpt.store import slot as slots
from fxckpt.store.reader import candidates

CHUNK = 1 << 20


def cut(path, _):
    os.truncate(path, path.stat().st_size // 2)


def cut_and_lengthened(path, _):
    size = path.stat().st_size
    os.truncate(path, CHUNK)
    os.truncate(path, size)


def replaced(path, spare):
    shutil.copy(path, spare)
    with spare.open("r+b") as file:
        file.seek(CHUNK + 5000)
        file.write(b"other")
    spare.replace(path)


def flipped(path, _):
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(CHUNK + 5000)
        file.write(b"other")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as somebody who hides it would


def exchanged_with_another_slots(path, _):
    other = next(each for each in path.parent.parent.glob("*/model.safetensors") if each != path)
    shutil.copy(other, path)


def directory_made_anew(path, _):
    shutil.rmtree(path.parent)
    path.parent.mkdir()


def removed(path, _):
    path.unlink()


WAYS = (removed, cut, cut_and_lengthened, replaced, flipped, exchanged_with_another_slots, directory_made_anew)


class Run:
    """Training of a small head on a frozen base of several chunks."""

    def __init__(self, root, **options):
        torch.manual_seed(0)
        self.root = root
        self.model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 4))
        for parameter in self.model[0].parameters():
            parameter.requires_grad_(False)
        self.opt = torch.optim.SGD(self.model[1].parameters(), lr=0.1)
        options = {"chunk_mb": 1, "staging_mb": 8, "read_back": "off", **options}
        fxckpt.compile_step(self.opt, root, model=self.model, every=1, update="native", **options)
        fxckpt.load()

    def step(self):
        self.opt.zero_grad()
        self.model(torch.randn(8, 1024)).pow(2).mean().backward()
        self.opt.step()
        self.opt.ckpt.flush()

    def written(self):
        """Bytes that went to the disk so far."""
        return self.opt.ckpt._run.engine.statistics()["bytes_written"]

    def waiting(self):
        """The files of slots that nobody works at: the next one is ready."""
        until(lambda: self.opt.ckpt._run.saver.supply.ready is not None)
        return sorted(self.root.glob("slot-*.partial/model.safetensors"))


@pytest.mark.parametrize("writer", ["thread", "monitor"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_file_that_was_touched_while_it_waited_is_written_anew(root, way, writer):
    run = Run(root, writer=writer)
    for _ in range(6):
        run.step()
    for _ in range(3):
        for path in run.waiting():
            with contextlib.suppress(FileNotFoundError):  # the committer, which looks at it just now, made a new one
                way(path, root.parent / "spare")
        run.step()
        all_verify(root)
    run.opt.ckpt.shutdown()
    found = candidates(root)
    assert len(found) == 2 and found[0].record.step == 9
    assert run.opt.ckpt.statistics()["checkpoints_failed"] == 0


def test_what_nobody_touched_is_not_written_again(root):
    run = Run(root)
    for _ in range(6):
        run.step()
    before = run.written()
    run.step()
    assert run.written() - before < 3 * CHUNK
    run.opt.ckpt.shutdown()


def test_a_file_that_appears_in_the_place_of_what_is_written_is_not_vouched_for(root, monkeypatch):
    """The engine has the file open; the name leads to another one when the record is written."""
    run = Run(root)
    for _ in range(4):
        run.step()
    real = slots.Slot.check_written

    def check(self, file):
        if file.name == "model.safetensors":
            replaced(root / self.entry / file.name, root.parent / "spare")
        real(self, file)

    monkeypatch.setattr(slots.Slot, "check_written", check)
    with pytest.raises(fxckpt.SaveFailed, match="put something else in its place"):
        run.step()
    monkeypatch.undo()
    run.step()
    all_verify(root)
    run.opt.ckpt.shutdown()


def test_blocks_that_rot_unseen_while_they_wait_are_found_in_turn(root, monkeypatch, caplog):
    """A disk that loses a block changes no time and no inode."""
    monkeypatch.setattr(slots, "READ_BACK_BYTES", CHUNK)
    monkeypatch.setattr(slots, "file_id", lambda found: (found.st_dev, found.st_ino, found.st_size, 0, 0))
    monkeypatch.setattr(slots.Slot, "waited", lambda self, file: None)  # the engine would see the times
    run = Run(root)
    for _ in range(6):
        run.step()
    for path in run.waiting():
        flipped(path, None)
    for _ in range(12):
        run.step()
    assert "rotted while it waited" in caplog.text
    all_verify(root)
    run.opt.ckpt.shutdown()


def test_a_slot_whose_blocks_cannot_be_read_is_put_aside(root, monkeypatch):
    run = Run(root)
    for _ in range(6):
        run.step()

    def unreadable(self, file, begin, nbytes):
        error = OSError(5, "Input/output error", self.path)
        error.operation = "pread"
        raise error

    monkeypatch.setattr(slots.Slot, "_read_block", unreadable)
    for _ in range(3):
        try:
            run.step()
        except fxckpt.FxckptError:
            continue
    monkeypatch.undo()
    run.step()
    assert any(name.endswith(".bad") for name in names(root))
    all_verify(root)
    run.opt.ckpt.shutdown()
