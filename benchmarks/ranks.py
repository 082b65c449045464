"""What it costs where several ranks write one store: beside none and a store for each, and what rank 0 does where there are many.

**Step.** Two ranks of a DDP job (gloo) on one machine train a small network that has many parameters. In each round a job trains
without checkpoints, one with a store for each rank, one with a store of both and one with the same, where no replica checks the
other, in alternating order, each with a checkpoint at every step; a ratio is of median step times in the same round. Bytes are
what both ranks wrote for a checkpoint.

**Coordinator.** One rank 0 and many simulated ones, each with its part on the disk, talk over one TCPStore. What is timed begins
when all have said that their part is durable: moving the files, comparing, the record, the commit.

    python benchmarks/ranks.py [--quick] [--json benchmarks/results/ranks.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.distributed as dist
from contest import write

import fxckpt
from fxckpt.engine import io
from fxckpt.engine.sums import table
from fxckpt.ranks import FirstStore, OtherStore, Rendezvous
from fxckpt.store import names
from fxckpt.store.about import ALIKE
from fxckpt.store.files import write_laid_out
from fxckpt.store.folder import Folder
from fxckpt.store.layout import TensorSpec, lay_out, sum_bytes
from fxckpt.store.record import FileRecord, LayerRecord, Record, TensorRecord

WAYS = ("none", "a store for each", "one store", "one store, unchecked")
WIDTH, LAYERS, BATCH = 1024, 12, 256
MANY = 3 * 291, 96_000_000_000  # tensors and bytes of Llama 3 8B with AdamW's state


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


def part(rank: int, world: int, tensors: int, folder: Folder, step: int) -> Record:
    """What one simulated rank has written: its share of so many small tensors."""
    files, placed = [], []
    for kind in (names.MODEL, names.OPTIMIZER):
        specs = [TensorSpec(f"{kind[0]}{rank}.{i}", "F32", (8,), 0) for i in range(-(-tensors // world))]
        layout = lay_out(names.of_rank(kind, rank, world), specs)
        files.append(write_laid_out(folder, layout, (np.full(8, step, np.float32).data.cast("B") for _ in layout.tensors)))
        placed += [TensorRecord(layout.name, p.spec.key, p.begin, p.nbytes, p.spec.shape, "F32") for p in layout.tensors]
    layer = LayerRecord(0, "layer", "update", step, 0.0, 1, sum(each.nbytes for each in placed), tuple(placed))
    state = {"step": step, ALIKE: "all"}
    return Record(step=step, iteration=step, updates=step, time=0.0, files=tuple(files), layers=(layer,), ties={}, optimizers=[],
                  state=state)  # fmt: skip


def measure_coordinator(world: int, tensors: int, commits: int, parent: str) -> dict[str, Any]:
    """Seconds from the last word of all others to the commit, for each of so many checkpoints; and bytes of all messages."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False)
    connect = lambda: OneConnection(dist.TCPStore("127.0.0.1", server.port, None, False, timeout=timedelta(seconds=60)))  # noqa: E731
    io.close_in_child = lambda *_: None  # the engine knows the locks of one process, not of hundreds
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        first = FirstStore(f"{folder}/store", Rendezvous(connect(), 0, world, "p"), keep=2, max_async=1)
        first.open()
        connection = connect()
        others = []
        for rank in range(1, world):
            side = Rendezvous(connection, rank, world, "p")
            others.append(OtherStore(f"{folder}/store", side, max_async=1, fresh=False, found=0))
            others[-1].open()
        took = []
        for step in range(1, commits + 1):
            slot = first.acquire()
            first.begin(slot, 0, [], step)
            own = part(0, world, tensors, slot.held(), step)
            given = []
            for store in others:
                given.append(store.acquire())
                store.begin(given[-1], 0, [], step)
                store.commit(given[-1], part(store.part[0], world, tensors, given[-1].slot.held(), step), {})
            began = time.perf_counter()
            while first.missing(slot, 0.1):
                continue
            first.commit(slot, own, {})
            took.append(time.perf_counter() - began)
            assert all(each.ended(10) for each in given)
        said = len(connection.get("p/1"))
        record = os.path.getsize(f"{folder}/store/{names.step_name(commits)}/{names.COMMIT}")
    return {"world": world, "tensors": tensors, "seconds": took, "message_bytes": said, "record_bytes": record}


def part_of_many(tensors: int, nbytes: int, world: int) -> bytes:
    """The record of one of so many ranks that hold a box of each of so many tensors, of so many bytes together."""
    file, per_layer, each = names.of_rank(names.MODEL, 1, world), 9, nbytes // world // tensors // 256 * 256
    named = [f"layers.{i // per_layer}.mlp.weight_{i}" for i in range(tensors)]
    shape, whole = (each // 256, 64), (each // 256 * world, 64)
    boxes = [TensorRecord(file, key, each * i, each, shape, "F32", whole, (shape[0], 0)) for i, key in enumerate(named)]
    layers = [boxes[i : i + per_layer] for i in range(0, tensors, per_layer)]
    listed = tuple(
        LayerRecord(i, f"layers.{i}", "update", 1, 0.0, 1, each * len(own), tuple(own)) for i, own in enumerate(layers)
    )
    size = sum_bytes(each * tensors)
    sums = table(np.random.default_rng(0).integers(0, 1 << 32, -(-each * tensors // size)).tolist())
    one = {"step": 1, "iteration": 1, "updates": 1, "time": 0.0, "ties": {}, "optimizers": [], "state": {}, "parts": ()}
    files = (FileRecord(file, each * tensors, size, sums),)
    return Record(**one, world_size=world, rank=1, files=files, layers=listed).to_bytes()


def measure_record(tensors: int, nbytes: int, repeats: int, parent: str) -> dict[str, Any]:
    """Of one of 64 and of 512 ranks that hold boxes of all tensors: bytes of its record; seconds to take it apart, as rank 0
    does at each commit and every rank at a load; and to read the files of all, and one of as many bytes, out of the cache."""
    found: dict[str, Any] = {"tensors": tensors, "nbytes": nbytes, "ranks": {}}
    for world in (64, 512):
        raw = part_of_many(tensors, nbytes, world)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            files = [Path(folder) / f"part-{rank}" for rank in range(world)]
            for file in files:
                file.write_bytes(raw)
            (merged := Path(folder) / "merged").write_bytes(raw * world)
            found["ranks"][str(world)] = {
                "nbytes": len(raw),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["record"], help="this; other parts stay as the file has them")
    parser.add_argument("--quick", action="store_true", help="few rounds, few ranks: to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--note", default="", help="what else the machine does, for the results")
    parser.add_argument("--dir", default=".", help="the disk to measure")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    rounds, steps, world, commits = (1, 6, 8, 2) if args.quick else (args.rounds, args.steps, 512, 5)
    if args.only and args.json:
        numbers = {**json.loads(Path(args.json).read_text()), "record": measure_record(*MANY, 20, args.dir)}
        write(numbers, args.json)
        return
    numbers: dict[str, Any] = {"machine": machine.describe(Path(args.dir)), "note": args.note, "quick": args.quick}
    numbers["coordinator"] = found = measure_coordinator(world, 3 * 1000, commits, args.dir)
    print(f"{world} ranks: {statistics.median(found['seconds']):.2f} s from the last part to the commit", flush=True)
    numbers["record"] = measure_record(*MANY, 20, args.dir)
    numbers["steps"] = measure_steps(rounds, steps, args.dir)
    for way, each in numbers["steps"].items():
        print(f"{way:22} {each['ratio']:.2f} of none, {each['nbytes'] / 1e6:.0f} MB a checkpoint")
    write(numbers, args.json)
    print(machine.line(numbers["machine"]))


if __name__ == "__main__":
    main()
