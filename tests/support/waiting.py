"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 120.0  # seconds that a process may take on a busy machine; none takes five on an idle one


def until(ready: Callable[[], Any], timeout: float = TIMEOUT, why: Callable[[], str] = lambda: "waited in vain") -> None:
    """Look every few milliseconds; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, why()
        time.sleep(0.003)


def committed(directory: Path) -> list[str]:
    """Names of the checkpoints that are complete, by their names alone."""
    return [p.name for p in directory.glob("step-*") if "." not in p.name]
