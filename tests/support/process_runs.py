"""Lives: runs of a training script, each in a process of its own that can be killed.

Most come out of the ``Nursery``, a process that has imported torch and fxckpt and forks for every life, so that a life costs a
second at most instead of five; :func:`fresh_life` is ``python script.py``.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import TIMEOUT, mlp, until

import fxckpt.optimizer  # noqa: F401  so that a life need not import it
from fxckpt.graph import update

ROOT = Path(__file__).resolve().parent.parent


class Life:
    """A run of a script; ``output`` is what it printed so far, errors included."""

    def __init__(self, pid: int, log: Path, poll: Callable[[], int | None]):
        self.pid, self._log, self._poll = pid, log, poll
        self.returncode: int | None = None

    @property
    def output(self) -> str:
        return self._log.read_text()

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
    """For lives: one thread, no compile workers, one cache of compiled code for the whole session."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FXCKPT_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        **kept,
        "PYTHONPATH": path,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def fresh_life(script: Path, cwd: Path, cache: Path, **variables: str) -> Life:
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
    return Life(process.pid, log, process.poll)


class Nursery:
    """The process that forks lives. One request, one answer, each a line of JSON."""

    def __init__(self, cache: Path):
        self._lives: list[Life] = []
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=environment(cache),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def _ask(self, **request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, script: Path, cwd: Path, *, whole_exit: bool = False, **variables: str) -> Life:
        """Begin a life of ``script`` in ``cwd`` with these environment variables.

        Python's own exit takes a forked life two seconds, for it touches all that it shares with the nursery. So only where
        the exit is the point (``whole_exit``) it is made; others run the exit handlers and stop.
        """
        cwd.mkdir(parents=True, exist_ok=True)
        log = cwd.parent / f"{cwd.name}-{time.monotonic_ns()}.log"
        log.touch()
        pid = self._ask(script=str(script), cwd=str(cwd), log=str(log), variables=variables, whole_exit=whole_exit)
        life = Life(pid, log, lambda: self._ask(wait=pid))
        self._lives.append(life)
        return life

    def end_lives(self) -> None:
        """Kill what a failed test left running."""
        for life in self._lives:
            life.kill()
        self._lives.clear()

    def close(self) -> None:
        self.end_lives()
        self._process.stdin.close()
        self._process.wait(TIMEOUT)


def serve() -> None:
    """The nursery's loop. Returns in the parent at the end of its input, and in each child at the end of its script."""
    for request in _requests():
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _live(**request)
                return
        print(json.dumps(answer), flush=True)


def _requests() -> Iterator[dict[str, Any]]:
    """Unbuffered, so that a child inherits no half-read line."""
    line = b""
    while byte := os.read(0, 1):
        line += byte
        if byte == b"\n":
            yield json.loads(line)
            line = b""


def _live(script: str, cwd: str, log: str, variables: dict[str, str], whole_exit: bool) -> None:
    """Become a process that runs a script, as if it had been started for it."""
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND)):
        fd = os.open(path, flags)
        os.dup2(fd, descriptor)
        os.close(fd)
    os.dup2(1, 2)
    os.chdir(cwd)
    os.environ.update(variables)
    random.seed()
    np.random.seed()
    torch.seed()
    code = compile(Path(script).read_text(), script, "exec")
    if whole_exit:
        exec(code, sys.modules["__main__"].__dict__)
        return
    status = 0
    try:
        exec(code, sys.modules["__main__"].__dict__)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException as error:
        traceback.print_exc()
        sys.last_value, status = error, 1  # as the interpreter sets it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


def warm_up() -> None:
    """Import what torch imports at the first use of Dynamo, AOTAutograd and tracing; leaves no thread and no compiled code."""
    import torch._inductor.compile_fx

    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for backend in ("eager", "aot_eager"):
        torch.compile(model, backend=backend)(torch.zeros(8, 8)).sum().backward()
        opt.step()
        torch._dynamo.reset()
    member = model[0].weight
    group, state = opt.param_groups[0], opt.state[member]
    update.trace(opt, group, member, state, update.signature_of(opt, group, member, state, "single"))


if __name__ == "__main__":
    warm_up()
    gc.collect()
    gc.freeze()  # a collection in a life need not touch, and so copy, what the nursery has
    serve()
