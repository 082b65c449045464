"""The fork server: a process that has imported torch and fxckpt and forks for every run of a script.

So a run costs a second at most instead of five.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import script_prelude  # noqa: F401  a forked run begins with it
import torch
from process_runs import ProcessRun, fresh_process
from small_models import mlp
from waiting import TIMEOUT

import fxckpt.compiled_optimizer  # noqa: F401  so that a forked run need not import it
from fxckpt.graph.update.trace import signature_of, trace


class ForkServer:
    """Starts runs in that process. One request, one answer, each a line of JSON."""

    def __init__(self, begin: Callable[..., ProcessRun]):
        """``begin(script, variables)`` begins the process."""
        self._runs: list[ProcessRun] = []
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self._process = begin(Path(__file__).resolve(), FORK_SERVER=str(listening.getsockname()[1]))
            listening.settimeout(TIMEOUT)
            self._line, _ = listening.accept()
        self._line.settimeout(None)
        self._answers = self._line.makefile("r")

    @classmethod
    def anew(cls, cache: Path, folder: Path) -> ForkServer:
        """In a process that imports torch. What it says is beside ``folder``, an empty one."""
        return cls(lambda script, **variables: fresh_process(script, folder, cache, **variables))

    def with_more(self, folder: Path, *preloaded: str) -> ForkServer:
        """One that is forked from this one and imports these modules, which scripts import and that take seconds."""
        more = " ".join(preloaded)
        return ForkServer(lambda script, **variables: self.start(script, folder, stays=True, PRELOADED=more, **variables))

    def _ask(self, **request: Any) -> Any:
        self._line.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(self._answers.readline())

    def start(self, script: Path, cwd: Path, *, whole_exit: bool = False, stays: bool = False, **variables: str) -> ProcessRun:
        """Begin a run of ``script`` in ``cwd`` with these environment variables.

        Python's own exit takes a forked run two seconds, for it touches all that it shares with the server. So only where
        the exit is the point (``whole_exit``) it is made; others run the exit handlers and stop. ``stays``: it is
        no single test's.
        """
        cwd.mkdir(parents=True, exist_ok=True)
        log = cwd.parent / f"{cwd.name}-{time.monotonic_ns()}.log"
        log.touch()
        pid = self._ask(script=str(script), cwd=str(cwd), log=str(log), variables=variables, whole_exit=whole_exit)
        process = ProcessRun(pid, log, lambda: self._ask(wait=pid))
        if not stays:
            self._runs.append(process)
        return process

    def end_runs(self) -> None:
        """Kill what a failed test left running."""
        for process in self._runs:
            process.kill()
        self._runs.clear()

    def close(self) -> None:
        self.end_runs()
        self._answers.close()
        self._line.close()
        self._process.wait()


def serve(line: socket.socket) -> None:
    """The server's loop. Returns in the parent at the end of its input, and in each child at the end of its script."""
    for request in _requests(line):
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                line.close()
                _become(**request)
                return
        line.sendall(json.dumps(answer).encode() + b"\n")


def _requests(line: socket.socket) -> Iterator[dict[str, Any]]:
    """One is sent when the one before is answered."""
    read = b""
    while more := line.recv(65536):
        read += more
        if read.endswith(b"\n"):
            yield json.loads(read)
            read = b""


def _become(script: str, cwd: str, log: str, variables: dict[str, str], whole_exit: bool) -> None:
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
    trace(opt, group, member, state, signature_of(opt, group, member, state, "single"))


if __name__ == "__main__":
    if "PRELOADED" not in os.environ:
        warm_up()
    for name in os.environ.pop("PRELOADED", "").split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a run need not touch, and so copy, what the server has
    with socket.create_connection(("127.0.0.1", int(os.environ.pop("FORK_SERVER")))) as connection:
        serve(connection)
