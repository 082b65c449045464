"""A training whose frozen layers are not written again, and somebody who touches them while they wait."""

from __future__ import annotations

from pathlib import Path

import torch
import trespass
from waiting import until

import fxckpt
from fxckpt.engine import io
from fxckpt.store.reader import latest

WAYS = (trespass.remove, trespass.cut, trespass.rot, trespass.swap)


def frozen_run(root: Path, acks: Path, writer: str) -> None:
    """Each way once, to all that waits; then another run, of which nothing is known."""
    for life in (1, 2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(512, 600), torch.nn.Linear(600, 4))
        model[0].requires_grad_(False)
        opt = torch.optim.SGD(model[1].parameters(), lr=0.1)
        fxckpt.compile_step(opt, root, model=model, every=1, keep=1, max_async=1, update="native", chunk_mb=1, staging_mb=4,
                            threads=1, read_back="off", writer=writer)  # fmt: skip
        fxckpt.load()

        def step(model: torch.nn.Module = model, opt: torch.optim.Optimizer = opt) -> None:
            opt.zero_grad()
            model(torch.ones(2, 512)).pow(2).mean().backward()
            opt.step()
            opt.ckpt.flush()
            io.mkdir(acks / f"{latest(root).generation}")

        step()
        step()
        for way in WAYS if life == 1 else ():
            until(lambda opt=opt: opt.ckpt._run.saver.supply.ready is not None)
            for path in sorted(root.glob("slot-*.partial/model.safetensors")):
                way(path)
            step()
        opt.ckpt.shutdown()
