"""The engine through its Python API: what is written is what was there, whatever disk and caller do."""

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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxckpt import errors
from fxckpt.engine import Engine, Sources, crc32c, crc32c_portable, io, read_verified

PATIENCE = 30.0
KB = 1024


@pytest.fixture(autouse=True)
def quiet_disk():
    """No test leaves a fault or a delay behind."""
    yield
    io.fail_none()
    for op in ("copy", "pwrite", "pread", "fdatasync", "open"):
        io.delay(op, 0)


@pytest.fixture
def make_engine():
    """Engines with small chunks, closed at the end of the test."""
    made = []

    def make(**options):
        made.append(Engine(**({"chunk_bytes": 8 * KB, "staging_bytes": 32 * KB} | options)))
        return made[-1]

    yield make
    for op in ("copy", "pwrite", "fdatasync"):
        io.delay(op, 0)
    for engine in made:
        engine.close(PATIENCE)


@dataclass
class Model:
    """Layers of arrays placed in files, after a header, and what the files must hold."""

    layers: list[list[np.ndarray]]
    files: list[tuple[int, bytes]] = field(default_factory=list)
    tensors: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def place(self, n_files: int = 1, header: bytes = b"{header}", gap: int = 0) -> Model:
        """Arrays go round the files in layer order; ``gap`` bytes that nobody covers follow each."""
        ends = [len(header)] * n_files
        turn = itertools.cycle(range(n_files))
        for layer, arrays in enumerate(self.layers):
            for array, file in zip(arrays, turn):
                self.tensors.append((layer, file, ends[file], array.nbytes, array.itemsize))
                ends[file] += array.nbytes + gap
        self.files = [(-(-end // 4096) * 4096, header) for end in ends]
        return self

    @property
    def names(self) -> list[str]:
        return [f"file-{i}" for i in range(len(self.files))]

    def sources(self, layer: int) -> Sources:
        return Sources([(array.ctypes.data, None, None) if array.flags.c_contiguous
                        else (array.ctypes.data, array.shape, array.strides) for array in self.layers[layer]])

    def plan(self, engine: Engine):
        return engine.plan(self.files, self.tensors, len(self.layers))

    def contents(self) -> list[bytes]:
        """The files' bytes as they must be for the arrays as they are now."""
        files = [bytearray(header.ljust(nbytes, b"\0")) for nbytes, header in self.files]
        arrays = iter([array for arrays in self.layers for array in arrays])
        for (_, file, offset, nbytes, _), array in zip(self.tensors, arrays):
            files[file][offset:offset + nbytes] = array.tobytes()
        return [bytes(file) for file in files]

    def update(self, layer: int, step: int) -> None:
        """What an optimizer does to a layer, in place."""
        for index, array in enumerate(self.layers[layer]):
            array[...] = np.arange(array.size).reshape(array.shape) * (step + 1) + layer + index


def make_model(layers: int = 6, items: int = 3000, dtype: str = "float32", **place) -> Model:
    """Each layer has three arrays, one of them transposed in memory; sizes differ by layer."""
    shapes = [[(items + 17 * n,), (7, items // 20 + n), (1,)] for n in range(layers)]
    zeros = [[np.zeros(a, dtype), np.zeros(b[::-1], dtype).T, np.zeros(c, dtype)] for a, b, c in shapes]
    model = Model(zeros)
    for layer in range(layers):
        model.update(layer, 0)
    return model.place(**place)


def begin_all(engine: Engine, model: Model, directory: Path, **options):
    """A checkpoint with every layer emitted."""
    directory.mkdir(exist_ok=True)
    checkpoint = engine.begin(model.plan(engine), str(directory), model.names, **options)
    for layer in range(len(model.layers)):
        checkpoint.emit(layer, model.sources(layer))
    return checkpoint


def read_all(model: Model, directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in model.names]


def parts(data: bytes, nbytes: int) -> list[bytes]:
    return [data[at:at + nbytes] for at in range(0, len(data), nbytes)]


def crcs_of(data: bytes, chunk: int) -> list[int]:
    return [crc32c(part) for part in parts(data, chunk)]


def fence(engine: Engine, layer: int) -> None:
    assert engine.fence(layer, PATIENCE), f"the fence of layer {layer} hangs"


def wait_for(condition, timeout: float = PATIENCE) -> None:
    """Until something that happens in another thread has happened."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


# ---- what is written ----

dtypes = st.sampled_from(["uint8", "float16", "float32", "float64", "complex128"])


@st.composite
def arrays(draw) -> np.ndarray:
    """Up to three dimensions, possibly empty, transposed, or every other item of a larger array."""
    shape = draw(st.lists(st.integers(0, 40), max_size=3))
    step = draw(st.sampled_from([1, 1, 2]))
    base = np.zeros([n * step for n in shape], draw(dtypes))
    base = base.transpose(draw(st.permutations(range(len(shape)))))
    array = base[(*[slice(None, None, step)] * len(shape), ...)]
    array[...] = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 200, array.shape)
    return array


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.lists(arrays(), max_size=4), max_size=8), n_files=st.integers(1, 3),
       header=st.binary(max_size=9000), gap=st.integers(0, 9), chunk=st.sampled_from([4, 8, 64]),
       dice=st.randoms(use_true_random=False))
def test_files_hold_the_sources(tmp_path, layers, n_files, header, gap, chunk, dice):
    model = Model(layers).place(n_files, header, gap)
    engine = Engine(chunk_bytes=chunk * KB, staging_bytes=64 * KB, threads=dice.randint(1, 3))
    checkpoint = engine.begin(model.plan(engine), str(tmp_path), model.names)
    order = list(range(len(layers)))
    dice.shuffle(order)
    for layer in order:
        checkpoint.emit(layer, model.sources(layer))
    assert checkpoint.copied(PATIENCE) and checkpoint.durable(PATIENCE)
    assert checkpoint.emitted() == len(layers)
    contents = model.contents()
    assert read_all(model, tmp_path) == contents
    assert [checkpoint.crcs(i) for i in range(n_files)] == [crcs_of(data, chunk * KB) for data in contents]
    engine.close()


def test_chunks_of_the_default_size(tmp_path):
    """Long enough for every loop of the fused copy and checksum, at addresses that are not aligned."""
    model = Model([[np.random.default_rng(n).integers(0, 256, 4_500_000 + n, dtype=np.uint8)] for n in range(2)])
    model.place(header=b"h" * 1001)
    engine = Engine()
    checkpoint = begin_all(engine, model, tmp_path)
    assert checkpoint.durable(PATIENCE) and read_all(model, tmp_path) == model.contents()
    assert checkpoint.crcs(0) == [crc32c_portable(part) for part in parts(model.contents()[0], 4 << 20)]
    engine.close()


def test_recycled_file_of_another_size_is_cut_or_extended(tmp_path, make_engine):
    engine = make_engine()
    for layers in (6, 2, 4):
        model = make_model(layers)
        assert begin_all(engine, model, tmp_path).durable(PATIENCE)
        assert read_all(model, tmp_path) == model.contents()


def test_nothing_is_durable_before_the_last_emit(tmp_path, make_engine):
    engine, model = make_engine(), make_model()
    model.layers.append([])  # a layer without tensors counts all the same
    checkpoint = engine.begin(model.plan(engine), str(tmp_path), model.names)
    for layer in range(6):
        checkpoint.emit(layer, model.sources(layer))
    fence(engine, -1)
    assert not engine.pending()
    assert not checkpoint.copied(0.05) and not checkpoint.durable(0.05)
    assert checkpoint.emitted() == 6
    checkpoint.emit(6, Sources([]))
    assert checkpoint.copied(PATIENCE) and checkpoint.durable(PATIENCE)


def test_known_chunks_are_not_written_again(tmp_path, make_engine):
    engine, model = make_engine(), make_model(header=b"h" * 100)
    first = begin_all(engine, model, tmp_path)
    assert first.durable(PATIENCE)
    known = [dict(enumerate(first.crcs(0)))]
    before = engine.statistics()["bytes_written"]
    model.layers[0][0][0] += 1  # one item, in the first chunk
    second = begin_all(engine, model, tmp_path, known=known)
    assert second.durable(PATIENCE)
    assert engine.statistics()["bytes_written"] == before + 8 * KB
    assert read_all(model, tmp_path) == model.contents()
    assert second.crcs(0) == crcs_of(model.contents()[0], 8 * KB)


def test_mock_does_all_but_the_disk(tmp_path, make_engine):
    engine, model = make_engine(mock=True), make_model()
    checkpoint = begin_all(engine, model, tmp_path / "nowhere")
    assert checkpoint.durable(PATIENCE)
    assert checkpoint.crcs(0) == crcs_of(model.contents()[0], 8 * KB)
    assert engine.statistics()["bytes_written"] == 0
    assert not list((tmp_path / "nowhere").iterdir())


# ---- fences ----

@pytest.mark.parametrize("staging", [0, 16 * KB, 1 << 20])
@pytest.mark.parametrize("slow", [{"copy": 300}, {"pwrite": 1500}, {"copy": 200, "pwrite": 500}])
def test_memory_changed_after_its_fence_never_reaches_the_file(tmp_path, make_engine, staging, slow):
    """Every step changes every layer in place, right after its fence; several checkpoints are in flight."""
    engine, model = make_engine(staging_bytes=staging), make_model()
    plan = model.plan(engine)
    for op, microseconds in slow.items():
        io.delay(op, microseconds)
    in_flight, expected = [], {}
    for step in range(8):
        directory = tmp_path / str(step)
        directory.mkdir()
        checkpoint = engine.begin(plan, str(directory), model.names)
        for layer in range(len(model.layers)):
            fence(engine, layer)
            model.update(layer, step)
            checkpoint.emit(layer, model.sources(layer))
        expected[directory] = model.contents()
        in_flight.append(checkpoint)
    assert all(checkpoint.durable(PATIENCE) for checkpoint in in_flight)
    assert all(read_all(model, directory) == contents for directory, contents in expected.items())


def test_fence_helps_first_and_does_not_wait_for_the_disk(tmp_path, make_engine):
    engine, model = make_engine(staging_bytes=1 << 20), make_model()
    io.delay("pwrite", 10_000_000)
    checkpoint = begin_all(engine, model, tmp_path)
    contents, start = model.contents(), time.monotonic()
    fence(engine, -1)
    for layer in range(len(model.layers)):
        model.update(layer, 9)
    assert time.monotonic() - start < 5 and not checkpoint.durable(0)
    io.delay("pwrite", 0)
    assert checkpoint.durable(PATIENCE)
    assert read_all(model, tmp_path) == contents
    statistics = engine.statistics()
    assert 0 < statistics["staging_peak_bytes"] <= 1 << 20 and statistics["staging_bytes"] == 0
    assert statistics["stall_seconds"] > 0


def test_fence_without_room_times_out_and_counts_the_stall(tmp_path, make_engine):
    engine, model = make_engine(staging_bytes=0), make_model()
    io.delay("pwrite", 10_000_000)
    checkpoint = begin_all(engine, model, tmp_path)
    assert engine.pending() and not engine.fence(5, 0.2)
    assert 0.15 < engine.statistics()["stall_seconds"] < 5
    checkpoint.cancel()
    fence(engine, 5)


def test_fence_of_a_layer_that_was_not_emitted_passes_at_once(tmp_path, make_engine):
    engine, model = make_engine(staging_bytes=1 << 20), make_model()
    io.delay("copy", 20_000)
    checkpoint = engine.begin(model.plan(engine), str(tmp_path), model.names)
    checkpoint.emit(0, model.sources(0))
    assert engine.fence(1, 0)
    fence(engine, 0)  # its last chunk waits for layer 1, so the fence itself copies it
    assert not engine.pending()
    assert checkpoint.emitted() == 1


def test_fence_fails_a_checkpoint_rather_than_wait_for_an_emit_that_may_never_come(tmp_path, make_engine):
    engine, model = make_engine(staging_bytes=0), make_model()
    checkpoint = engine.begin(model.plan(engine), str(tmp_path), model.names)
    checkpoint.emit(0, model.sources(0))
    fence(engine, 0)
    with pytest.raises(errors.SaveFailed, match="staging"):
        checkpoint.durable(0)
    checkpoint.emit(1, model.sources(1))  # counts, and asks for nothing
    assert checkpoint.emitted() == 2 and not engine.pending()


@pytest.mark.parametrize("staging", [0, 16 * KB, 40 * KB])
def test_memory_stays_within_its_bound(tmp_path, make_engine, staging):
    engine, model = make_engine(threads=2, staging_bytes=staging), make_model()
    assert engine.memory_bytes == 2 * 8 * KB + staging // (8 * KB) * (8 * KB)
    io.delay("pwrite", 2000)
    checkpoint = begin_all(engine, model, tmp_path)
    fence(engine, -1)
    assert engine.statistics()["staging_peak_bytes"] <= staging
    assert checkpoint.durable(PATIENCE)


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
    before = io.calls()
    assert begin_all(engine, model, tmp_path / "good").durable(PATIENCE)
    total = io.calls() - before
    for nth, error in itertools.product(range(1, total + 1), (errno.EIO, errno.ENOSPC)):
        directory = tmp_path / f"{nth}-{error}"
        io.fail(nth, error)
        with pytest.raises(errors.SaveFailed) as failure:
            save(engine, model, directory)
        raised = failure.value
        assert raised.errno == error and Path(raised.path).parent == directory
        assert raised.operation in ("open", "ftruncate", "pwrite", "fdatasync", "close")
        assert (raised.offset is not None) == (raised.operation in ("pwrite", "ftruncate"))
        assert not engine.pending()
        io.fail_none()
    assert total > 10
    assert save(engine, model, tmp_path / "last") and read_all(model, tmp_path / "last") == contents


@pytest.mark.parametrize("error", [0, errno.EINTR])
def test_short_and_interrupted_writes_go_on(tmp_path, make_engine, error):
    engine, model = make_engine(chunk_bytes=32 * KB), make_model()
    for nth in range(1, 8):
        io.fail(nth, error, "pwrite" if error == 0 else None)
        assert begin_all(engine, model, tmp_path / str(nth)).durable(PATIENCE)
        assert read_all(model, tmp_path / str(nth)) == model.contents()


def test_refused_o_direct_is_said_once_and_replaced(tmp_path, make_engine, caplog):
    engine, model = make_engine(), make_model()
    caplog.set_level(logging.WARNING, logger="fxckpt")
    for nth, op in enumerate(["open", "pwrite", "open"]):
        io.fail(1, errno.EINVAL, op)
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
    io.delay("copy", 200)
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
    io.delay("copy", 200_000)
    before = io.calls("pwrite")
    checkpoint = begin_all(engine, model, tmp_path)
    checkpoint.cancel()
    assert checkpoint.settled(PATIENCE) and io.calls("pwrite") == before


def begin_hanging(engine: Engine, model: Model, directory: Path):
    """A checkpoint with a thread stuck in a write."""
    io.delay("pwrite", 600_000_000)
    before = io.calls("pwrite")
    checkpoint = begin_all(engine, model, directory)
    wait_for(lambda: io.calls("pwrite") > before)
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
    io.delay("pwrite", 0)
    assert checkpoint.settled(PATIENCE)
    assert begin_all(engine, model, tmp_path).durable(PATIENCE)


def test_close_while_writing_cancels(tmp_path, make_engine):
    engine, model = make_engine(), make_model()
    io.delay("pwrite", 3000)
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
    io.delay("pwrite", 0)
    assert checkpoint.settled(PATIENCE)


def test_interrupt_ends_a_wait(tmp_path, make_engine):
    engine, model = make_engine(), make_model()
    io.delay("pwrite", 60_000_000)
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
    io.delay("pwrite", 3000)
    checkpoint = begin_all(engine, model, tmp_path)

    def child() -> bool:
        open_files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        checkpoint.cancel(), checkpoint.release(), engine.close()
        return (engine.fence(-1, 1) and not engine.pending() and checkpoint.settled(1)
                and refuses(checkpoint.emit, 0, model.sources(0)) and refuses(checkpoint.durable, 1)
                and refuses(engine.begin, model.plan(engine), str(tmp_path), model.names)
                and not any(name.startswith(str(tmp_path)) for name in open_files)
                and engine.statistics()["bytes_written"] == 0)

    assert [in_child(child) for _ in range(10)] == [0] * 10
    io.delay("pwrite", 0)
    assert checkpoint.durable(PATIENCE)
    assert read_all(model, tmp_path) == model.contents()


def run_script(script: str) -> tuple[int, str]:
    """Exit status and error output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, timeout=60,
                          capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("ending", ["", "del engine, checkpoint", "os._exit(0)", "engine.close()"])
def test_process_that_ends_while_writing_ends(tmp_path, ending):
    """However a script ends, with work in flight: no crash, no hang."""
    script = f"""
import os, numpy as np
from fxckpt.engine import Engine, Sources, io
engine = Engine(chunk_bytes=8192, staging_bytes=0)
array = np.ones(1 << 20, np.uint8)
plan = engine.plan([(array.nbytes, b"")], [(0, 0, 0, array.nbytes, 1)], 1)
io.delay("copy", 500); io.delay("pwrite", 500)
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


# ---- checksums and reading ----

def crc_reference(data: bytes, crc: int = 0) -> int:
    """CRC-32C bit by bit."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_checksum_of_every_length_and_alignment():
    """272, 8208 and 349520 bytes are the stretches of the interleaved loop, three at a time."""
    data = bytes(np.random.default_rng(5).integers(0, 256, 1_200_000, dtype=np.uint8))
    turns = [3 * 272, 6 * 272, 3 * 8208, 3 * 349_520]
    stretches = [turn + more for turn in turns for more in (-1, 0, 8, 17, 26_000)]
    assert crc32c(b"123456789") == crc32c_portable(b"123456789") == 0xE3069283
    for length in (*range(70), *stretches):
        for skew in (0, 1, 7):
            part = data[skew:skew + length]
            assert crc32c(part) == crc32c_portable(part), (length, skew)
        if length < 2000:
            expected = crc_reference(data[:length], 77)
            assert crc32c(data[:length], 77) == crc32c_portable(data[:length], 77) == expected, length
    assert crc32c(data[1000:], crc32c(data[:1000])) == crc32c(data)


def make_file(path: Path, nbytes: int = 50_000, chunk: int = 8 * KB) -> tuple[bytes, dict]:
    """A file with its record: the arguments of read_verified."""
    data = bytes(np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8))
    path.write_bytes(data)
    return data, {"nbytes": nbytes, "chunk_bytes": chunk, "crcs": crcs_of(data, chunk)}


@pytest.mark.parametrize("nbytes", [0, 1, 8 * KB, 49_152, 50_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_reading_fills_targets_of_any_shape(tmp_path, nbytes, threads):
    data, record = make_file(tmp_path / "file", nbytes)
    flat = np.zeros(max(nbytes - 1, 0), np.uint8)
    pairs = np.zeros((2, nbytes // 2), np.uint8).T  # row by row, into memory that lies column by column
    targets = [(min(1, nbytes), flat.nbytes, flat.ctypes.data, None, None),
               (0, pairs.nbytes, pairs.ctypes.data, pairs.shape, pairs.strides), (0, 0, 0, (0, 3), (3, 1))]
    read_verified(tmp_path / "file", **record, targets=targets, threads=threads)
    assert flat.tobytes() == data[1:] and pairs.tobytes() == data[:pairs.nbytes]


def test_any_flipped_bit_is_found_and_nothing_of_its_chunk_delivered(tmp_path):
    path, dice = tmp_path / "file", random.Random(1)
    data, record = make_file(path)
    target = np.zeros(len(data), np.uint8)
    targets = [(0, len(data), target.ctypes.data, None, None)]
    for at in [0, 8191, 8192, 49_999, *(dice.randrange(len(data)) for _ in range(40))]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        target[:] = 0
        with pytest.raises(errors.Corrupt) as failure:
            read_verified(path, **record, targets=targets)
        begin = at // 8192 * 8192
        assert failure.value.offset == begin and failure.value.path == str(path)
        assert not target[begin:begin + 8192].any()


def test_wrong_size_missing_file_and_wrong_record_are_corruption(tmp_path):
    path = tmp_path / "file"
    data, record = make_file(path)
    for broken in (data[:-1], data + b"x", b""):
        path.write_bytes(broken)
        with pytest.raises(errors.Corrupt, match="bytes"):
            read_verified(path, **record, targets=[])
    path.write_bytes(data)
    with pytest.raises(errors.Corrupt, match="checksums"):
        read_verified(path, **record | {"crcs": record["crcs"][:-1]}, targets=[])
    path.unlink()
    with pytest.raises(errors.Corrupt, match="missing"):
        read_verified(path, **record, targets=[])


def test_reading_survives_faults_or_says_which(tmp_path):
    path = tmp_path / "file"
    _, record = make_file(path)
    for op, error in (("open", errno.EINVAL), ("pread", errno.EINVAL), ("pread", errno.EINTR), ("pread", 0)):
        io.fail(1, error, op)
        read_verified(path, **record, targets=[])
    io.fail(2, errno.EIO, "pread")
    with pytest.raises(OSError) as failure:
        read_verified(path, **record, targets=[])
    assert failure.value.errno == errno.EIO and failure.value.filename == str(path)


# ---- the table of file operations ----

def test_operations_raise_with_name_and_offset(tmp_path):
    with pytest.raises(FileNotFoundError) as failure:
        io.open(tmp_path / "no/file", os.O_RDONLY)
    assert failure.value.filename == str(tmp_path / "no/file")
    fd = io.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    io.fail(1, errno.ENOSPC, "pwrite")
    with pytest.raises(OSError) as failure:
        io.pwrite(fd, b"abc", 100)
    assert (failure.value.errno, failure.value.filename, failure.value.offset) == (
        errno.ENOSPC, str(tmp_path / "file"), 100)
    io.close(fd)
    for operation in (io.unlink, io.rmdir, io.fsync_dir, io.read_file):
        with pytest.raises(FileNotFoundError):
            operation(tmp_path / "none")


def test_log_replays_to_the_same_files(tmp_path, make_engine):
    """What is recorded is all that was done, in order: also from two writer threads, across renames."""
    engine, model = make_engine(), make_model(n_files=2)
    io.record(tmp_path / "log")
    io.mkdir(tmp_path / "a")
    checkpoint = begin_all(engine, model, tmp_path / "a")
    assert checkpoint.durable(PATIENCE)
    fd = io.open(tmp_path / "a/more", os.O_RDWR | os.O_CREAT)
    io.rename(tmp_path / "a", tmp_path / "b")
    io.pwrite(fd, b"after the rename", 3)
    io.fail(1, errno.EIO, "fsync")
    with pytest.raises(OSError):
        io.fsync(fd)
    io.close(fd)
    io.fsync_dir(tmp_path / "b")
    io.stop_recording()
    calls, files = io.read_log(tmp_path / "log"), {}
    assert [call.order for call in calls] == list(range(len(calls)))
    for call in calls:
        if call.op == "open" and call.created:
            files[call.path] = bytearray()
        elif call.op == "ftruncate":
            files[call.path] = files[call.path][:call.length].ljust(call.length, b"\0")
        elif call.op == "pwrite":
            size = max(len(files[call.path]), call.offset + call.result)
            files[call.path] = files[call.path].ljust(size, b"\0")
            files[call.path][call.offset:call.offset + call.result] = call.data
        elif call.op == "rename":
            files = {path.replace(call.path, call.target): data for path, data in files.items()}
    assert files == {str(path): path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert [call.result for call in calls if call.op == "fsync"] == [-errno.EIO, 0]
    synced = {call.path for call in calls if call.op == "fdatasync"}
    assert synced == {str(tmp_path / "a" / name) for name in model.names}


def test_every_write_is_before_the_sync_of_its_file(tmp_path, make_engine):
    engine, model = make_engine(threads=3), make_model(n_files=3)
    io.record(tmp_path / "log")
    assert begin_all(engine, model, tmp_path / "a").durable(PATIENCE)
    io.stop_recording()
    calls = io.read_log(tmp_path / "log")
    for name in model.names:
        of_file = [call.op for call in calls if call.path == str(tmp_path / "a" / name)]
        assert of_file[-1] == "fdatasync" and of_file.count("fdatasync") == 1 and "pwrite" in of_file
