"""Forks the ranks of lives, as it is told over a socket, from a process that has imported everything.

``rank_server.py`` starts it. A life is a line of JSON, a dict: ``script`` (a module of this folder, whose function
``live(life, rank, begun)`` is one rank of it: it may set ``begun.value`` to the number of a step that has begun, and returns a
dict of what it found and left), ``world``, ``cwd``, ``kill`` (which ranks, once which step has begun, and how many seconds
later: ``[ranks, step, seconds]``), ``signal`` (SIGTERM comes to all, one after the other: ``[step, seconds between two]``), and
what the script asks for. The answer to a life is a list of what its ranks returned, null of a rank that was killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist


def main_of_rank(life: dict[str, Any], rank: int, file: str, begun: Any, out: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(life["cwd"])
    if life["world"] > 1:
        store = dist.FileStore(file, life["world"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=life["world"])
    try:
        answer: Any = importlib.import_module(life["script"]).live(life, rank, begun)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    out.send(answer)
    os._exit(0)


def one_life(life: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Fork its ranks, kill those that are to be killed, and with them all others, as a launcher does."""
    importlib.import_module(life["script"])  # once, for all lives
    fork = multiprocessing.get_context("fork")
    begun = fork.Value("i", 0)
    pipes = [fork.Pipe(duplex=False) for _ in range(life["world"])]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "store")
        ranks = [
            fork.Process(target=main_of_rank, args=(life, rank, file, begun, pipes[rank][1])) for rank in range(life["world"])
        ]
        for each in ranks:
            each.start()
        if (kill := life.get("kill")) is not None:
            chosen, at, wait = kill
            wait_for(begun, at, ranks)
            time.sleep(wait)
            for rank in [*chosen, *range(life["world"])]:
                ranks[rank].kill()
        if (asked := life.get("signal")) is not None:
            wait_for(begun, asked[0], ranks)
            for each in random.sample(ranks, len(ranks)):
                each.terminate()
                time.sleep(asked[1])
        for (_, ours), each in zip(pipes, ranks):
            ours.close()
            each.join()
        return [answer(pipe) for pipe, _ in pipes]


def wait_for(begun: Any, step: int, ranks: list[Any]) -> None:
    """Until rank 0 has begun this step, or one has ended."""
    while begun.value < step and all(each.is_alive() for each in ranks):
        time.sleep(0.001)


def answer(pipe: Any) -> dict[str, Any] | None:
    """What a rank has sent; None if it was killed before."""
    try:
        found: dict[str, Any] = pipe.recv()
    except EOFError:
        return None
    return found


def serve(port: int) -> None:
    """Lives as they are asked for, until there is nobody who asks."""
    gc.collect()
    gc.freeze()
    with socket.create_connection(("127.0.0.1", port)) as line, line.makefile("rw") as asked:
        for life in asked:
            asked.write(json.dumps(one_life(json.loads(life))) + "\n")
            asked.flush()


if __name__ == "__main__":
    serve(int(os.environ["RANK_SERVER"]))
