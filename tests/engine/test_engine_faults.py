"""The engine when the disk fails or hangs, when it is cancelled or closed, and when its process forks or ends."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import instruments
import pytest
from engine_model import KB, PATIENCE, Model, begin_all, engines, fence, make_model, read_all, wait_for
from repository import python_path

from fxckpt import errors
from fxckpt.engine import Engine, Sources


@pytest.fixture
def make_engine():
    with engines() as make:
        yield make


# ---- what goes wrong ----


def save(engine: Engine, model: Model, directory: Path) -> bool:
    """A whole checkpoint, with nothing of it left to do when this returns or raises."""
    checkpoint = begin_all(engine, model, directory)
    fence(engine, -1)
    try:
        return checkpoint.durable(PATIENCE)
    finally:
        assert checkpoint.settled(PATIENCE)


def test_any_call_may_fail_and_nothing_hangs(tmp_path, make_engine):
    engine, model = make_engine(), make_model(2, 2000, n_files=2)
    contents = model.contents()
    before = instruments.calls()
    assert begin_all(engine, model, tmp_path / "good").durable(PATIENCE)
    total = instruments.calls() - before
    for nth, error in itertools.product(range(1, total + 1), (errno.EIO, errno.ENOSPC)):
        directory = tmp_path / f"{nth}-{error}"
        instruments.fail(nth, error)
        with pytest.raises(errors.SaveFailed) as failure:
            save(engine, model, directory)
        raised = failure.value
        assert raised.errno == error and Path(raised.path).parent == directory
        assert raised.operation in ("open", "ftruncate", "pwrite", "fdatasync", "close")
        assert (raised.offset is not None) == (raised.operation in ("pwrite", "ftruncate"))
        assert not engine.pending()
        instruments.fail_none()
    assert total > 10
    assert save(engine, model, tmp_path / "last") and read_all(model, tmp_path / "last") == contents


@pytest.mark.parametrize("error", [0, errno.EINTR])
def test_short_and_interrupted_writes_go_on(tmp_path, make_engine, error):
    engine, model = make_engine(chunk_bytes=32 * KB), make_model()
    for nth in range(1, 8):
        instruments.fail(nth, error, "pwrite" if error == 0 else None)
        assert begin_all(engine, model, tmp_path / str(nth)).durable(PATIENCE)
        assert read_all(model, tmp_path / str(nth)) == model.contents()


def test_refused_o_direct_is_said_once_and_replaced(tmp_path, make_engine, caplog):
    engine, model = make_engine(), make_model()
    caplog.set_level(logging.WARNING, logger="fxckpt")
    for nth, op in enumerate(["open", "pwrite", "open"]):
        instruments.fail(1, errno.EINVAL, op)
        assert begin_all(engine, model, tmp_path / str(nth)).durable(PATIENCE)
        assert read_all(model, tmp_path / str(nth)) == model.contents()
    assert engine.buffered
    assert sum("O_DIRECT" in record.message for record in caplog.records) == 1


def test_buffered_engine_writes_the_same(tmp_path, make_engine):
    engine, model = make_engine(direct=False), make_model()
    assert begin_all(engine, model, tmp_path).durable(PATIENCE)
    assert read_all(model, tmp_path) == model.contents() and not engine.buffered


def test_cancel_at_any_time_frees_the_memory_at_once(tmp_path, make_engine):
    engine, model, dice = make_engine(), make_model(), random.Random(3)
    plan = model.plan(engine)
    instruments.delay("copy", 200)
    for _ in range(30):
        checkpoint = engine.begin(plan, str(tmp_path), model.names)
        for layer in range(dice.randint(0, len(model.layers))):
            checkpoint.emit(layer, model.sources(layer))
        time.sleep(dice.random() * 0.004)
        checkpoint.cancel()
        assert not engine.pending() and engine.fence(-1, 0)
        with contextlib.suppress(errors.Cancelled):
            assert checkpoint.durable(0), "neither durable nor cancelled"
        assert checkpoint.settled(PATIENCE)
        assert engine.statistics()["staging_bytes"] == 0
        checkpoint.release()
    last = begin_all(engine, model, tmp_path)
    assert last.durable(PATIENCE) and read_all(model, tmp_path) == model.contents()


def test_cancelled_checkpoint_writes_nothing_more(tmp_path, make_engine):
    engine, model = make_engine(), make_model()
    instruments.delay("copy", 200_000)
    before = instruments.calls("pwrite")
    checkpoint = begin_all(engine, model, tmp_path)
    checkpoint.cancel()
    assert checkpoint.settled(PATIENCE) and instruments.calls("pwrite") == before


def begin_hanging(engine: Engine, model: Model, directory: Path):
    """A checkpoint with a thread stuck in a write."""
    instruments.delay("pwrite", 600_000_000)
    before = instruments.calls("pwrite")
    checkpoint = begin_all(engine, model, directory)
    wait_for(lambda: instruments.calls("pwrite") > before)
    return checkpoint


def test_hung_disk_blocks_neither_fence_nor_cancel_and_its_files_stay_barred(tmp_path, make_engine):
    engine, model = make_engine(staging_bytes=1 << 20), make_model()
    checkpoint, start = begin_hanging(engine, model, tmp_path), time.monotonic()
    fence(engine, -1)
    checkpoint.cancel()
    assert not checkpoint.settled(0.05)
    with pytest.raises(errors.SaveFailed) as failure:
        begin_all(engine, model, tmp_path)
    assert failure.value.errno == errno.EBUSY
    assert time.monotonic() - start < 10
    instruments.delay("pwrite", 0)
    assert checkpoint.settled(PATIENCE)
    assert begin_all(engine, model, tmp_path).durable(PATIENCE)


def test_close_while_writing_cancels(tmp_path, make_engine):
    engine, model = make_engine(), make_model()
    instruments.delay("pwrite", 3000)
    checkpoint = begin_all(engine, model, tmp_path)
    engine.close(PATIENCE)
    engine.close(PATIENCE)
    with pytest.raises(errors.Cancelled):
        checkpoint.durable(PATIENCE)
    with pytest.raises(errors.SaveFailed, match="closed"):
        begin_all(engine, model, tmp_path)
    assert engine.fence(-1, 0) and not engine.pending()
    checkpoint.release()
    checkpoint.release()


def test_close_leaves_a_thread_behind_that_is_stuck_in_the_disk(tmp_path, make_engine, caplog):
    engine, model = make_engine(), make_model()
    checkpoint, start = begin_hanging(engine, model, tmp_path), time.monotonic()
    engine.close(0.2)
    assert time.monotonic() - start < 5 and "left behind" in caplog.text
    instruments.delay("pwrite", 0)
    assert checkpoint.settled(PATIENCE)


def test_interrupt_ends_a_wait(tmp_path, make_engine):
    engine, model = make_engine(), make_model()
    instruments.delay("pwrite", 60_000_000)
    checkpoint = begin_all(engine, model, tmp_path)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.durable(PATIENCE)
    assert time.monotonic() - start < 10
    timer.join()


def test_writer_threads_take_no_signals(make_engine):
    make_engine(threads=3)
    threads = {}
    for task in Path("/proc/self/task").iterdir():
        if (name := (task / "comm").read_text().strip()).startswith("fxckpt-w"):
            status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            threads[name] = int(status["SigBlk"], 16)
    usual = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1))
    assert {"fxckpt-w0", "fxckpt-w1", "fxckpt-w2"} <= threads.keys()
    assert all(blocked & usual == usual for blocked in threads.values())


def test_wrong_arguments_are_named(tmp_path, make_engine):
    engine, model = make_engine(), make_model()
    with pytest.raises(errors.SetupError, match="chunk_bytes=1000"):
        Engine(chunk_bytes=1000)
    with pytest.raises(errors.SetupError, match="overlap"):
        engine.plan([(8192, b"x" * 100)], [(0, 0, 50, 4, 4)], 1)
    with pytest.raises(errors.SetupError, match="4096"):
        engine.plan([(5000, b"")], [], 0)
    with pytest.raises(errors.SetupError, match="1 names for 2 files"):
        engine.begin(make_model(n_files=2).plan(engine), str(tmp_path), ["one"])
    checkpoint = engine.begin(model.plan(engine), str(tmp_path), model.names)
    checkpoint.emit(0, model.sources(0))
    for layer, sources in ((0, model.sources(0)), (1, Sources([])), (99, Sources([]))):
        with pytest.raises(errors.SetupError, match=f"layer {layer}"):
            checkpoint.emit(layer, sources)
    with pytest.raises(errors.SaveFailed) as failure:
        engine.begin(model.plan(engine), str(tmp_path / "missing"), model.names)
    assert failure.value.errno == errno.ENOENT and failure.value.operation == "open"


# ---- processes ----


def in_child(work) -> int:
    """Runs ``work`` in a forked child; its exit status, 0 if it returned True, 99 if it hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (done := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(done[1])
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 99


def refuses(function, *arguments) -> bool:
    try:
        function(*arguments)
    except errors.Cancelled:
        return True
    return False


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_while_writing_disturbs_neither_side(tmp_path, make_engine):
    engine, model = make_engine(), make_model()
    instruments.delay("pwrite", 3000)
    checkpoint = begin_all(engine, model, tmp_path)

    def child() -> bool:
        open_files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        checkpoint.cancel(), checkpoint.release(), engine.close()
        return (
            engine.fence(-1, 1)
            and not engine.pending()
            and checkpoint.settled(1)
            and refuses(checkpoint.emit, 0, model.sources(0))
            and refuses(checkpoint.durable, 1)
            and refuses(engine.begin, model.plan(engine), str(tmp_path), model.names)
            and not any(name.startswith(str(tmp_path)) for name in open_files)
            and engine.statistics()["bytes_written"] == 0
        )

    assert [in_child(child) for _ in range(10)] == [0] * 10
    instruments.delay("pwrite", 0)
    assert checkpoint.durable(PATIENCE)
    assert read_all(model, tmp_path) == model.contents()


def run_script(script: str) -> tuple[int, str]:
    """Exit status and error output of a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", script], env=env, timeout=60, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("ending", ["", "del engine, checkpoint", "os._exit(0)", "engine.close()"])
def test_process_that_ends_while_writing_ends(tmp_path, ending):
    """However a script ends, with work in flight: no crash, no hang."""
    script = f"""
import os, numpy as np
import instruments
from fxckpt.engine import Engine, Sources
engine = Engine(chunk_bytes=8192, staging_bytes=0)
array = np.ones(1 << 20, np.uint8)
plan = engine.plan([(array.nbytes, b"")], [(0, 0, 0, array.nbytes, 1)], 1)
instruments.delay("copy", 500); instruments.delay("pwrite", 500)
checkpoint = engine.begin(plan, {str(tmp_path)!r}, ["file"])
checkpoint.emit(0, Sources([(array.ctypes.data, None, None)]))
{ending}
"""
    assert run_script(script) == (0, "")


def test_engine_that_is_garbage_ends_its_threads(tmp_path):
    engine, model = Engine(chunk_bytes=8 * KB, threads=5), make_model()
    begin_all(engine, model, tmp_path)
    count = len(os.listdir("/proc/self/task"))
    del engine
    gc.collect()
    wait_for(lambda: len(os.listdir("/proc/self/task")) <= count - 5)


def test_the_engine_that_is_shipped_has_no_instruments():
    script = """
import sys
from fxckpt.engine import crc32c, _lib
assert crc32c(b"123456789") == 0xE3069283
assert not [name for name in dir(_lib.load()[1]) if name.startswith("fx_io")]
assert b"fx_io_fail" not in open(sys.modules["fxckpt.engine._engine"].__file__, "rb").read()
"""
    assert run_script(script) == (0, "")


def test_missing_extension_is_an_error_that_says_how_to_build_it():
    script = """
import sys
import fxckpt.engine, fxckpt.engine.io
assert "fxckpt.engine._engine" not in sys.modules, "importing must load nothing"
sys.modules["fxckpt.engine._engine"] = None
from fxckpt.engine import Engine
try:
    Engine()
except fxckpt.errors.EngineMissing as error:
    assert "pip install" in str(error)
else:
    sys.exit("no error")
"""
    assert run_script(script) == (0, "")
