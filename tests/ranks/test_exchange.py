"""Ranks that hold other parts of tensors than those that wrote them: each byte is read once, and comes to all that want it."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from boxed import grid, part_of_array, write_boxed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxckpt.compat.ranks import host_group
from fxckpt.loading import exchange
from fxckpt.loading import phases as loading_phases
from fxckpt.loading.exchange import Exchange
from fxckpt.loading.gathered import records_of
from fxckpt.loading.phases import Elsewhere, Phases
from fxckpt.ranks import Agreement
from fxckpt.store import names, stretches
from fxckpt.store import reader as readers
from fxckpt.store.boxes import common
from fxckpt.store.reader import Candidate, Reader, read_record

W, B = (names.MODEL, "w"), (names.MODEL, "b")


class Together:
    """Ranks as threads, which send each other what they read. ``path``: of the checkpoint; ``wanted``: of each rank its boxes."""

    def __init__(self, path, wanted, dtype=torch.float32):
        self.wanted = wanted
        self.landing = [{place: torch.zeros(box[1], dtype=dtype) for place, box in mine.items()} for mine in wanted]
        self._given, self._barrier = [None] * len(wanted), threading.Barrier(len(wanted), timeout=20)
        self.work = [Exchange(Reader(path), wanted, rank, self._send(rank)) for rank in range(len(wanted))]

    def _send(self, rank):
        def send(given, out, back):
            self._given[rank] = given.split(out)
            self._barrier.wait()
            received = [each[rank].clone() for each in self._given]
            self._barrier.wait()
            assert [each.numel() for each in received] == list(back)
            return torch.cat(received)

        return send

    def run(self):
        with ThreadPoolExecutor(len(self.wanted)) as pool:
            list(pool.map(lambda rank: self.work[rank].run(names.MODEL, self.landing[rank]), range(len(self.wanted))))
        return self

    def check(self, whole):
        """Each has what it wanted."""
        for mine, landing in zip(self.wanted, self.landing):
            for place, box in mine.items():
                assert landing[place].numpy().tobytes() == part_of_array(whole[place], box).tobytes()


def bits(shape, dtype=np.float32):
    """Of all kinds, NaNs with something in them as well."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, math.prod(shape) * np.dtype(dtype).itemsize, np.uint8).view(dtype).reshape(shape)


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
STRETCHES = st.sampled_from([4, 100, 4 << 20])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), SHAPES, STRETCHES, st.sampled_from([1, 1 << 20]))
def test_every_rank_gets_its_boxes_out_of_any_others(data, shape, stretch, round_bytes):
    parts = [data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape))) for _ in range(2)]
    stored, cut = (grid(shape, each) for each in parts)
    copies = data.draw(st.integers(1, 3))  # as many ranks want the same
    whole = {W: bits(shape), B: bits((3,))}
    wanted = [{W: box, B: ((0,), (3,))} for box in cut for _ in range(copies)]
    before = stretches.STRETCH_BYTES, exchange.ROUND_BYTES
    stretches.STRETCH_BYTES, exchange.ROUND_BYTES = stretch, round_bytes
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = write_boxed(Path(scratch) / "step", whole, {W: stored}, max(len(stored), 2))
            Together(path, wanted).run().check(whole)
    finally:
        stretches.STRETCH_BYTES, exchange.ROUND_BYTES = before


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.float64])
def test_elements_of_every_size_come_over(dtype, tmp_path):
    name = {torch.bool: "BOOL", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.complex64: "C64"}.get(dtype, "F64")
    raw = np.dtype(f"u{dtype.itemsize}")
    whole = bits((6, 10), raw) if dtype != torch.bool else np.eye(6, 10, dtype=np.uint8)
    path = write_boxed(tmp_path / "step", {W: whole}, {W: grid(whole.shape, (2, 1))}, dtype=name)
    together = Together(path, [{W: box} for box in grid(whole.shape, (1, 2))], dtype).run()
    for mine, landing in zip(together.wanted, together.landing):
        assert landing[W].contiguous().view(torch.uint8).numpy().tobytes() == part_of_array(whole, mine[W]).tobytes()


def test_what_all_want_a_part_of_is_read_once(tmp_path, monkeypatch):
    """Columns of a matrix: each rank alone would read nearly all of it."""
    whole, read = bits((512, 512)), []
    path = write_boxed(tmp_path / "step", {W: whole}, {W: grid(whole.shape, (2, 1))})
    wanted = [{W: box} for box in grid(whole.shape, (1, 8))]
    real = readers.read_verified

    def counted(*path, only, **how):
        read.append(4096 * sum(map(len, only)))
        return real(*path, only=only, **how)

    monkeypatch.setattr(readers, "read_verified", counted)
    monkeypatch.setattr(stretches, "STRETCH_BYTES", 64 << 10)
    alone = sum(Reader(path).bytes_for(mine) for mine in wanted)
    together = Together(path, wanted).run()
    together.check({W: whole})
    assert alone > 5 * whole.nbytes and whole.nbytes <= sum(read) <= 1.1 * whole.nbytes
    shared = stretches.stretches(Reader(path).stored(names.MODEL), wanted)
    assert {each.reader for each in shared} == set(range(8))  # and all of them do so


def test_all_ranks_read_at_a_time_though_each_file_is_wanted_by_few(tmp_path, monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH_BYTES", 4096)
    path = write_boxed(tmp_path / "step", {W: bits((512, 512))}, {W: grid((512, 512), (4, 1))}, 4)
    wanted = [{W: box} for box in grid((512, 512), (4, 2))]  # two ranks of each file
    for each in list(stretches.rounds(stretches.stretches(Reader(path).stored(names.MODEL), wanted), 16384))[:-1]:
        assert {one.reader for one in each} == set(range(8))


def test_what_is_read_comes_to_host_memory_wherever_the_script_makes_its_tensors(tmp_path):
    path = write_boxed(tmp_path / "step", {W: bits((6, 4))}, {W: grid((6, 4), (2, 1))})
    alone = Together(path, [{W: ((0, 0), (6, 3))}])
    with torch.device("meta"):
        alone.work[0].run(names.MODEL, alone.landing[0])
    alone.check({W: bits((6, 4))})


def test_a_rank_reads_for_others_what_it_has_no_part_of_itself(tmp_path):
    """Two tensors that are read together, of which one rank has one only."""
    whole = {W: bits((64, 64)), B: bits((64,), np.float64)}
    path = write_boxed(tmp_path / "step", whole, {W: grid((64, 64), (2, 1)), B: grid((64,), (2,))})
    halves = grid((64, 64), (1, 2))
    together = Together(path, [{W: halves[0]}, {W: halves[1], B: ((0,), (64,))}])
    together.landing[1][B] = torch.zeros(64, dtype=torch.float64)
    assert {each.reader for each in stretches.stretches(Reader(path).stored(names.MODEL), together.wanted)} == {0, 1}
    together.run().check(whole)


@pytest.mark.parametrize("columns", [512, 200])
def test_what_many_ranks_want_is_sent_a_little_at_a_time(columns, tmp_path, monkeypatch):
    """Replicas: what is read once is sent to each. Or one reads all, for it wants the most, and sends each much of it."""
    monkeypatch.setattr(stretches, "STRETCH_BYTES", 64 << 10)
    path = write_boxed(tmp_path / "step", {W: bits((512, 512))}, {W: grid((512, 512), (2, 1))})
    wanted = [{W: ((0, 0), (512, 512))}, *[{W: ((0, 0), (512, columns))}] * 15]
    found = list(stretches.stretches(Reader(path).stored(names.MODEL), wanted))
    assert max(sum(each.nbytes.values()) for each in found) < 2 * (64 << 10)
    for each in stretches.rounds(found, 256 << 10):
        sent = [sum(sum(one.nbytes.values()) for one in each if one.reader == rank) for rank in range(16)]
        assert max(sent) < (256 + 2 * 64) << 10


def agreed(function, world=2):
    """Call it with the phases of each of so many ranks, as threads; what it returned."""
    store = torch.distributed.HashStore()

    def one(rank):
        with Agreement(store, rank, world, 20.0) as agreement:
            return function(Phases(agreement, 1))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


@pytest.mark.parametrize("what", ["tensors", "records"])
def test_none_waits_inside_a_collective_for_one_that_reads_or_could_not(what, tmp_path):
    path = write_boxed(tmp_path / "step", {W: bits((4, 4))}, {W: grid((4, 4), (2, 1))})
    found = Candidate(path, read_record(str(path), of_all=False))

    def rank(phases):
        phases.group = "a group that nobody may use"
        if phases.rank == 1:
            return phases.give_up("OSError: for the test")
        with pytest.raises(Elsewhere):
            if what == "records":
                records_of(found, phases)
            else:
                exchange._send(phases, torch.empty(4, dtype=torch.uint8), [0, 4], [0, 0])
        return phases.failed

    assert agreed(rank) == [[(1, "OSError: for the test")], None]


@pytest.mark.parametrize("fail", [0, 1])
def test_where_one_rank_has_no_group_to_send_by_each_reads_for_itself(fail, monkeypatch, caplog):
    made = itertools.count()

    @contextlib.contextmanager
    def group():
        if next(made) < fail:
            raise RuntimeError("no interface")
        yield "a group"

    def rank(phases):
        with phases.sending():
            return phases.group

    monkeypatch.setattr(loading_phases, "has_host_group", lambda: True)
    monkeypatch.setattr(loading_phases, "host_group", group)
    assert agreed(rank) == [None if fail else "a group"] * 2
    assert ("reads for itself, as no group of gloo can be made: no interface" in caplog.text) == bool(fail)


def test_stretches_are_all_that_is_wanted_once_and_are_the_same_on_every_rank(tmp_path):
    path = write_boxed(tmp_path / "step", {W: bits((40, 30))}, {W: grid((40, 30), (3, 2))}, 6)
    wanted = [{W: box} for box in grid((40, 30), (2, 2))]
    found = list(stretches.stretches(Reader(path).stored(names.MODEL), wanted))
    assert found == list(stretches.stretches(Reader(path, rank=2).stored(names.MODEL), wanted))
    for rank, mine in enumerate(wanted):
        got = np.zeros((40, 30), int)
        for share in (share for each in found for share in each.shares):
            for box in (box for to, box in share.wanted if to == rank):
                assert common(box, share.box) == box
                got[tuple(slice(at, at + n) for at, n in zip(*box))] += 1
        assert (part_of_array(got, mine[W]) == 1).all() and got.sum() == math.prod(mine[W][1])


@pytest.mark.usefixtures("one_rank")
def test_where_the_default_group_sends_no_host_memory_one_is_made_for_the_load(monkeypatch):
    dist = torch.distributed
    with host_group() as group:
        assert group is dist.group.WORLD
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with host_group() as group:
        assert group is not dist.group.WORLD and dist.get_backend(group) == "gloo"
        found = torch.zeros(3, dtype=torch.uint8)
        dist.all_to_all_single(found, torch.ones(3, dtype=torch.uint8), [3], [3], group)
        assert found.tolist() == [1, 1, 1]
    assert dist.is_initialized()
