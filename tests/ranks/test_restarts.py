"""torchrun with restarts: ranks are killed at any instant, all load the same step, and end with the bits of a whole run."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fork_server import ForkServer
from repository import SUPPORT
from waiting import TIMEOUT, committed, until

from fxckpt.store.reader import candidates, checkpoints

LIVES = int(os.environ.get("FXCKPT_RANKS", "1"))
"""Kills, each of one rank or of both."""

EPOCHS = max(2, LIVES // 3)  # each life gets some way
STEPS = 16 * EPOCHS

WAYS = {"together": ("train_ddp", "--epochs", str(EPOCHS))}
"""One store of all ranks. In the campaign (``make ranks``) also one of each, which ``test_agreed_load.py`` has in short, and
ranks that hold parts of parameters, which ``test_sharded.py`` has."""
if LIVES > 2:
    WAYS |= {"own": (*WAYS["together"], "--own"), "sharded": ("train_fsdp", "--steps", str(STEPS))}

UPDATE = "default" if LIVES > 2 else "native"
"""The campaign compiles, as the examples do."""

MARK = "NOW THEY ARE KILLED"
START = re.compile(r"life (\d+) rank (\d) starts at step (\d+)")
END = re.compile(r"rank \d ends at step (\d+) with weights ([0-9a-f]{16})")  # two processes may share a line


class Agent:
    """The process that runs ``elastic_run.py``; its children are the ranks."""

    def __init__(self, server: ForkServer, cwd: Path, *arguments: str):
        self.process = server.start(SUPPORT / "elastic_run.py", cwd, ELASTIC_RUN=" ".join(arguments))

    @property
    def output(self) -> str:
        return self.process.output

    def ranks(self) -> set[int]:
        """Their process ids."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {int(pid) for pid in found}  # the agent's main thread forks them

    def ended(self) -> bool:
        return not self.process.alive()

    def kill_ranks(self, root: Path, kills: int, last: int, draw: random.Random) -> int:
        """Kill one or both, ``kills`` times, while they start, load, or have come some steps further; returns how often. They end
        at step ``last``."""
        seen = self.ranks()  # of the whole run
        for done in range(kills):
            found = self._two_others(seen)
            if not found:
                return done
            seen |= found
            if draw.random() < 0.7:
                before = newest(root)
                self._wait_for_step(root, before + draw.uniform(0, (last - before) / (kills - done + 1)), found)
                time.sleep(draw.uniform(0, 0.02))
            else:
                time.sleep(draw.expovariate(2))
            for pid in draw.sample(sorted(found), draw.choice((1, 1, 2))):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return kills

    def _wait_for_step(self, root: Path, step: float, ranks: set[int]) -> None:
        """Until it is committed, or these ranks have ended (gloo may fail to connect them in time)."""
        until(lambda: not ranks <= self.ranks() or newest(root) >= step, why=lambda: self.output)

    def _two_others(self, seen: set[int]) -> set[int]:
        """The ranks of the next life; none if the agent ends."""
        until(lambda: self.ended() or len(self.ranks() - seen) == 2, why=lambda: self.output)
        return set() if self.ended() else self.ranks() - seen


def newest(root: Path) -> int:
    """The last step that rank 0 has committed."""
    own = root / "rank0"
    return max((int(name.split("-")[1]) for name in committed(own if own.exists() else root)), default=0)


def steps_of(root: Path) -> set[int]:
    return {each.step for each in checkpoints(root)}


@pytest.mark.parametrize("way", WAYS)
def test_ranks_killed_at_any_instant_start_together_and_end_with_the_bits_of_a_whole_run(way, fork_server, tmp_path, counted):
    seed = random.SystemRandom().randrange(2**32)
    example, *arguments = WAYS[way]
    agent = Agent(fork_server, tmp_path, example, UPDATE, str(3 * LIVES + 9), *arguments, "--patience", "10")
    try:
        until(lambda: agent.ended() or MARK in agent.output, why=lambda: agent.output)
        killed = agent.kill_ranks(tmp_path / "killed", LIVES, STEPS, random.Random(seed))
        (tmp_path / "over").touch()
        until(agent.ended, 5 * TIMEOUT, why=lambda: agent.output)
    finally:
        agent.process.kill()
    output = f"seed {seed}\n{agent.output}"
    assert agent.process.returncode == 0, output
    assert killed > LIVES // 2, output
    whole, after = output.split(MARK)
    ends = END.findall(after)  # more than two if one was killed behind its last line
    assert len(ends) >= 2 and set(ends) == set(END.findall(whole)) and len(set(ends)) == 1, output

    lives: dict[int, set[int]] = {}
    for life, _, step in START.findall(after):
        lives.setdefault(int(life), set()).add(int(step))
    starts = [found for _, found in sorted(lives.items())]
    assert all(len(found) == 1 for found in starts), output  # all ranks at one step
    assert starts == sorted(starts, key=max), output  # and what was common once is never lost
    if way == "own":
        assert steps_of(tmp_path / "killed" / "rank0") & steps_of(tmp_path / "killed" / "rank1"), output
    else:
        assert all(len(each.record.ranks) == 2 for each in candidates(tmp_path / "killed")), output
    assert "the ranks have no checkpoint of one step" not in output, output
    counted(f"kills of ranks under torchrun's agent, {way}", killed)
