"""A training in which every number is a known whole number of the step: what its script reports, and what is good."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from digests import stored
from process_runs import ProcessRun
from waiting import until

from fxckpt.loading.whole import write_whole
from fxckpt.store.journaled import Journaled, durable_steps, journaled
from fxckpt.store.reader import Candidate, Reader, candidates, read_record, records
from fxckpt.store.typed_json import decode_state


class Sums(torch.nn.Module):
    """The gradient of every parameter is -1: after step k all momenta are -k, all parameters k(k+1)/2, all buffers k.
    What is frozen stays 7."""

    def __init__(self, frozen: int = 0):
        super().__init__()
        if frozen:
            self.base = torch.nn.Parameter(torch.full((frozen,), 7, dtype=torch.float64), requires_grad=False)
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
    if name == "base":
        return 7
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


def check(found: Candidate) -> None:
    """That a checkpoint verifies and is one step, whole."""
    Reader(found.path).verify()
    step, tensors = found.record.step, stored(found.path)
    assert len(tensors) == 11 + ("base" in tensors) and off(tensors, step) == []
    assert decode_state(found.record.state["late"], {}) == {"tally": {"steps": step}}


def rows(directory: Path) -> list[Journaled]:
    """The steps of a journal that are there, by the checkpoint that they build on."""
    return journaled(candidates(directory / "d"), records(directory / "d"))


def made_again(directory: Path) -> int:
    """How many steps of a journal there are."""
    return sum(len(row.records) for row in rows(directory))


def check_made_again(row: Journaled) -> None:
    """That the last step of a journal can be made again, and is one step, whole."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(write_whole(row, scratch))
        check(Candidate(path, read_record(str(path))))


def good(directory: Path, at_least: int) -> int:
    """Every complete checkpoint verifies and is one step, whole, and so is the last step that its records lead to; returns the
    newest step."""
    for found in candidates(directory / "d"):
        assert not isinstance(found, Exception), found
        check(found)
    for row in rows(directory):
        check_made_again(row)
    found = max(durable_steps(directory / "d")[-1:], default=0)
    assert found >= at_least, f"step {at_least} was reported committed, the newest checkpoint is of step {found}"
    return found


def run_and_be_killed(process: ProcessRun, directory: Path, chance: random.Random) -> None:
    """Let it come past its first step (mostly), then kill it at a random instant."""
    lines = len(told(directory)[1])
    if chance.random() < 0.9:
        until(
            lambda: len(told(directory)[1]) > lines + chance.randrange(1, 30) or not process.alive(), why=lambda: process.output
        )
    time.sleep(chance.uniform(0, 0.15))
    process.kill()
    assert process.returncode == -signal.SIGKILL, process.output
