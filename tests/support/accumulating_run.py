"""A rank of a job under FSDP2 that reduces the gradients of every fourth backward only; ``rank_lives.py`` forks it.

A life is what it is there, with ``layout`` (of ``sharded_run.py``), ``dir`` ("": without us), and
``turns`` (train up to this one; a turn is a backward). ``loop``: "bounded", "batches" or "plain"; ``save``: the turn behind whose
backward a checkpoint is asked for; ``flush``: the one behind which all are waited for; ``mixed``: gradients are reduced in
another type than they are in; ``hsdp``: gradients are summed over shards at every backward, and over replicas at every fourth.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from sharded_run import OPTIMIZERS, digest, laid_out
from torch.distributed.fsdp import MixedPrecisionPolicy

import fxckpt
from fxckpt.loading.load import Restored

EVERY = 4


def turns(life: dict[str, Any], first: int) -> Iterable[int]:
    """The numbers of the backwards that are to be made."""
    if life["dir"] and life["loop"] != "plain":
        return fxckpt.steps(life["turns"]) if life["loop"] == "bounded" else fxckpt.batches(range(life["turns"]))
    return range(first, life["turns"])


def live(life: dict[str, Any], rank: int, begun: Any) -> dict[str, Any]:
    """One rank of a life."""
    torch.set_num_threads(1)
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fxckpt").addHandler(listener)
    options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if life.get("mixed") else {}
    net, model, whose = laid_out(life["layout"], life["world"], 13, **options)
    opt, restored = OPTIMIZERS["foreach" if life["layout"] == "fsdp_tp" else "adamw"](net.parameters()), Restored()
    if life["dir"]:
        fxckpt.compile_step(opt, life["dir"], model=model, every=1, keep=8, update="native")
        restored = fxckpt.load()
    begins = restored.step * EVERY if life["loop"] == "plain" else restored.iteration
    for turn in turns(life, begins):
        last = turn % EVERY == EVERY - 1
        if life.get("hsdp"):
            model.set_requires_all_reduce(last)
        else:
            model.set_requires_gradient_sync(last)
        torch.manual_seed(1000 * turn + whose)
        model(torch.randn(4, 13)).square().mean().backward()
        if last:
            opt.step()
            opt.zero_grad()
        if life.get("save") == turn:
            opt.ckpt.save()
        if life.get("flush") == turn:
            opt.ckpt.flush()
    if life["dir"]:
        opt.ckpt.flush()
        opt.ckpt.shutdown()
    return {"start": begins, "left": digest(net, opt), "said": said}
