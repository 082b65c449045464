"""One life of a training with updates inside the backward, which ends at an instant of a backward that makes them.

``STEPS``: how many steps it is to make. ``STORES``: where checkpoints are kept, by the name of the folder that it runs in.
``KILL="2 0.37"``: it ends in the second backward behind the first armed one, as far in it as that says: up to 0.25 before the
first update, up to 1 before its end, by the times of the backward before it. A timer of the kernel ends it: the default action
of SIGALRM is that of SIGKILL, between any two instructions of any thread, and nobody in the process is asked. ``mark`` says
where it was. ``INTERPRETED``: see ``interpreted.py``.
"""

from __future__ import annotations

import functools
import mmap
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from digests import digest
from in_backward_runs import Trained, adamw
from torch import nn

import fxckpt

WIDTH, DEPTH = 128, 5
BEFORE = 0.25  # of all kills that a backward gets, before its first update
PLACES = ("outside of a backward", "before the first update", "in an update", "between two updates", "behind the last update")


class Deep(nn.Module):
    """Layers with norms between them, whose weights are read late."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])
        self.norm = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(DEPTH)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear, norm in zip(self.linear, self.norm):
            x = x + torch.tanh(linear(norm(x)))
        return x.square().mean()


class Mark:
    """Where a life is, in a file that outlives it: a number of ``PLACES``."""

    def __init__(self) -> None:
        Path("mark").write_bytes(bytes(mmap.PAGESIZE))
        with open("mark", "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def set(self, place: int) -> None:
        self._memory[0] = place


def marked(folder: Path) -> str:
    """Where the last life in this folder ended."""
    return PLACES[(folder / "mark").read_bytes()[0]]


def live() -> None:
    """The whole life."""
    torch.set_num_threads(1)
    if "INTERPRETED" in os.environ:
        _interpret()
    torch.manual_seed(0)
    model = Deep()
    opt = fxckpt.compile_step(
        adamw(model), Path(os.environ["STORES"]) / Path.cwd().name, model=model, every=1, updates="in_backward", chunk_mb=1
    )
    run = Trained(model, opt, torch.compile(model, backend=fxckpt.backend))
    number, fraction = os.environ.get("KILL", "0 0").split()
    life = Life(run, int(number), float(fraction))
    print("START", fxckpt.load().step, flush=True)
    for step in fxckpt.steps(int(os.environ["STEPS"])):
        life.step(step)
    run.opt.ckpt.flush()
    from torch._dynamo.utils import counters

    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    print("DIGEST bits", digest(run.bits()), flush=True)
    print("DIGEST armed", life.armed, flush=True)
    print("DIGEST warm", hits > 0, flush=True)


def _interpret() -> None:
    from interpreted import interpret
    from torch._inductor import compile_fx, config

    compile_fx.compile_fx = functools.partial(compile_fx.compile_fx, inner_compile=interpret)
    config.force_disable_caches = True


class Life:
    """Makes the steps, and sets the timer in one of them."""

    def __init__(self, run: Trained, kill: int, fraction: float):
        self.armed = 0  # backwards that made updates
        self._run, self._kill, self._fraction = run, kill, fraction
        self._first = self._whole = 0.0  # seconds of the last of them, to the first update and to its end
        self._began = 0.0
        self._mark = Mark()
        executor: Any = run.opt.ckpt._run.steppers[0].executor
        self._section, executor.section = executor.section, self._marked_section

    def _marked_section(self, place: int) -> None:
        if not self._first:
            self._first = time.monotonic() - self._began
        self._mark.set(2)
        self._section(place)
        self._mark.set(3)

    def _instant(self) -> float:
        """Seconds from the beginning of the backward."""
        if self._fraction < BEFORE:
            return max(self._first * self._fraction / BEFORE, 1e-6)
        return self._first + (self._whole - self._first) * (self._fraction - BEFORE) / (1 - BEFORE)

    def step(self, step: int) -> None:
        """One step, or a part of it."""
        x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = self._run.compiled(x)
        self._mark.set(1)
        if self._kill and self.armed == self._kill:
            signal.setitimer(signal.ITIMER_REAL, self._instant())
        self._first, self._began = 0.0, time.monotonic()
        loss.backward()
        self._whole = time.monotonic() - self._began
        self._mark.set(4)
        if self._run.used_up():
            self.armed += 1
        self._run.opt.step()
        self._run.opt.zero_grad()
        self._mark.set(0)
