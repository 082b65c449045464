"""The engine through its Python API: what is written is what was there when it was emitted."""

from __future__ import annotations

import time

import instruments
import numpy as np
import pytest
from engine_model import (
    KB,
    PATIENCE,
    Model,
    begin_all,
    crcs_of,
    engines,
    fence,
    make_model,
    parts,
    read_all,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxckpt import errors
from fxckpt.engine import Engine, Sources
from fxckpt.engine.sums import Sums, digest_of


@pytest.fixture
def make_engine():
    with engines() as make:
        yield make


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
@given(
    layers=st.lists(st.lists(arrays(), max_size=4), max_size=8),
    n_files=st.integers(1, 3),
    header=st.binary(max_size=9000),
    gap=st.integers(0, 9),
    chunk=st.sampled_from([(4, 4), (8, 8), (64, 64), (64, 4), (8, 4), (48, 16)]),
    dice=st.randoms(use_true_random=False),
)
def test_files_hold_the_sources(tmp_path, layers, n_files, header, gap, chunk, dice):
    model = Model(layers).place(n_files, header, gap)
    chunk_bytes, sum_bytes = (KB * each for each in chunk)
    engine = Engine(chunk_bytes=chunk_bytes, staging_bytes=64 * KB, threads=dice.randint(1, 3))
    checkpoint = engine.begin(model.plan(engine, sum_bytes), str(tmp_path), model.names)
    order = list(range(len(layers)))
    dice.shuffle(order)
    for layer in order:
        checkpoint.emit(layer, model.sources(layer))
    assert checkpoint.copied(PATIENCE) and checkpoint.durable(PATIENCE)
    assert checkpoint.emitted() == len(layers)
    contents = model.contents()
    assert read_all(model, tmp_path) == contents
    assert [list(checkpoint.crcs(i)) for i in range(n_files)] == [crcs_of(data, sum_bytes) for data in contents]
    engine.close()


def test_chunks_of_the_default_size(tmp_path):
    """Long enough for every loop of the fused copy and checksum, at addresses that are not aligned."""
    model = Model([[np.random.default_rng(n).integers(0, 256, 4_500_000 + n, dtype=np.uint8)] for n in range(2)])
    model.place(header=b"h" * 1001)
    engine = Engine()
    checkpoint = begin_all(engine, model, tmp_path)
    assert checkpoint.durable(PATIENCE) and read_all(model, tmp_path) == model.contents()
    assert list(checkpoint.crcs(0)) == [instruments.crc32c_portable(part) for part in parts(model.contents()[0], 4 << 20)]
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


def known_chunks(sums: Sums, each: int) -> dict[int, int]:
    """What the disk holds of a file with these checksums, so many of a chunk."""
    return {i: digest_of(sums, range(i * each, (i + 1) * each)) for i in range(-(-len(sums) // each))}


def test_known_chunks_are_not_written_again(tmp_path, make_engine):
    engine, model = make_engine(), make_model(header=b"h" * 100)
    first = begin_all(engine, model, tmp_path)
    assert first.durable(PATIENCE)
    known = [known_chunks(first.crcs(0), 1)]
    before = engine.statistics()["bytes_written"]
    model.layers[0][0][0] += 1  # one item, in the first chunk
    second = begin_all(engine, model, tmp_path, known=known)
    assert second.durable(PATIENCE)
    assert engine.statistics()["bytes_written"] == before + 8 * KB
    assert read_all(model, tmp_path) == model.contents()
    assert list(second.crcs(0)) == crcs_of(model.contents()[0], 8 * KB)


def test_a_chunk_is_written_again_if_one_of_its_checksums_is_another_or_not_known(tmp_path, make_engine):
    engine, model = make_engine(chunk_bytes=16 * KB), make_model(header=b"h" * 100)
    plan = model.plan(engine, 4 * KB)
    first = begin_all(engine, model, tmp_path, plan=plan)
    assert first.durable(PATIENCE)
    sums = first.crcs(0)
    assert len(sums) > 8

    def written(known):
        before = engine.statistics()["bytes_written"]
        again = begin_all(engine, model, tmp_path, known=[known], plan=plan)
        assert again.durable(PATIENCE) and read_all(model, tmp_path) == model.contents()
        return engine.statistics()["bytes_written"] - before

    assert written(known_chunks(sums, 4)) == 0
    assert written({index: digest for index, digest in known_chunks(sums, 4).items() if index != 1}) == 16 * KB
    sums[6] ^= 1
    assert written(known_chunks(sums, 4)) == 16 * KB


def test_a_checksum_that_is_no_whole_part_of_a_chunk_is_refused(make_engine):
    engine, model = make_engine(chunk_bytes=24 * KB), make_model()
    for sum_bytes in (16 * KB, 48 * KB, 1000):
        with pytest.raises(errors.SetupError, match="bytes of a checksum"):
            model.plan(engine, sum_bytes)


def test_mock_does_all_but_the_disk(tmp_path, make_engine):
    engine, model = make_engine(mock=True), make_model()
    checkpoint = begin_all(engine, model, tmp_path / "nowhere")
    assert checkpoint.durable(PATIENCE)
    assert list(checkpoint.crcs(0)) == crcs_of(model.contents()[0], 8 * KB)
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
        instruments.delay(op, microseconds)
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
    instruments.delay("pwrite", 10_000_000)
    checkpoint = begin_all(engine, model, tmp_path)
    contents, start = model.contents(), time.monotonic()
    fence(engine, -1)
    for layer in range(len(model.layers)):
        model.update(layer, 9)
    assert time.monotonic() - start < 5 and not checkpoint.durable(0)
    instruments.delay("pwrite", 0)
    assert checkpoint.durable(PATIENCE)
    assert read_all(model, tmp_path) == contents
    statistics = engine.statistics()
    assert 0 < statistics["staging_peak_bytes"] <= 1 << 20 and statistics["staging_bytes"] == 0
    assert statistics["stall_seconds"] > 0


def test_fence_without_room_times_out_and_counts_the_stall(tmp_path, make_engine):
    engine, model = make_engine(staging_bytes=0), make_model()
    instruments.delay("pwrite", 10_000_000)
    checkpoint = begin_all(engine, model, tmp_path)
    assert engine.pending() and not engine.fence(5, 0.2)
    assert 0.15 < engine.statistics()["stall_seconds"] < 5
    checkpoint.cancel()
    fence(engine, 5)


def test_fence_of_a_layer_that_was_not_emitted_passes_at_once(tmp_path, make_engine):
    engine, model = make_engine(staging_bytes=1 << 20), make_model()
    instruments.delay("copy", 20_000)
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
    instruments.delay("pwrite", 2000)
    checkpoint = begin_all(engine, model, tmp_path)
    fence(engine, -1)
    assert engine.statistics()["staging_peak_bytes"] <= staging
    assert checkpoint.durable(PATIENCE)
