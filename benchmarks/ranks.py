"""What it costs where several ranks write one store: beside none and a store for each, and what rank 0 does where there are many.

**Step.** Two ranks of a DDP job (gloo) on one machine train a small network that has many parameters. In each round a job trains
without checkpoints, one with a store for each rank, one with a store of both and one with the same, where no replica checks the
other, in alternating order, each with a checkpoint at every step; a ratio is of median step times in the same round. Bytes are
what both ranks wrote for a checkpoint.

**Coordinator.** One rank 0 and many simulated ones, each with its part on the disk, talk over one TCPStore. Their records and
messages are those of ranks of Llama 3 8B with AdamW, as DDP and as FSDP2; their files have its sizes, and no bytes. What is timed
begins when all have said that their part is durable: moving the files, comparing, the record, the commit.

    python benchmarks/ranks.py [--quick] [--json benchmarks/results/ranks.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.distributed as dist
from contest import write

import fxckpt
from fxckpt.engine import io
from fxckpt.engine.sums import Sums, table
from fxckpt.ranks import FirstStore, OtherStore, Rendezvous
from fxckpt.ranks.briefs import Brief
from fxckpt.ranks.replicas import checksums
from fxckpt.store import names
from fxckpt.store.about import ALIKE, CHECKED
from fxckpt.store.folder import Folder
from fxckpt.store.layout import FileLayout, Placed, TensorSpec, lay_out, sum_bytes
from fxckpt.store.record import FileRecord, LayerRecord, Record, TensorRecord

WAYS = ("none", "a store for each", "one store", "one store, unchecked")
WIDTH, LAYERS, BATCH = 1024, 12, 256
MANY = 3 * 291, 96_000_000_000  # tensors and bytes of Llama 3 8B with AdamW's state
PER_LAYER = 9
DDP, FSDP = COORDINATED = ("DDP", "FSDP2")


def train(rank: int, port: int, way: str, folder: str, steps: int, out: Any) -> None:
    """One rank of one job; rank 0 sends its median step time, both the bytes of a checkpoint."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, False, timeout=timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if way != "none":
        directory = f"{folder}/rank{rank}" if way == "a store for each" else folder
        looks = "off" if way.endswith("unchecked") else "warn"
        fxckpt.compile_step(opt, directory, model=model, every=1, on_divergence=looks, read_back="off")
    x, times = torch.randn(BATCH, WIDTH), []
    for _ in fxckpt.steps(steps) if way != "none" else range(steps):
        began = time.perf_counter()
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        times.append(time.perf_counter() - began)
    written = 0
    if way != "none":
        opt.ckpt.flush()
        written = sum(file.nbytes for file in opt.ckpt._run.arrangement.layout.files)
        opt.ckpt.shutdown()
    out.send((statistics.median(times[3:]), written))
    dist.barrier()
    dist.destroy_process_group()


def job(way: str, folder: Path, steps: int) -> tuple[float, int]:
    """The step time of one job in seconds, and the bytes that both ranks write for a checkpoint."""
    spawn = multiprocessing.get_context("spawn")
    server = dist.TCPStore("127.0.0.1", 0, 2, True, timeout=timedelta(seconds=120), wait_for_workers=False)
    pipes = [spawn.Pipe() for _ in range(2)]
    ranks = []
    for rank, (_, ours) in enumerate(pipes):
        ranks.append(spawn.Process(target=train, args=(rank, server.port, way, str(folder), steps, ours)))
        ranks[-1].start()
    found = [theirs.recv() for theirs, _ in pipes]
    for each in ranks:
        each.join()
    return found[0][0], sum(written for _, written in found)


def measure_steps(rounds: int, steps: int, parent: str) -> dict[str, Any]:
    """Of each way its times by round, ratios to none, and bytes."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    nbytes = dict.fromkeys(WAYS, 0)
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                seconds, nbytes[way] = job(way, Path(folder) / "store", steps)
            times[way].append(seconds)
            print(f"round {number + 1}: {way:22} step {seconds * 1e3:.0f} ms, {nbytes[way] / 1e6:.0f} MB", flush=True)
    ratios = {way: [t / n for t, n in zip(times[way], times["none"])] for way in WAYS}
    return {
        way: {"seconds": times[way], "nbytes": nbytes[way], "ratio": statistics.median(ratios[way]), "ratios": ratios[way]}
        for way in WAYS
    }  # fmt: skip


class OneConnection:
    """The connection of all simulated ranks, whose store is asked for one each."""

    def __init__(self, store: dist.Store):
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def clone(self) -> OneConnection:
        return self


@dataclass(frozen=True)
class Model:
    """Of what its simulated ranks write: a box of each of so many ``tensors``, as FSDP2's do, or whole ones, shared out, as those
    of DDP, who also look at what another one writes. A third of the tensors are parameters, the others AdamW's state; ``nbytes``
    are those of all."""

    world: int
    tensors: int
    nbytes: int
    in_boxes: bool

    def record(self, rank: int, step: int) -> Record:
        """What one rank says of its part."""
        layouts, keys = self._layouts(rank), self._keys
        files = tuple(FileRecord(each.name, each.nbytes, self._sum_bytes, self._sums(each)) for each in layouts)
        found: dict[int, list[TensorRecord]] = {number // PER_LAYER: [] for number in range(len(keys))}
        for layout in layouts:
            for placed in layout.tensors:
                found[placed.spec.layer].append(self._tensor(layout.name, placed, rank))
        layers = tuple(
            LayerRecord(number, f"layers.{number}.mlp", "update", step, float(step), 1, sum(t.nbytes for t in own), tuple(own))
            for number, own in found.items()
        )
        state = {"step": step, ALIKE: "0" * 64, CHECKED: self._checked(rank, step)}
        return Record(step=step, iteration=step, updates=step, time=float(step), files=files, layers=layers, ties={},
                      optimizers=[adamw(keys)], state=state)  # fmt: skip

    @property
    def _keys(self) -> list[str]:
        """The names of its parameters."""
        return [f"layers.{i // PER_LAYER}.mlp.weight_{i % PER_LAYER}" for i in range(self.tensors // 3)]

    def _layouts(self, rank: int) -> list[FileLayout]:
        """Of its files."""
        keys = list(enumerate(self._keys))
        moments = [(i, f"{moment}/{key}") for i, key in keys for moment in ("exp_avg", "exp_avg_sq")]
        return [self._layout(names.MODEL, keys, rank), self._layout(names.OPTIMIZER, moments, rank)]

    def _layout(self, kind: str, tensors: Sequence[tuple[int, str]], rank: int) -> FileLayout:
        """Of one of them; which of these ``tensors`` (number of the parameter, key) are in it."""
        mine = tensors if self.in_boxes else tensors[rank :: self.world]
        rows = self.nbytes // self.tensors // 256 // self.world * (1 if self.in_boxes else self.world)
        specs = [TensorSpec(key, "F32", (rows, 64), number // PER_LAYER) for number, key in mine]
        return lay_out(names.of_rank(kind, rank, self.world), specs)

    def _tensor(self, file: str, placed: Placed, rank: int) -> TensorRecord:
        shape = placed.spec.shape
        box = ((shape[0] * self.world, shape[1]), (shape[0] * rank, 0)) if self.in_boxes else (None, None)
        return TensorRecord(file, placed.spec.key, placed.begin, placed.nbytes, shape, "F32", *box)

    @property
    def _sum_bytes(self) -> int:
        return sum_bytes(self.nbytes // self.world)

    def _sums(self, layout: FileLayout) -> Sums:
        """Checksums of a file of this size: the same, whoever wrote it."""
        return sums(-(-layout.nbytes // self._sum_bytes))

    def _checked(self, rank: int, step: int) -> dict[str, Any]:
        """What it says of the files of another one, of another one at each step."""
        others = [] if self.in_boxes else self._layouts((rank + 1 + step % (self.world - 1)) % self.world)
        return checksums(self._layouts(rank), others, [self._sums(each) for each in others], self._sum_bytes)


@cache
def sums(count: int) -> Sums:
    """So many checksums, of chance."""
    return table(np.random.default_rng(count).integers(0, 1 << 32, count).tolist())


def adamw(keys: list[str]) -> dict[str, Any]:
    """What a record says of the optimizer of these parameters; see docs/format.md."""
    settings = {"lr": 1e-4, "betas": {"!": "tuple", "v": [0.9, 0.999]}, "eps": 1e-08, "weight_decay": 0.01, "amsgrad": False,
                "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": True,
                "decoupled_weight_decay": True}  # fmt: skip
    state = {"keys": ["exp_avg", "exp_avg_sq"], "strides": {}, "complex": [], "plain": {}, "host": []}
    return {"class": "AdamW", "groups": [{"params": keys, "settings": settings}], "state": dict.fromkeys(keys, state),
            "gradients": [], "given": [settings]}  # fmt: skip


def written(record: Record, folder: Folder) -> Record:
    """The record, with its files there: of their sizes, without a byte of them."""
    for file in record.files:
        with folder.opened(file.name, os.O_RDWR | os.O_CREAT) as fd:
            io.ftruncate(fd, file.nbytes)
    return record


def measure_coordinator(model: Model, commits: int, parent: str) -> dict[str, Any]:
    """Seconds from the last word of all others to the commit, and of them those of a processor: of the first one, and of so many
    later ones; seconds until rank 0 has the next slot ready, and in which a rank says its part in short; bytes of a message and
    of the records; what rank 0 keeps of a commit while it makes it; and seconds for one look at a message."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False)
    connect = lambda: OneConnection(dist.TCPStore("127.0.0.1", server.port, None, False, timeout=timedelta(seconds=60)))  # noqa: E731
    io.close_in_child = lambda *_: None  # the engine knows the locks of one process, not of hundreds
    took, busy, ready, short, memory = [], [], [], [], 0
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        first = FirstStore(f"{folder}/store", Rendezvous(connect(), 0, model.world, "p"), keep=2, max_async=1)
        first.open()
        connection = connect()
        others = []
        for rank in range(1, model.world):
            side = Rendezvous(connection, rank, model.world, "p")
            others.append(OtherStore(f"{folder}/store", side, max_async=1, fresh=False, found=0))
            others[-1].open()
        for step in range(1, commits + 3):
            began = time.perf_counter()
            slot = first.acquire()
            ready.append(time.perf_counter() - began)
            first.begin(slot, 0, [], step)
            own = written(model.record(0, step), slot.held())
            given = []
            for store in others:
                given.append(store.acquire())
                store.begin(given[-1], 0, [], step)
                record = written(model.record(store.part[0], step), given[-1].slot.held())
                store.commit(given[-1], record, {"generator": np.zeros(5056, np.uint8)})
            short.append(timed(lambda record=record: Brief.of(record)))
            if step == commits + 2:
                tracemalloc.start()
            began, at = time.perf_counter(), time.process_time()
            while first.missing(slot, 0.1):
                continue
            first.commit(slot, own, {"generator": np.zeros(5056, np.uint8)})
            took.append(time.perf_counter() - began)
            busy.append(time.process_time() - at)
            if step == commits + 2:
                memory = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert all(each.ended(10) for each in given)
        said = len(connection.get("p/1"))
        looks = [timed(lambda: connection.multi_get(["p/0"])) for _ in range(1000)]
        where = Path(folder) / "store" / names.step_name(commits + 2)
        record, part = (os.path.getsize(where / name) for name in (names.COMMIT, names.of_rank(names.PART, 1, model.world)))
    return {
        **dataclasses.asdict(model), "first": took[0], "seconds": took[1:-1], "busy": busy[:-1], "ready": ready[1:],
        "short": short, "memory": memory, "message_bytes": said, "record_bytes": record, "part_bytes": part,
        "look": statistics.median(looks),
    }  # fmt: skip


def measure_record(tensors: int, nbytes: int, repeats: int, parent: str) -> dict[str, Any]:
    """Of one of 64 and of 512 ranks that hold boxes of all tensors: bytes of its record; seconds and memory that it takes to
    take it apart, as rank 0 does at its first commit and every rank at a load; and seconds to read the files of all, and one of
    as many bytes, out of the cache."""
    found: dict[str, Any] = {"tensors": tensors, "nbytes": nbytes, "ranks": {}}
    for world in (64, 512):
        model = Model(world, tensors, nbytes, True)
        raw = dataclasses.replace(model.record(1, 1), world_size=world, rank=1, parts=()).to_bytes()
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            files = [Path(folder) / f"part-{rank}" for rank in range(world)]
            for file in files:
                file.write_bytes(raw)
            (merged := Path(folder) / "merged").write_bytes(raw * world)
            found["ranks"][str(world)] = {
                "nbytes": len(raw),
                "memory": memory_of(lambda raw=raw: Record.from_bytes(raw, "part")),
                "seconds": [timed(lambda raw=raw: Record.from_bytes(raw, "part")) for _ in range(repeats)],
                "files": min(timed(lambda files=files: sum(len(file.read_bytes()) for file in files)) for _ in range(3)),
                "merged": min(timed(lambda merged=merged: len(merged.read_bytes())) for _ in range(3)),
            }
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memory_of(work: Callable[[], Any]) -> int:
    """Bytes of what it returns."""
    tracemalloc.start()
    found = work()
    nbytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del found
    return nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["coordinator", "record"], help="this; other parts stay as the file has them")
    parser.add_argument("--quick", action="store_true", help="few rounds, few ranks: to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--note", default="", help="what else the machine does, for the results")
    parser.add_argument("--dir", default=".", help="the disk to measure")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    rounds, steps, world, commits = (1, 6, 8, 2) if args.quick else (args.rounds, args.steps, 512, 5)
    numbers: dict[str, Any] = json.loads(Path(args.json).read_text()) if args.only and args.json else {}
    numbers |= {"machine": machine.describe(Path(args.dir)), "note": args.note, "quick": args.quick}
    if args.only != "record":
        numbers["coordinator"] = {}
        for way in COORDINATED:
            model = Model(world, *MANY, way == FSDP)
            numbers["coordinator"][way] = found = measure_coordinator(model, commits, args.dir)
            later = f"{statistics.median(found['seconds']):.2f} ({max(found['seconds']):.2f}) s"
            print(f"{world} ranks of {way}: first commit {found['first']:.2f} s, then {later}", flush=True)
    if args.only != "coordinator":
        numbers["record"] = measure_record(*MANY, 20, args.dir)
    if args.only is None:
        numbers["steps"] = measure_steps(rounds, steps, args.dir)
        for way, each in numbers["steps"].items():
            print(f"{way:22} {each['ratio']:.2f} of none, {each['nbytes'] / 1e6:.0f} MB a checkpoint")
    write(numbers, args.json)
    print(machine.line(numbers["machine"]))


if __name__ == "__main__":
    main()
