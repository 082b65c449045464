"""One training that is killed at a random instant, and what a fresh process makes of what it left."""

from __future__ import annotations

import os
import random
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import contest
import machine
from trainers import LIMIT, WAYS, live, restore
from turns import Order


def kill(model: str, way: str, folder: Path, args: Namespace, chance: random.Random) -> dict[str, Any]:
    """One training that is killed, and what a fresh process makes of it."""
    life = contest.Contestant(f"{model}, {WAYS[way].label}", live, model, way, folder, args, kind="forkserver", limit=LIMIT)
    life.pipe.send(Order(1, 10**9, tell=True))
    times: list[float] = []
    while life.answer()[0] != "durable":
        times.append(time.monotonic())
    began, delay = time.monotonic(), chance.uniform(0.0, 3 * (times[-1] - times[-2] if len(times) > 1 else 1.0))
    reached = drain(life, began + delay, len(times))
    others = machine.below(life.process.pid)
    life.kill()
    reached = drain(life, None, reached)
    end_of(others)
    for file in folder.iterdir():
        machine.cold(file)
    successor = contest.Contestant(f"{model}, restore of {WAYS[way].label}", restore, model, way, folder, args, kind="forkserver")
    try:
        found = successor.answer()
    finally:
        successor.kill()
    errors = {name: text.replace(str(folder), "") for name, text in found["errors"].items()}
    return {"made": reached, "restored": found["step"], "lost": reached - found["step"], **found, "errors": errors}


def drain(life: contest.Contestant, until: float | None, reached: int) -> int:
    """Read what it tells until then, or until there is no more; the last step that it made."""
    while life.pipe.poll(max(0.0, until - time.monotonic()) if until is not None else 0.0):
        try:
            reached = max(reached, life.pipe.recv()[1])
        except EOFError:
            break
    return reached


def end_of(pids: list[int], patience: float = 60.0) -> None:
    """Wait until what a killed trainer left has ended; end it if that takes long."""
    began = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() - began > patience:
            for pid in pids:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
