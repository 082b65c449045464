"""Runs of a training script, each in a process of its own that can be killed; ``fork_server.py`` starts them quickly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from repository import python_path
from waiting import TIMEOUT, until


class ProcessRun:
    """A run of a script; ``output`` is what it printed so far to ``log``, errors included."""

    def __init__(self, pid: int, log: Path, poll: Callable[[], int | None]):
        self.pid, self.log, self._poll = pid, log, poll
        self.returncode: int | None = None

    @property
    def output(self) -> str:
        return self.log.read_text()

    def alive(self) -> bool:
        if self.returncode is None:
            self.returncode = self._poll()
        return self.returncode is None

    def wait(self, timeout: float = TIMEOUT) -> str:
        """Wait for its end; returns its output."""
        until(lambda: not self.alive(), timeout, lambda: f"the script did not end:\n{self.output}")
        return self.output

    def kill(self, how: int = signal.SIGKILL) -> str:
        """Send a signal and wait for the end."""
        if self.alive():
            os.kill(self.pid, how)
        return self.wait()

    def succeed(self) -> dict[str, str]:
        """Wait for a good end; returns the last word of each LOSS and DIGEST line by the words before it."""
        output = self.wait()
        assert self.returncode == 0, output
        return results(output)


def results(output: str) -> dict[str, str]:
    """``LOSS 3 0x1.8p+0`` and ``DIGEST abc`` lines as a mapping."""
    lines = (line.rpartition(" ") for line in output.splitlines() if line.startswith(("LOSS ", "DIGEST ")))
    return {name: value for name, _, value in lines}


def environment(cache: Path) -> dict[str, str]:
    """Of a script's process: one thread, no compile workers, one cache of compiled code for the whole session."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FXCKPT_")}
    return {
        **kept,
        "PYTHONPATH": python_path(),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def fresh_process(script: Path, cwd: Path, cache: Path, **variables: str) -> ProcessRun:
    """``python script.py``, as a user runs it."""
    log = cwd.parent / f"{cwd.name}-{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=cwd,
            env={**environment(cache), **variables},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    return ProcessRun(process.pid, log, process.poll)
