"""One training of ``memory.py``, in a process of its own: a compiled GPT whose updates run after the backward or inside it.

``unarmed`` is compiled as ``in_backward`` is, but its loop has a hook before ``opt.step()``, so that no layer is ever armed: what
the ops in its backward cost, they cost for nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"after_backward": "after_backward", "in_backward": "in_backward", "unarmed": "in_backward"}
WARM_UP = 8  # steps: compilation, state, the calls, two steps in which the loop is watched, every slot written once
NEVER = 10**9
JITTER = 1.5  # sigma of the lognormal factor by which a slow disk is slower, anew for each twentieth of a step


class Training:
    """The model, its optimizer and its steps."""

    def __init__(self, way: str, folder: Path, size: argparse.Namespace, every: int):
        import torch

        sys.path.insert(0, str(ROOT / "examples"))
        from train_gpt import GPT

        import fxckpt

        torch.set_num_threads(size.threads)
        torch.manual_seed(0)
        self.way, self.size = way, size
        self.model: Any = GPT(size.layers, size.width, size.heads, size.length, dropout=0.0)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.opt: Any = fxckpt.compile_step(optimizer, folder, model=self.model, every=every, threads=1, updates=WAYS[way])
        if way == "unarmed":
            optimizer.register_step_pre_hook(lambda *_: None)
        self.forward: Any = torch.compile(self.model, backend=fxckpt.backend)
        self.x: Any = torch.randint(0, 256, (size.batch, size.length))
        self.y: Any = self.x.roll(-1, 1)

    def warm_up(self) -> dict[str, Any]:
        """The first steps; the seconds of processor time of the first one, which compiles, and what the compiler counts."""
        began = spent()
        self.steps(1)
        seconds = spent() - began
        self.steps(WARM_UP - 1)
        from torch._dynamo.utils import counters

        standing = self.opt.ckpt.graph.standing
        armed = sum(not why for why in standing.values()) if standing is not None else 0
        assert bool(armed) == (self.way == "in_backward"), standing
        return {
            "first_step": seconds,
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "compiled": counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"],
            "layers": len(self.opt.ckpt.graph.layers),
            "armed": armed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "gradient_bytes": sum(p.nbytes for p in self.model.parameters()),
        }

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.forward(self.x, self.y).backward()
            self.opt.step()
            self.opt.zero_grad()

    def timed(self, count: int) -> dict[str, float]:
        """Seconds of a step, by the clock and of processor time."""
        clock, cpu = time.perf_counter(), time.process_time()
        self.steps(count)
        return {"clock": (time.perf_counter() - clock) / count, "cpu": (time.process_time() - cpu) / count}

    def peak(self, count: int) -> int:
        """The most resident memory in these steps, beyond that before them: bytes."""
        machine.reset_peak_memory()
        before = machine.peak_memory()
        self.steps(count)
        return machine.peak_memory() - before

    def ops(self, count: int) -> dict[str, float]:
        """How many ops of ours a backward has, and the seconds that all of them take; the profiler's own time included."""
        from torch.autograd.profiler import profile

        with profile() as found:
            self.steps(count)
        ours = [each for each in found.key_averages() if each.key in ("fxckpt::layer_ready", "fxckpt::pin_reader")]
        seconds = sum(each.cpu_time_total for each in ours) * 1e-6
        return {"ops": sum(each.count for each in ours) / count, "seconds": seconds / count}

    def stalled(self, count: int) -> dict[str, float]:
        """Seconds that a step waited for copies, and that writing and copying took for it."""
        before, began = self.opt.ckpt.statistics(), time.perf_counter()
        self.steps(count)
        seconds, after = time.perf_counter() - began, self.opt.ckpt.statistics()
        self.opt.ckpt.flush()
        keys = {"stall": "stall_seconds", "disk": "write_seconds", "copy": "copy_seconds", "taken": "checkpoints_started"}
        return {"step": seconds / count, **{name: (after[key] - before[key]) / count for name, key in keys.items()}}


def spent() -> float:
    """Seconds of processor time of this process, and of those that it started and that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def work(way: str, folder: Path, size: argparse.Namespace, every: int, pipe: Connection) -> None:
    """A contestant's process: sends what it has to say of its start, then answers (method, count)."""
    training = Training(way, folder, size, every)
    pipe.send(training.warm_up())
    while (asked := pipe.recv()) is not None:
        pipe.send(getattr(training, asked[0])(asked[1]))
    training.opt.ckpt.shutdown()


def work_on_slow_disk(way: str, folder: Path, size: argparse.Namespace, kind: str, pipe: Connection) -> None:
    """The same with a checkpoint at every step, on a disk that needs ``size.disk`` of a step for it, but not evenly."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    import instruments  # before what loads the engine that has none

    training = Training(way, folder, size, 1)
    told = training.warm_up()
    training.opt.ckpt.flush()
    writes = instruments.calls("pwrite")
    found = training.stalled(4)
    writes = (instruments.calls("pwrite") - writes) / 4
    pipe.send(told)
    while (asked := pipe.recv()) is not None:
        method, count, seconds = asked
        delayed = max(0.0, size.disk * seconds - found["disk"] - found["copy"])
        with slow(lambda microseconds: instruments.delay("pwrite", microseconds), kind, delayed / writes, seconds):
            pipe.send(getattr(training, method)(count))
    training.opt.ckpt.shutdown()


@contextlib.contextmanager
def slow(delay: Any, kind: str, each: float, step: float) -> Iterator[None]:
    """Each write takes ``each`` seconds longer in the mean: with ``jitter``, or with ``hiccups``, where the disk stands still for
    half a step once in ten steps."""
    if not each:
        yield
        return
    chance, stop = random.Random(0), threading.Event()

    def vary() -> None:
        began = time.monotonic()
        while not stop.wait(step / 20):
            if kind == "jitter":
                factor = chance.lognormvariate(-JITTER * JITTER / 2, JITTER)
                delay(int(each * factor * 1e6))
            else:
                at = (time.monotonic() - began) / step % 10
                delay(int((step / 2 if at < 0.5 else each) * 1e6))

    delay(int(each * 1e6))
    thread = threading.Thread(target=vary, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        delay(0)
