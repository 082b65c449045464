"""What fine checksums cost a store of whole tensors: its record, the threads that train, and the copy.

**Record.** A record of 444 tensors with a checksum for each 4 MiB, and with ours, is written and read; beside it the same
checksums as JSON of Python's lists. A second thread counts meanwhile how long it could not run: so long Python's lock was held,
or a core was lacking: of several rounds the least counts. **Copy.** An engine with one thread copies and checksums memory and
writes nothing.

    python benchmarks/records.py [--json benchmarks/results/records.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
from contest import write

from fxckpt.engine import Engine, Sources
from fxckpt.engine.sums import table
from fxckpt.store.layout import sum_bytes
from fxckpt.store.record import FileRecord, LayerRecord, Record, TensorRecord

MIB = 1 << 20
HELD = {"357 MB": 357_000_000, "1.5 GB": 1_500_000_000, "16 GB": 16_000_000_000}
CHUNK = 4 * MIB
COPIED = 512 * MIB
NOTICED = 3e-4  # seconds that the second thread does not run; less is the switch between two threads


def held_up(work: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Seconds that it takes, and for which another thread could not run meanwhile: the longest wait, and all of them."""
    found = []
    for _ in range(rounds):
        ready, over, waits = threading.Event(), threading.Event(), list[float]()

        def count(ready: threading.Event = ready, over: threading.Event = over, waits: list[float] = waits) -> None:
            ready.set()
            last = time.perf_counter()
            while not over.is_set():
                now = time.perf_counter()
                if now - last > NOTICED:
                    waits.append(now - last)
                last = now

        other = threading.Thread(target=count)
        other.start()
        ready.wait()
        began = time.perf_counter()
        work()
        took = time.perf_counter() - began
        over.set()
        other.join()
        found.append({"seconds": took, "longest": max(waits, default=0.0), "waited": sum(waits)})
    return {name: min(each[name] for each in found) for name in found[0]}


def record_of(sums: Any, held: int, each: int) -> Record:
    """A record of AdamW's state and parameters in one file."""
    nbytes = held // 444 // 4096 * 4096
    tensors = [TensorRecord("f", f"h.{i}.weight", 4096 + i * nbytes, nbytes, (nbytes // 4,), "F32") for i in range(444)]
    layers = tuple(
        LayerRecord(i, f"h.{i}", "update", 1, 0.0, 1, 4 * nbytes, tuple(tensors[4 * i : 4 * i + 4])) for i in range(111)
    )
    one = {"step": 1, "iteration": 1, "updates": 1, "time": 0.0, "ties": {}, "optimizers": [], "state": {}}
    return Record(**one, files=(FileRecord("f", len(sums) * each, each, sums),), layers=layers)


def measure_records(rounds: int) -> dict[str, Any]:
    """By what is held and how: bytes of the record, and what writing and reading it take."""
    found: dict[str, Any] = {}
    for label, held in HELD.items():
        found[label] = {}
        for how, each in {"chunks": CHUNK, "ours": sum_bytes(held)}.items():
            numbers = np.random.default_rng(0).integers(0, 1 << 32, -(-held // each)).tolist()
            record = record_of(table(numbers), held, each)
            raw = record.to_bytes()
            found[label][how] = {
                "sums": len(numbers), "sum_bytes": each, "nbytes": len(raw), "write": held_up(record.to_bytes, rounds),
                "read": held_up(lambda raw=raw: Record.from_bytes(raw, "record"), rounds),
            }  # fmt: skip
        text = json.dumps(numbers)
        found[label]["lists"] = {
            "sums": len(numbers), "nbytes": len(text), "write": held_up(lambda n=numbers: json.dumps(n), rounds),
            "read": held_up(lambda t=text: json.loads(t), rounds),
        }  # fmt: skip
    return found


def measure_copy(rounds: int) -> dict[str, list[float]]:
    """Bytes per second, of each round, by KiB that have a checksum."""
    data = np.random.default_rng(0).integers(0, 255, COPIED, np.uint8)
    engine, sources = Engine(threads=1, chunk_bytes=CHUNK, staging_bytes=0, mock=True), Sources([(data.ctypes.data, None, None)])
    plans = {kib: engine.plan([(COPIED, b"")], [(0, 0, 0, COPIED, 4)], 1, kib << 10) for kib in (4096, 64, 16, 4)}
    speeds: dict[str, list[float]] = {str(kib): [] for kib in plans}
    for _ in range(rounds):
        for kib, plan in plans.items():
            began = time.perf_counter()
            checkpoint = engine.begin(plan, "/", ["nowhere"])
            checkpoint.emit(0, sources)
            checkpoint.durable(60)
            speeds[str(kib)].append(COPIED / (time.perf_counter() - began))
            checkpoint.release()
    engine.close(10)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--note", default="", help="what else the machine does, for the results")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    sys.setswitchinterval(1e-4)
    numbers = {"machine": machine.describe(Path()), "note": args.note, "records": measure_records(args.rounds)}
    numbers["copy"] = measure_copy(args.rounds)
    for label, each in numbers["records"].items():
        for how, of in each.items():
            ms = {f"{what} {name}": f"{1e3 * of[what][name]:.1f}" for what in ("write", "read") for name in of[what]}
            print(f"{label}, {how}: {of['sums']} checksums, {of['nbytes'] / 1e6:.2f} MB, ms: {ms}")
    for kib, of in numbers["copy"].items():
        speeds = [f"{speed / 1e9:.1f}" for speed in (statistics.median(of), min(of), max(of))]
        print(f"copy with checksums of {kib} KiB: {speeds[0]} GB/s ({speeds[1]} - {speeds[2]})")
    write(numbers, args.json)


if __name__ == "__main__":
    main()
