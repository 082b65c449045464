"""A run with a journal that is killed at random instants, again and again, ends with the bits of one that nobody interrupted.

``FXCKPT_JOURNAL`` says how often it is killed, all cases together (6, of three cases; ``make journal``: 1,000 of all five). No
step is lost that was reported committed, every record verifies, and what a new life loads is the state that the uninterrupted
run had at that step, but for random generators, which the loop restores when it begins.
"""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
from process_runs import results
from waiting import until

from fxckpt.errors import NoCheckpoint
from fxckpt.store.reader import Candidate, Reader, records

LONG = "FXCKPT_JOURNAL" in os.environ
KILLS = int(os.environ.get("FXCKPT_JOURNAL", "6"))

SCRIPT = """
from script_prelude import *
from known_sums import tell
torch.manual_seed(0)
m = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
optimizers = [{optimizers}]
s = [torch.optim.lr_scheduler.OneCycleLR(each, 0.02, total_steps=10**6) for each in optimizers]
fxckpt.compile_step(
    optimizers, "d", model=m, every=1, journal={journal}, keep={keep}, extra={{"s": s}}, chunk_mb=1, {options}
)
opt = optimizers[-1]

def state():
    return digest(m, *(each.state_dict()["state"] for each in optimizers), *s)

start = fxckpt.load()
assert all("missing" in why for _, why in start.skipped), start.skipped
tell("loaded", start.step)
print("STATE", start.step, state(), flush=True)
for step in {steps}:
    loss = m(torch.randn(6, 8)).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(m.parameters(), 0.5)
    if step % 5 == 4:
        m[4].bias.grad = None
    for i, each in enumerate(optimizers):
        if i == 0 or step % 3:  # a second one does not step in each turn
            each.step()
            each.zero_grad()
        s[i].step()
    if {clamp} and step % 3 == 0:
        with torch.no_grad():
            m[4].weight.clamp_(-0.2, 0.2)
    print("STATE", step + 1, state(), flush=True)
    found = opt.ckpt.statistics()
    assert found["checkpoints_failed"] == 0, found
    tell("committed", found["last_committed_step"] or 0)
opt.ckpt.flush()
print("DIGEST", digest(m, *optimizers, *s, torch.get_rng_state()), flush=True)
"""

ADAMW, SGD = "torch.optim.AdamW(m.parameters(), lr=1e-2)", "torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)"
CASES = {
    "thread": {"optimizers": ADAMW, "journal": 8, "options": 'update="native"', "keep": 2, "clamp": False},
    "monitor": {"optimizers": ADAMW, "journal": 5, "options": 'update="native", writer="monitor"', "keep": 2, "clamp": False},
    "compiled": {"optimizers": ADAMW, "journal": 64, "options": "", "keep": 2, "clamp": False},
    "two": {
        "optimizers": "torch.optim.AdamW([p for p in m.parameters() if p.dim() > 1]), "
        "torch.optim.SGD([p for p in m.parameters() if p.dim() < 2], lr=0.05, momentum=0.9)",
        "journal": 6,
        "options": 'update="native"',
        "keep": 2,
        "clamp": False,
    },
    "clamped": {"optimizers": SGD, "journal": 3, "options": 'update="native"', "keep": 1, "clamp": True},
}


class Runs:
    """Runs of one case: ``states`` are those of the uninterrupted one by their step."""

    def __init__(self, server, case: dict, steps: int, folder: Path):
        self._server, self._folder, self._steps = server, folder, steps
        self._script = folder / "train.py"
        folder.mkdir()
        self._script.write_text(SCRIPT.format(steps=f"fxckpt.steps({steps})", **case))
        whole = server.start(self._script, folder / "whole")
        self.end = whole.succeed()
        self.states = _states(whole.output)

    def killed(self, chance: random.Random) -> dict[str, str] | None:
        """One life, killed at a random instant; or the end, if it came to that. Checks all that it loaded and left."""
        place = self._folder / "killed"
        before = _reported(place)
        process = self._server.start(self._script, place)
        wanted = chance.randrange(1, 14)
        until(lambda: len(_lines(place)) > before[1] + wanted or not process.alive(), why=lambda: process.output)
        time.sleep(chance.uniform(0, 0.06))
        if process.alive():
            process.kill()
        output = process.wait()
        for step, state in _states(output).items():
            assert self.states[step] == state, f"step {step} has other bits:\n{output}"
        loaded = [int(line.split()[1]) for line in _lines(place)[before[1] :] if line.startswith("loaded")]
        assert all(step >= before[0] for step in loaded), f"step {before[0]} was reported committed; loaded: {loaded}"
        for each in records(place / "d"):
            assert isinstance(each, Candidate), each
            with suppress(NoCheckpoint):  # a monitor outlives its trainer, and may give one up meanwhile
                Reader(each.path).verify()
        return results(output) or None  # killed behind its end, too


def _states(output: str) -> dict[int, str]:
    return {
        int(line.split()[1]): line.split()[2]
        for line in output.splitlines()
        if line.startswith("STATE ") and line.count(" ") == 2
    }


def _lines(place: Path) -> list[str]:
    report = place / "report"
    return report.read_text().splitlines() if report.exists() else []


def _reported(place: Path) -> tuple[int, int]:
    """The newest step that was reported committed, and how many lines there are."""
    lines = _lines(place)
    return max((int(line.split()[1]) for line in lines if line.startswith("committed")), default=0), len(lines)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES] if LONG else ["monitor", "two", "clamped"])
def test_a_journalled_run_killed_at_random_instants_ends_with_the_same_bits(fork_server, tmp_path, case):
    kills = max(KILLS // len(CASES), 2)
    seed = random.SystemRandom().randrange(2**32)
    chance, steps = random.Random(seed), 18 + 6 * kills
    runs = Runs(fork_server, CASES[case], steps, tmp_path / case)
    killed = 0
    while (end := runs.killed(chance)) is None:
        killed += 1
        assert killed < 20 * (kills + 10), f"seed {seed}: it makes no progress"
    assert end == runs.end, f"seed {seed}: after {killed} kills it ended otherwise"
    print(f"{case}: {killed} kills in {steps} steps, the same bits")
