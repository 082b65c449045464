"""Promise 4, the process's half: SIGKILL at a random instant of a fast loop never costs a committed checkpoint.

``FXCKPT_KILLS`` says how often (8; ``make kills``: 100). Every tensor of the script is a known whole number of the step, so
whoever finds a checkpoint can tell from any of its bytes which step it is of, and that it is whole.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import stored, until
from lives import Life

from fxckpt.store.reader import Reader, candidates, latest
from fxckpt.store.record import decode_state

KILLS = int(os.environ.get("FXCKPT_KILLS", "8"))

SCRIPT = """
from helpers import *
from test_kill_loop import Sums, Tally, tell, wrong

m = Sums()
model = eager(m)
tally = Tally()
opt = torch.optim.SGD(m.parameters(), lr=1.0, momentum=1.0)
fxckpt.compile_step(opt, "d", model=m, every=1, update="native", chunk_mb=1, extra={"tally": tally})
start = fxckpt.load().step
tell("loaded", start)
assert not wrong(start, m, opt, tally), wrong(start, m, opt, tally)
for step in range(start, 10**9):
    model().backward()
    opt.step()
    opt.zero_grad()
    tally.steps += 1
    found = opt.ckpt.statistics()
    assert found["checkpoints_failed"] == 0, found
    tell("committed", found["last_committed_step"] or start)
"""


class Sums(torch.nn.Module):
    """The gradient of every parameter is -1: after step k all momenta are -k, all parameters k(k+1)/2, all buffers k."""

    def __init__(self):
        super().__init__()
        zeros = [torch.zeros(n, dtype=torch.float64) for n in (3, 70_000, 1, 90_000, 20_000)]
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(each) for each in zeros)
        self.register_buffer("calls", torch.zeros(3000, dtype=torch.int64))

    def forward(self) -> torch.Tensor:
        self.calls += 1
        return -torch.stack([w.sum() for w in self.weights]).sum()


class Tally:
    """Extra state: the steps, counted."""

    def __init__(self):
        self.steps = 0

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]


def expected(name: str, step: int) -> int:
    """The value of all elements of a tensor after so many steps."""
    return step if name == "calls" else -step if name.startswith("momentum_buffer/") else step * (step + 1) // 2


def off(tensors: dict[str, torch.Tensor], step: int) -> list[str]:
    """What is not as after ``step``; empty if all is."""
    return [
        f"{name} is {each.unique().tolist()[:4]}, not {expected(name, step)}"
        for name, each in tensors.items()
        if not bool((each == expected(name, step)).all())
    ]


def wrong(step: int, m: Sums, opt: torch.optim.Optimizer, tally: Tally) -> list[str]:
    """The live state, as :func:`off` tells it."""
    momenta = {f"momentum_buffer/{name}": opt.state[p]["momentum_buffer"] for name, p in m.named_parameters() if opt.state[p]}
    missing = ["momenta are missing"] if step and len(momenta) != 5 else []
    return off({**m.state_dict(), **momenta}, step) + missing + ([f"tally {tally.steps}"] if tally.steps != step else [])


def tell(what: str, step: int) -> None:
    """Append to the report with one write, so that what it says is true even if the next instruction is the last."""
    fd = os.open("report", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{what} {step}\n".encode())
    os.close(fd)


def told(directory: Path) -> tuple[int, list[str]]:
    """The newest step that was reported committed or loaded, and all lines."""
    report = directory / "report"
    lines = report.read_text().splitlines() if report.exists() else []
    return max((int(line.split()[1]) for line in lines), default=0), lines


def good(directory: Path, at_least: int) -> int:
    """Every complete checkpoint verifies and is one step, whole; returns the newest one's step."""
    for found in candidates(directory / "d"):
        assert not isinstance(found, Exception), found
        Reader(found.path).verify()
        step, tensors = found.record.step, stored(found.path)
        assert len(tensors) == 11 and off(tensors, step) == []
        assert decode_state(found.record.state["late"], {}) == {"tally": {"steps": step}}
    newest = latest(directory / "d")
    found = newest.step if newest is not None else 0
    assert found >= at_least, f"step {at_least} was reported committed, the newest checkpoint is of step {found}"
    return found


def live_and_be_killed(life: Life, directory: Path, chance: random.Random) -> None:
    """Let it come past its first step (mostly), then kill it at a random instant."""
    lines = len(told(directory)[1])
    if chance.random() < 0.9:
        until(lambda: len(told(directory)[1]) > lines + chance.randrange(1, 30) or not life.alive(), why=lambda: life.output)
    time.sleep(chance.uniform(0, 0.15))
    life.kill()
    assert life.returncode == -signal.SIGKILL, life.output


@pytest.mark.slow
def test_kills_at_random_instants_leave_a_whole_step_no_older_than_the_last_reported_one(nursery, tmp_path):
    script, directory = tmp_path / "train.py", tmp_path / "d"
    script.write_text(SCRIPT)
    seed = random.SystemRandom().randrange(2**32)
    chance, newest, kills, loads = random.Random(seed), 0, 0, []
    while kills < KILLS or newest <= KILLS or len(loads) < 2:  # lives that are killed before their first step show little
        kills += 1
        assert kills <= 20 * KILLS, f"seed {seed}: hardly a step was made"
        life = nursery.start(script, directory)
        live_and_be_killed(life, directory, chance)
        at_least, lines = told(directory)
        newest = good(directory, max(at_least, newest))
        loads = [line for line in lines if line.startswith("loaded") and line != "loaded 0"]
