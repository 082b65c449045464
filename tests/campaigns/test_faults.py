"""Promise 7, training does not die of a failed save; and what else can go wrong around a trainer: another one, a fork, an
exception, Ctrl-C, an exit without goodbye.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import instruments
import pytest
import torch
from digests import differences, snapshot
from journal_lives import Life
from small_models import mlp
from small_training import Training, all_good, all_made_again
from storing import fast_directory
from waiting import TIMEOUT, until

import fxckpt
from fxckpt.store import pool
from fxckpt.store.commit_loop import Errand
from fxckpt.store.reader import Reader, candidates, read_record, records
from fxckpt.store.record import Record

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "d"


# ---- the n-th call fails ----


def calls_of_some_checkpoints(store, steps: int = 4, **options) -> int:
    training = Training(store, keep=2, **options)
    instruments.fail(10**9, 0)  # counts from the first use of an instrument
    before = instruments.calls()
    training.train(steps)
    training.opt.ckpt.flush()
    training.opt.ckpt.shutdown()
    return instruments.calls() - before


ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EACCES, errno.ENOENT, errno.EINTR, 0)
HARMLESS = (errno.EINTR, 0)  # 0: half of a transfer
WHOLE = os.environ.get("FXCKPT_FAULTS") == "full"


def every_fault(total: int, stride: int, errors: tuple[int, ...]) -> list[tuple[int, int]]:
    """(call, error): all of them, or from a random call on each ``stride``-th with one error after the other."""
    if WHOLE:
        return list(itertools.product(range(1, total + 1), errors))
    first = random.SystemRandom().randint(1, stride)
    return list(zip(range(first, total + 1, stride), itertools.cycle(random.sample(errors, len(errors)))))


def trained_through(training, steps: int) -> list[BaseException]:
    """Train and flush; what was raised on the way. With ``on_error="raise"`` a step raises before it changes anything."""
    raised: list[BaseException] = []
    while training.found["steps"] < steps:
        before = training.found["steps"], training.now()
        try:
            training.train()
        except fxckpt.NoSpace as error:  # at the first checkpoint only: raised whatever on_error says, the update was made
            assert not training.found["checkpoints_started"]
            raised.append(error)
        except (fxckpt.SaveFailed, OSError, fxckpt.StoreError) as error:
            assert training.opt.ckpt._run.config.on_error == "raise"
            assert training.found["steps"] == before[0]
            if training.found["checkpoints_started"]:
                assert differences(training.now(), before[1]) == []
            raised.append(error)
    for _ in range(2):  # what is committed may be read back, and then turn out to be lost
        try:
            training.opt.ckpt.flush()
        except (fxckpt.SaveFailed, OSError, fxckpt.StoreError) as error:
            raised.append(error)
        at_rest(training)
    return raised


def at_rest(training) -> None:
    """Wait for what the thread that commits does after a commit."""
    done = threading.Event()
    training.opt.ckpt._run.saver.loop.put(Errand(done.set))
    assert done.wait(TIMEOUT)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.parametrize(
    "errors",
    [(each,) for each in ERRORS] if WHOLE else [ERRORS],
    ids=[errno.errorcode.get(each, "short") for each in ERRORS] if WHOLE else ["each"],
)
def test_whichever_call_fails_training_goes_on_and_no_older_checkpoint_is_lost(errors, on_error, tmp_path, caplog, counted):
    """From the first call of the first checkpoint to beyond the fourth: it fails, says so, and the next one is good.
    Under "raise" it is raised at the next step, once."""
    caplog.set_level(logging.ERROR, "fxckpt")
    total = calls_of_some_checkpoints(tmp_path / "count")
    assert total > 60
    failures = 0
    for nth, error in every_fault(total, 21, errors):
        store = tmp_path / f"{nth}-{error}"
        training, what = Training(store, keep=2, on_error=on_error), f"call {nth}, {errno.errorcode.get(error, 'short')}"
        caplog.clear()
        instruments.fail(nth, error)
        raised = trained_through(training, 4)
        instruments.fail_none()
        assert all_good(store, training)[:1] == [training.found["last_committed_step"]], f"{what}: one was lost"
        told = [each for each in raised if not isinstance(each, fxckpt.NoSpace)]
        assert (len(told) > 0) == (training.found["checkpoints_failed"] > 0), f"{what}: {raised!r}"
        assert len(raised) <= 1 and not (raised and error in HARMLESS), f"{what}: {raised!r}"
        for each in told:
            found = error in (errno.ENOENT, errno.EIO) and isinstance(each, fxckpt.Corrupt)  # by reading back
            missing = found and error == errno.ENOENT
            assert found or getattr(each, "errno", None) == error, f"{what}: {each!r}"
            said = "missing" if missing else os.strerror(error)
            assert any(said in r.message for r in caplog.records), f"{what} failed in silence"
            assert training.found["last_error"] is not None
        failures += len(raised)
        training.opt.ckpt.flush()  # what was raised is not raised again
        trained_through(training, training.found["steps"] + 1)
        assert all_good(store, training)[0] == training.found["steps"], f"{what}: the next checkpoint did not recover"
        training.opt.ckpt.shutdown()
        counted("faults at the n-th call of a training", 1)
        shutil.rmtree(store)
    assert failures > 2 or set(errors) <= set(HARMLESS)


@pytest.mark.parametrize("errors", [(each,) for each in ERRORS] if WHOLE else [ERRORS])
def test_whichever_call_fails_no_step_of_a_journal_is_lost_that_was_reported(errors, tmp_path, counted):
    """From the first call to beyond the second full checkpoint: what is reported durable can be made again, whatever failed, and
    steps after it are durable again."""
    total = calls_of_some_checkpoints(tmp_path / "count", 7, journal=4)
    failed = 0
    for nth, error in every_fault(total, 41, errors):
        store = tmp_path / f"{nth}-{error}"
        training, what = Training(store, keep=2, journal=4), f"call {nth}, {errno.errorcode.get(error, 'short')}"
        instruments.fail(nth, error)
        trained_through(training, 7)
        instruments.fail_none()
        failed += training.found["checkpoints_failed"]
        assert all_made_again(store, training)[-1:] == [training.found["last_committed_step"]], f"{what}: one was lost"
        trained_through(training, training.found["steps"] + 1)
        assert all_made_again(store, training)[-1] == training.found["steps"], f"{what}: the next one did not recover"
        training.opt.ckpt.shutdown()
        counted("faults at the n-th call of a training with a journal", 1)
        shutil.rmtree(store)
    assert failed or set(errors) <= set(HARMLESS) or not WHOLE


def damages(root) -> list[tuple[Path, str]]:
    """What is damaged, and how: each directory of a journal and its checkpoints, and each file in it."""
    found = [each.path for each in [*candidates(root), *records(root)]]
    files = [(path, how) for each in found for path in sorted(each.iterdir()) for how in ("flipped", "cut", "removed")]
    every = [*files, *((path, "removed") for path in found)]
    return every if WHOLE else random.SystemRandom().sample(every, 8)


def do_damage(path: Path, how: str) -> None:
    """To a file, or a directory that is removed."""
    if path.is_dir():
        shutil.rmtree(path)
    elif how == "removed":
        path.unlink()
    else:
        raw, chance = bytearray(path.read_bytes()), random.SystemRandom()
        at = chance.randrange(len(raw))
        raw[at] ^= 1 << chance.randrange(8)
        path.write_bytes(raw[:at] if how == "cut" else raw)


def builds_on(each: Record, other: Record) -> bool:
    """Is this the other one, or made again by way of it?"""
    if each.journal is None or each.generation == other.generation:
        return each.generation == other.generation
    base = other.generation if other.journal is None else other.journal.base
    return each.journal.base == base and other.generation < each.generation


def test_whichever_file_of_a_journal_is_damaged_the_newest_step_before_it_is_loaded_and_it_is_said(root, counted):
    life = Life(root, journal=4).train(11).end()
    there = [each.record for each in [*candidates(root), *records(root)]]
    spare = root.with_name("spare")
    shutil.copytree(root, spare)
    for path, how in damages(root):
        directory, gone = (path, True) if path.is_dir() else (path.parent, False)
        touched = read_record(str(directory))
        left = max(each.step for each in there if not builds_on(each, touched))
        nothing_shows = left == 11 or (gone and touched.step == 11)  # as if it had never been
        do_damage(path, how)
        found = Life(root, journal=4).end()
        what = f"{how} {path.relative_to(root)}: step {found.restored.step} was loaded"
        assert found.restored.step == left and found.at == life.states[left], f"{what}, not {left}"
        said = " ".join(map(" ".join, found.restored.skipped))
        named = directory.name in said or (gone and "missing" in said)
        assert nothing_shows or named, f"{what}, and this was said: {said}"
        shutil.rmtree(root)
        shutil.copytree(spare, root)
        counted("damages of a journal", 1)


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE])
def test_whichever_call_fails_at_the_opening_of_a_store_it_is_raised_and_the_next_opening_goes_well(error, tmp_path):
    Training(tmp_path / "d", keep=2).train(3).end()
    before = instruments.calls()
    Training(tmp_path / "d").end()
    opening = instruments.calls() - before
    assert opening > 10
    for nth in range(1, opening + 1):
        instruments.fail(nth, error)
        try:
            training = Training(tmp_path / "d", keep=2)
        except (OSError, fxckpt.StoreError):
            pass
        else:
            training.end()
        instruments.fail_none()
        assert fxckpt.latest(tmp_path / "d").step == 3
        training = Training(tmp_path / "d", keep=2)
        assert fxckpt.load(tmp_path / "d", optimizer=training.opt).step == 3
        training.end()


@pytest.mark.parametrize("what", ["a slot", "every slot", "the store"])
def test_a_directory_that_is_removed_underneath_costs_what_was_in_it_and_the_next_checkpoint_recovers(what, store):
    training = Training(store, keep=2).train(4)
    training.opt.ckpt.flush()
    if what == "the store":
        store.rename(store.with_name("away"))
        training.train(8)
        with pytest.raises((fxckpt.SaveFailed, OSError, fxckpt.StoreError), match="No such file"):
            training.opt.ckpt.flush()
        store.with_name("away").rename(store)
        assert all_good(store, training) == [4, 3]
    else:
        for slot in list(store.glob("slot-*.partial"))[: 1 if what == "a slot" else None]:
            shutil.rmtree(slot)
    for _ in range(2):
        training.train(2)
        with contextlib.suppress(fxckpt.SaveFailed):
            training.opt.ckpt.flush()
    assert all_good(store, training)[0] == training.found["steps"]
    assert not list(store.glob("*.bad"))


def test_a_directory_without_write_permission_fails_saves_until_it_has_it_again(fork_server, tmp_path):
    """In a process that is not root, who may write everywhere."""
    script = tmp_path / "train.py"
    script.write_text("""
from script_prelude import *
from small_training import Training, all_good
from pathlib import Path
import os, pytest
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
store = Path(os.environ["STORE"])
training = Training(store, keep=2).train(3)
training.opt.ckpt.flush()
for mode in (0o555, 0o000):
    store.chmod(mode)
    failed = training.found["checkpoints_failed"]
    training.train(6)
    with pytest.raises((fxckpt.SaveFailed, OSError, fxckpt.StoreError), match="Permission denied"):
        training.opt.ckpt.flush()
    assert training.found["checkpoints_failed"] >= failed + 4
    store.chmod(0o755)
    training.train(2)
    training.opt.ckpt.flush()
    assert all_good(store, training)[0] == training.found["steps"]
assert not list(store.glob("*.bad"))
training.opt.ckpt.shutdown()
""")
    with fast_directory(tmp_path / "fast") as directory:
        directory.mkdir(exist_ok=True)
        directory.chmod(0o777)
        if not str(directory).startswith("/dev/shm"):
            pytest.skip("only root's directories are here")
        process = fork_server.start(script, tmp_path / "run", STORE=str(directory / "d"))
        output = process.wait()
        assert process.returncode == 0, output


# ---- what hangs ----


def test_a_commit_that_hangs_bounds_flush_save_shutdown_and_training_and_is_named(store):
    """A sync in the kernel cannot be ended; every wait for it can, and says what is stuck."""
    training = Training(store, max_async=1, keep=2).train(2)
    training.opt.ckpt.flush()
    saver = training.opt.ckpt._run.saver
    until(lambda: saver.supply.ready is not None)
    saver.loop.stuck_after = 0.3
    instruments.delay("fsync", 60_000_000)
    training.train(1)
    with pytest.raises(TimeoutError, match=r"steps 3 are not durable yet: step 3 is being committed in .*slot-.*, in fsync"):
        training.opt.ckpt.flush()
    with pytest.raises(TimeoutError, match="in fsync"):
        training.opt.ckpt.flush(timeout=0.01)
    training.train(3)
    assert training.found["steps"] == 6 and "the disk hangs" in training.found["last_error"]
    with pytest.raises(fxckpt.SaveFailed, match="in fsync"):
        training.opt.ckpt.save("best")
    began = time.monotonic()
    with pytest.raises((TimeoutError, fxckpt.SaveFailed)):
        training.opt.ckpt.shutdown()
    assert time.monotonic() - began < 30
    instruments.delay("fsync", 0)
    until(lambda: not saver.loop.alive())
    saver.store.close()
    assert fxckpt.latest(store).step in (2, 3)


def test_a_named_save_while_a_commit_hangs_ends_in_bounded_time_too(store, monkeypatch):
    training = Training(store, max_async=2, keep=2).train(2)
    training.opt.ckpt.flush()
    saver = training.opt.ckpt._run.saver
    until(lambda: saver.supply.ready is not None)
    saver.loop.stuck_after = 0.3
    monkeypatch.setattr(pool, "PATIENCE", 0.3)
    instruments.delay("fsync", 60_000_000)
    training.train(1)
    training.opt.ckpt.end_step()
    until(lambda: instruments.calls("fsync") and any("committed" in each.phase for each in saver.flights.under_way()))
    with pytest.raises((TimeoutError, fxckpt.SaveFailed, fxckpt.StoreError), match=r"disk hangs|in fsync"):
        training.opt.ckpt.save("best")
    training.train(2)
    instruments.delay("fsync", 0)
    monkeypatch.setattr(pool, "PATIENCE", 60)
    saver.loop.stuck_after = 60
    for _ in range(3):
        training.train(1)
        with contextlib.suppress(fxckpt.SaveFailed, fxckpt.StoreError):
            training.opt.ckpt.flush()
    assert all_good(store, training)[0] == training.found["steps"]


@pytest.mark.parametrize(
    ("op", "name"),
    [("pwrite", "write"), ("fdatasync", "fdatasync"), ("rename", "rename"), ("ftruncate", "ftruncate"), ("open", "open")],
)
def test_a_failure_is_reported_with_operation_path_offset_and_errno(op, name, store, caplog):
    training = Training(store, read_back="off").train(3)
    training.opt.ckpt.flush()
    saver = training.opt.ckpt._run.saver
    while saver.supply.ready is None:  # the next slot's own calls, and reading back, are not the ones to fail
        time.sleep(0.001)
    instruments.fail(1, errno.EIO, op)
    training.train()
    with pytest.raises((fxckpt.SaveFailed, OSError)) as raised:
        training.opt.ckpt.flush()
    error = raised.value
    assert error.errno == errno.EIO and "Input/output error" in str(error)
    path = error.path if isinstance(error, fxckpt.SaveFailed) else error.filename
    assert str(store) in os.fspath(path) and os.fspath(path) in str(error)
    if isinstance(error, fxckpt.SaveFailed):
        assert name in error.operation and error.operation in str(error)
    if op == "pwrite":
        assert f"offset {error.offset}" in str(error)
    assert [r for r in caplog.records if "step 4 failed" in r.getMessage() and str(error) in r.getMessage()], caplog.text
    assert (training.found["checkpoints_failed"], training.found["last_error"]) == (1, str(error))
    assert [p.suffix for p in store.iterdir()].count(".bad") == 1, "its blocks are in doubt, but it may be used again"


def test_a_full_disk_fails_each_checkpoint_and_recovers_when_there_is_room(store):
    training = Training(store).train(2)
    training.opt.ckpt.flush()
    for _ in range(3):
        instruments.fail(1, errno.ENOSPC, "pwrite")
        training.train()
        with pytest.raises(fxckpt.SaveFailed):
            training.opt.ckpt.flush()
    assert all_good(store, training) == [2, 1] and training.found["checkpoints_failed"] == 3
    assert not [p for p in store.iterdir() if p.suffix == ".bad"]
    training.train()
    training.opt.ckpt.flush()
    assert all_good(store, training)[0] == 6


def test_on_error_raise_stops_at_the_next_step(store):
    training = Training(store, on_error="raise").train(2)
    training.opt.ckpt.flush()
    instruments.fail(1, errno.EIO, "pwrite")
    training.train()
    training.opt.ckpt.end_step()
    until(lambda: training.found["checkpoints_failed"], timeout=20)
    steps, before = training.found["steps"], snapshot(training.model, training.opt)
    with pytest.raises(fxckpt.SaveFailed, match="Input/output"):
        training.train()
    assert training.found["steps"] == steps
    assert differences(snapshot(training.model, training.opt), before) == [], "the step was half done"
    training.train(2)  # said once
    training.opt.ckpt.flush()


def test_save_raises_its_own_failure_and_once(store):
    training = Training(store).train(2)
    training.opt.ckpt.flush()
    instruments.fail(1, errno.ENOSPC, "pwrite")
    with pytest.raises(fxckpt.SaveFailed):
        training.opt.ckpt.save("best")
    training.opt.ckpt.flush()
    training.opt.ckpt.save("best")
    assert fxckpt.load(store, model=mlp(), name="best").step == 2


def test_shutdown_raises_a_failure_that_nobody_was_told_of(store):
    training = Training(store).train(2)
    instruments.fail(1, errno.EIO, "fdatasync")
    training.train()
    with pytest.raises((fxckpt.SaveFailed, OSError)):
        training.opt.ckpt.shutdown()
    training.opt.ckpt.shutdown()
    training.train()


def test_a_failed_save_does_not_keep_load_from_going_back(store):
    training = Training(store).train(2)
    training.opt.ckpt.flush()
    instruments.fail(1, errno.EIO, "pwrite")
    training.train()
    assert fxckpt.load().step == 2
    assert differences(snapshot(training.model, training.opt), training.reference[2]) == []


def test_flush_gives_up_after_its_timeout_and_names_the_steps(store):
    training = Training(store)
    instruments.delay("fdatasync", 400_000)
    training.train(2)
    with pytest.raises(TimeoutError, match=r"steps 1, 2"):
        training.opt.ckpt.flush(timeout=0.05)
    instruments.delay("fdatasync", 0)
    training.opt.ckpt.flush()
    assert training.found["last_committed_step"] == 2


# ---- someone else ----

SECOND = """
from script_prelude import *
try:
    fxckpt.compile_step(torch.optim.SGD(mlp().parameters()), {!r})
except fxckpt.StoreLocked as error:
    print("LOCKED", error)
"""
"""A trainer that only tries to open the store."""


def test_a_second_trainer_on_the_same_directory_gets_a_clear_error(store, fork_server, tmp_path):
    training = Training(store).train(1)
    script = tmp_path / "second.py"
    script.write_text(SECOND.format(str(store)))
    process = fork_server.start(script, tmp_path / "second")
    output = process.wait()
    assert "LOCKED" in output and str(store) in output and str(os.getpid()) in output, output
    training.train(2)
    training.opt.ckpt.shutdown()
    assert "LOCKED" not in fork_server.start(script, tmp_path / "second").wait()


def test_a_second_run_in_the_same_process_gets_it_too(store):
    Training(store).train(1)
    with pytest.raises(fxckpt.StoreLocked):
        Training(store)


def test_a_run_whose_directory_was_removed_and_begun_anew_by_another_one_writes_nothing_there(store, fork_server, tmp_path):
    training = Training(store, keep=2, read_back="off").train(3)
    training.opt.ckpt.flush()
    script = tmp_path / "second.py"
    script.write_text(f"""
from script_prelude import *
from small_training import Training
import time
training = Training({str(store)!r}, keep=2)
print("LOADED", fxckpt.load().step)
training.train(2).opt.ckpt.flush()
print("SAVED", flush=True)
time.sleep(1000)
""")
    shutil.rmtree(store)
    process = fork_server.start(script, tmp_path / "second")
    until(lambda: "SAVED" in process.output or not process.alive(), why=lambda: process.output)
    assert "LOADED 0" in process.output
    there = sorted(os.listdir(store))
    training.train(4)
    with pytest.raises(fxckpt.FxckptError):
        training.opt.ckpt.flush()
    assert training.found["last_committed_step"] == 3 and "another run" in training.found["last_error"]
    assert sorted(os.listdir(store)) == there
    process.kill()


@pytest.mark.parametrize("writer", ["thread", "monitor"])
def test_a_lock_file_that_somebody_removes_is_taken_again(writer, store, fork_server, tmp_path):
    training = Training(store, writer=writer).train(1)
    training.opt.ckpt.flush()
    (store / "lock").unlink()
    training.train(3)
    training.opt.ckpt.flush()
    script = tmp_path / "second.py"
    script.write_text(SECOND.format(str(store)))
    assert "LOCKED" in fork_server.start(script, tmp_path / "second").wait()
    assert all_good(store, training) == [4, 3, 2, 1]
    training.opt.ckpt.shutdown()
    assert "LOCKED" not in fork_server.start(script, tmp_path / "second").wait()


class Box:
    """State of any kind."""

    value: object = 1

    def state_dict(self):
        if self.value is None:
            raise RuntimeError("not now")
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Drawn(Box):
    """The same, captured as a loader is."""

    def __iter__(self):
        return self


@pytest.mark.parametrize("kind", [Box, Drawn])
@pytest.mark.parametrize("wrong", [Box.state_dict, None], ids=["a value of no kind", "an exception"])
def test_state_that_can_no_longer_be_captured_is_a_failed_save_and_not_the_end_of_training(wrong, kind, store):
    box = kind()
    training = Training(store, extra={"box": box}).train(2)
    training.opt.ckpt.flush()
    box.value = wrong
    training.train(3)
    training.opt.ckpt.end_step()
    assert training.found["checkpoints_failed"] == 3 and training.found["steps"] == 5
    with pytest.raises((fxckpt.StateError, RuntimeError)):
        training.opt.ckpt.flush()
    box.value = 2
    training.train(1)
    training.opt.ckpt.flush()
    assert all_good(store, training) == [6, 2, 1]


def test_state_that_can_no_longer_be_captured_stops_training_at_the_next_step_if_asked(store):
    training = Training(store, extra={"box": (box := Box())}, on_error="raise").train(2)
    training.opt.ckpt.flush()
    box.value = None
    training.train(1)
    with pytest.raises(RuntimeError, match="not now"):
        training.train(1)


def test_save_and_flush_in_another_thread_do_not_disturb_training_and_take_one_step(store):
    training = Training(store, keep=2)
    training.reference[0] = training.now()
    over, saved = threading.Event(), []

    def save() -> None:
        while not over.is_set():
            training.opt.ckpt.save(f"n{len(saved)}")
            training.opt.ckpt.flush(60)
            saved.append(training.found["steps"])

    thread = threading.Thread(target=save)
    thread.start()
    try:
        while training.found["steps"] < 40 or len(saved) < 3:
            training.train(1)
    finally:
        over.set()
        thread.join(60)
    training.opt.ckpt.flush()
    assert not thread.is_alive() and training.found["checkpoints_failed"] == 0
    assert len(all_good(store, training)) == 2 + len(saved)


def test_a_fork_in_the_middle_trains_on_plainly_and_leaves_the_parent_alone(store, fork_server, tmp_path):
    script = tmp_path / "forks.py"
    script.write_text("""
from script_prelude import *
import os, sys
torch.manual_seed(0)
m = mlp()
opt = fxckpt.compile_step(torch.optim.AdamW(m.parameters()), "d", model=m, every=1, update="native", keep=20)
def train(steps):
    for _ in range(steps):
        m(torch.randn(4, 8)).sum().backward(); opt.step(); opt.zero_grad()
train(3)
child = os.fork()
train(3)
if child == 0:
    opt.ckpt.flush(); opt.ckpt.end_step(); opt.ckpt.statistics()
    try:
        opt.ckpt.save("child")
    except fxckpt.SetupError as error:
        print("CHILD", digest(m, opt), error, flush=True)
    sys.exit(7)  # an ordinary exit, with its exit handlers
else:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    opt.ckpt.flush()
    assert opt.ckpt.statistics()["last_committed_step"] == 6
    print("PARENT", digest(m, opt), flush=True)
""")
    process = fork_server.start(script, tmp_path / "forks", whole_exit=True)
    output = process.wait(60)
    words = {line.split()[0]: line.split()[1] for line in output.splitlines() if line.startswith(("CHILD", "PARENT"))}
    assert process.returncode == 0 and words["CHILD"] == words["PARENT"], output
    directory = tmp_path / "forks" / "d"
    assert [found.record.step for found in candidates(directory)] == [6, 5, 4, 3, 2, 1]
    assert not (directory / "named").exists() or not any((directory / "named").iterdir())
    for found in candidates(directory):
        Reader(found.path).verify()


# ---- exceptions and signals ----


class Explodes(torch.optim.SGD):
    """Its own step fails when told to; it cannot be traced, so it runs whole."""

    armed = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
                if self.armed:
                    raise RuntimeError("boom")


def test_a_forked_child_can_let_go_of_the_optimizer_while_the_parent_writes(fork_server, tmp_path):
    script = tmp_path / "forks.py"
    script.write_text("""
from script_prelude import *
import gc, os, sys
import instruments
m = mlp()
opt = fxckpt.compile_step(torch.optim.AdamW(m.parameters()), "d", model=m, every=1, update="native")
instruments.delay("fdatasync", 300_000)
m(torch.randn(4, 8)).sum().backward(); opt.step()
if os.fork() == 0:
    m(torch.randn(4, 8)).sum().backward(); opt.step()  # it does not wait for the parent's copies either
    del opt
    gc.collect()
    sys.exit(0)
assert os.wait()[1] == 0
opt.ckpt.flush()
""")
    process = fork_server.start(script, tmp_path / "forks", whole_exit=True)
    output = process.wait(30)
    assert process.returncode == 0, output
    assert fxckpt.latest(tmp_path / "forks" / "d").step == 1


def test_an_exception_inside_a_step_drops_its_checkpoint_and_nothing_hangs(store):
    torch.manual_seed(0)
    model = mlp()
    opt = Explodes(model.parameters(), lr=0.1)
    fxckpt.compile_step(opt, store, model=model, every=1, keep=20, update="native")

    def step():
        model(torch.randn(4, 8)).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step()
    step()
    opt.armed = True
    with pytest.raises(RuntimeError, match="boom"):
        step()
    opt.armed = False
    opt.zero_grad()
    step()
    opt.ckpt.flush()
    assert [found.record.step for found in candidates(store)] == [3, 2, 1]
    assert opt.ckpt.statistics()["steps"] == 3


def test_an_exception_while_layers_are_handed_over_drops_the_checkpoint(store):
    calls = []

    def on_layer(name, step, tensors):
        calls.append(name)
        if step == 2 and len(calls) == 3:
            raise RuntimeError("boom")

    training = Training(store, on_layer=on_layer).train(1)
    with pytest.raises(RuntimeError, match="boom"):
        training.train()
    training.opt.zero_grad()
    calls.clear()
    training.train(2)
    training.opt.ckpt.flush()
    assert 2 not in [found.record.step for found in candidates(store) if found.record.generation < 2]
    assert all_good(store, training)[0] == training.found["steps"]


def test_an_on_layer_that_raises_leaves_a_whole_step_behind(store):
    """Its error comes out of ``opt.step()`` once every layer was updated: the parameters are those of a step, not of half."""

    def on_layer(name, step, tensors):
        if step == 3:
            raise RuntimeError("boom")

    mine = Training(store, on_layer=on_layer).train(2)
    with pytest.raises(RuntimeError, match="boom"):
        mine.train()
    third = mine.now()
    assert mine.found["steps"] == 3
    mine.opt.zero_grad()
    mine.scheduler.step()
    mine.train(2).opt.ckpt.flush()
    assert [found.record.step for found in candidates(store)] == [5, 4, 2, 1]
    stock = Training(None).train(3)
    assert differences(third, stock.now()) == []
    assert differences(mine.now(), stock.train(2).now()) == []


def test_ctrl_c_while_a_step_waits_for_a_slow_disk_comes_through_and_training_can_go_on(store):
    training = Training(store, max_async=1, keep=20).train(1)
    training.opt.ckpt.flush()
    instruments.delay("fdatasync", 1_500_000)
    training.train()
    before = snapshot(training.model, training.opt)
    threading.Timer(0.4, signal.raise_signal, [signal.SIGINT]).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        training.train()
    assert time.monotonic() - began < 1.2, "it came only when the disk was done"
    assert differences(snapshot(training.model, training.opt), before) == [], "the interrupted step was half done"
    instruments.delay("fdatasync", 0)
    training.opt.zero_grad()
    training.train(2)
    training.opt.ckpt.flush()
    assert all_good(store, training)[0] == training.found["steps"]


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError('after the loop')"])
def test_an_exit_without_flush_commits_the_last_step(end, fork_server, tmp_path):
    script = tmp_path / "exits.py"
    script.write_text(f"""
from script_prelude import *
import sys
m = mlp()
opt = fxckpt.compile_step(torch.optim.AdamW(m.parameters()), "d", model=m, every=1, update="native")
for _ in range(4):
    m(torch.randn(4, 8)).sum().backward(); opt.step(); opt.zero_grad()
opt.ckpt.end_step()
{end}
""")
    process = fork_server.start(script, tmp_path / "exits", whole_exit=True)
    output = process.wait()
    assert process.returncode == (3 if "exit" in end else 1 if end else 0), output
    assert fxckpt.latest(tmp_path / "exits" / "d").step == 4


INTERRUPTED = """
from script_prelude import *
import os, signal, sys
torch.manual_seed(0); random.seed(0); np.random.seed(0)
m = mlp()
optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
s = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
opt = fxckpt.compile_step(optimizer, "d", model=m, every=1, update="native", extra={{"s": s}})
start = fxckpt.load().step
for step in {steps}:
    loss = m(torch.randn(4, 8)).square().mean()
    loss.backward()
    opt.step()
    if step == 5 and "STOP" in os.environ:
        {stop}
    opt.zero_grad()
    s.step()
    report(step, loss)
opt.ckpt.flush()
finish(m, optimizer, s)
"""


@pytest.mark.parametrize("steps", ["range(start, 10)", "fxckpt.steps(10)"])
@pytest.mark.parametrize("stop", ["raise ValueError", "os.kill(os.getpid(), signal.SIGINT)"])
def test_dying_between_step_and_scheduler_does_not_commit_half_a_step(steps, stop, fork_server, tmp_path):
    """An error or Ctrl-C, then the same command again: the same bits as if nothing had happened."""
    script = tmp_path / "train.py"
    script.write_text(INTERRUPTED.format(steps=steps, stop=stop))
    whole = fork_server.start(script, tmp_path / "whole").succeed()
    stopped = fork_server.start(script, tmp_path / "stopped", whole_exit=True, STOP="1")
    output = stopped.wait()
    assert stopped.returncode not in (None, 0) and "LOSS 4" in output and "LOSS 5" not in output, output
    again = fork_server.start(script, tmp_path / "stopped").succeed()
    assert again.keys() - whole.keys() == set() and "LOSS 4" not in again, again
    assert {key: whole[key] for key in again} == again
