"""An example under torchrun's own agent, in this process, which forks the ranks: a life imports nothing anew.

A fork server starts it, and the variable ``ELASTIC_RUN`` says what: ``EXAMPLE UPDATE RESTARTS ARGUMENT...``; the example's own
``update`` is the "default". It runs twice: in ``whole``, and then, with ``RESTARTS`` restarts allowed, in ``killed``, where a
rank that has come to its end waits for a file ``over``: torch's agent deadlocks if a rank whose function has returned is killed
just before it hears so (``MultiprocessContext`` says it of its ``_worker_finished_event``).
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import signal
import time
from pathlib import Path

from repository import ROOT
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import fxckpt


def rank(arguments: list[str], over: Path | None) -> None:
    """One rank. SIGTERM ends it wherever it waits, as it ends one that was not forked: the agent has a handler. ``over``: it
    returns when that is there."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    agent = os.getppid()
    example(os.environ["ELASTIC_RUN"].split()[0]).main(arguments)
    while over is not None and not over.exists() and os.getppid() == agent:
        time.sleep(0.01)


def example(name: str):
    """An example, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(restarts: int, arguments: list[str], over: Path | None = None) -> None:
    """Two ranks, started again whenever one of them ends otherwise than by itself."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=restarts, monitor_interval=0.05, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, rank)(arguments, over)


if __name__ == "__main__":
    # Else torch's agent keeps one store over restarts, and gloo finds addresses of ranks that are dead.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    _, update, restarts, *arguments = os.environ["ELASTIC_RUN"].split()
    if update != "default":
        fxckpt.compile_step = functools.partial(fxckpt.compile_step, update=update)
    gc.collect()
    gc.freeze()  # a collection in a rank need not touch, and so copy, what is here
    launch(0, ["--dir", "whole", *arguments])
    print("NOW THEY ARE KILLED", flush=True)
    launch(int(restarts), ["--dir", "killed", *arguments], Path("over").absolute())
