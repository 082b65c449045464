"""What the end-to-end tests share: small models, digests, and lives of a training script that can be killed.

A *life* is one run of a script in a process of its own. Most come out of the ``Nursery``, a process that has imported torch
and fxckpt and forks for every life, so that a life costs 0.1 s instead of five; :func:`fresh_life` is ``python script.py``.
Scripts begin with ``from helpers import *`` and find everything here.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
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
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

import fxckpt
import fxckpt.optimizer  # so that a life need not import it
from fxckpt.graph import update

__all__ = ["F", "GPT", "Loader", "conv", "digest", "eager", "finish", "frozen", "fxckpt", "mlp", "moment", "nn", "np", "random",
           "report", "torch"]

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 120.0  # seconds that a life may take on a busy machine; none takes five on an idle one


# ---- models and data ----


def mlp(width: int = 16) -> nn.Sequential:
    """With dropout, so that the random state matters."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 4))


def eager(model: nn.Module) -> nn.Module:
    """Through our backend, with nothing compiled behind it: fast where compiled code is not the point."""
    return torch.compile(model, backend=fxckpt.backend, options={"inner": "eager"})


def conv() -> nn.Sequential:
    """With BatchNorm: its running statistics change in the forward; weights in channels_last order."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 3, 2),
                          nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    return model.to(memory_format=torch.channels_last)


class GPT(nn.Module):
    """One block of a transformer; the output layer is the embedding. Classifies the first of its tokens' successor."""

    def __init__(self, vocabulary: int = 11, width: int = 16):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(6, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.tokens(x) + self.positions)[:, -1])


def frozen() -> nn.Sequential:
    """A pretrained part that is not trained, a norm that only collects statistics, and a head."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
    model[:2].requires_grad_(False)
    return model


class Loader:
    """Endless shuffled batches of 8 from a data set of 50: iterable, with a generator and a position as its state."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, seed: int = 1):
        self.inputs, self.targets = inputs, targets
        self.generator, self.order, self.at = torch.Generator().manual_seed(seed), [], 0

    @classmethod
    def of(cls, *shape: int, classes: int = 4) -> Loader:
        g = torch.Generator().manual_seed(2)
        return cls(torch.randn(50, *shape, generator=g), torch.randint(0, classes, (50,), generator=g))

    @classmethod
    def of_tokens(cls, vocabulary: int = 11) -> Loader:
        g = torch.Generator().manual_seed(2)
        text = torch.randint(0, vocabulary, (50, 7), generator=g)
        return cls(text[:, :-1], text[:, -1])

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.at + 8 > len(self.order):
            self.order, self.at = torch.randperm(50, generator=self.generator).tolist(), 0
        chosen = self.order[self.at : self.at + 8]
        self.at += 8
        return self.inputs[chosen], self.targets[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": list(self.order), "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.at = list(state["order"]), state["at"]


# ---- digests and snapshots ----


def _feed(sha: Any, value: Any) -> None:
    """Hash a value by its exact bits and types."""
    if isinstance(value, torch.Tensor):
        value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        sha.update(value.tobytes())
    elif isinstance(value, dict):
        for key in value:
            sha.update(repr(key).encode())
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            _feed(sha, each)
    else:
        sha.update(repr(value).encode())


def digest(*objects: Any) -> str:
    """SHA-256 over the state dicts of modules, optimizers, schedulers and loaders, and over plain values and tensors."""
    sha = hashlib.sha256()
    for each in objects:
        _feed(sha, each.state_dict() if hasattr(each, "state_dict") else each)
    return sha.hexdigest()[:16]


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of what the two files of a checkpoint must hold, by their keys there; ties once, by their first name."""
    out, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            out[name] = tensor.detach().clone()
            seen.add(id(tensor))
    for i, opt in enumerate(optimizers):
        for name, param in model.named_parameters():
            for key, value in opt.state.get(param, {}).items():
                if isinstance(value, torch.Tensor):
                    out[f"{key}/{name}" if i == 0 else f"optimizer{i}:{key}/{name}"] = value.detach().clone()
    return out


def stored(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint's two files hold, as the safetensors package reads them; copies, not mappings of the files."""
    return {**load((path / "model.safetensors").read_bytes()), **load((path / "optimizer.safetensors").read_bytes())}


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not the same bits, or are on one side only; NaN equals NaN."""
    return [key for key in {**left, **right} if key not in left or key not in right or digest(left[key]) != digest(right[key])]


# ---- inside a life ----


def moment() -> None:
    """An instant at which a kill may come: a killed life lingers here, so that kills fall between all lines of its loop."""
    time.sleep(float(os.environ.get("MOMENT", "0")))


def report(step: int, loss: torch.Tensor) -> None:
    """Print a step's loss to the last bit, at once."""
    print(f"LOSS {step} {loss.item().hex()}", flush=True)
    moment()


def finish(*objects: Any) -> None:
    """Print the digest of everything that a run ends with, the random generators included."""
    state = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    print("DIGEST", digest(*objects, *state), flush=True)


# ---- lives ----


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


def until(ready: Callable[[], Any], timeout: float = TIMEOUT, why: Callable[[], str] = lambda: "waited in vain") -> None:
    """Look every few milliseconds; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, why()
        time.sleep(0.003)


def committed(directory: Path) -> list[str]:
    """Names of the checkpoints that are complete, by their names alone."""
    return [p.name for p in directory.glob("step-*") if "." not in p.name]


def environment(cache: Path) -> dict[str, str]:
    """For lives: one thread, no compile workers, one cache of compiled code for the whole session."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FXCKPT_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**kept, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1"}


def fresh_life(script: Path, cwd: Path, cache: Path, **variables: str) -> Life:
    """``python script.py``, as a user runs it."""
    log = cwd.parent / f"{cwd.name}-{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, str(script)], cwd=cwd, env={**environment(cache), **variables},
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    return Life(process.pid, log, process.poll)


class Nursery:
    """The process that forks lives. One request, one answer, each a line of JSON."""

    def __init__(self, cache: Path):
        self._lives: list[Life] = []
        self._process = subprocess.Popen([sys.executable, str(Path(__file__).resolve())], env=environment(cache), text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

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
                return _live(**request)
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
