"""One life of a training whose whole steps are one compiled function, which ends in the middle of a step.

``STEPS``: how many steps it is to make. ``STORES``: where checkpoints are kept, by the name of the folder that it runs in.
``UPDATES``: where its updates are made; ``CODE``: "inductor", or "interpreted" (see ``interpreted.py``). ``KILL``: it kills
itself when it has handed over so many layers, counts among them, between two updates of one step.
"""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import torch
from digests import digest
from whole_steps import Whole

import fxckpt


def live() -> None:
    """The whole life."""
    torch.set_num_threads(1)
    torch._dynamo.config.trace_autograd_ops = True
    if os.environ["CODE"] == "interpreted":
        from interpreted import interpret
        from torch._inductor import compile_fx, config

        compile_fx.compile_fx = functools.partial(compile_fx.compile_fx, inner_compile=interpret)
        config.force_disable_caches = True
    directory = Path(os.environ["STORES"]) / Path.cwd().name
    found = Whole(compiled={}, updates=os.environ["UPDATES"], directory=directory)
    print("START", fxckpt.load().step, flush=True)
    _die_at(found.opt.ckpt._run.emitter, int(os.environ.get("KILL", "0")))
    for step in fxckpt.steps(int(os.environ["STEPS"])):
        found.train(step)
    found.opt.ckpt.flush()
    from torch._dynamo.utils import counters

    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    print("DIGEST bits", digest(found.bits()), flush=True)
    print("DIGEST inside", len(found.updated_in_graph()), flush=True)
    print("DIGEST warm", hits > 0, flush=True)


def _die_at(emitter: Any, number: int) -> None:
    """Die behind the emit of this number; never, if that is 0."""
    real, count = emitter.emit, 0

    def emit(layer: int, tensors: Any) -> None:
        nonlocal count
        real(layer, tensors)
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    emitter.emit = emit
