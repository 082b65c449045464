"""Lives of a job whose number of ranks changes: some are killed at a random instant, the others end, and a next life begins.

``FXCKPT_LIVES`` says how many (4; ``make ranks``: 100). All ranks of a life start from one step; it is none before the last that
any rank acknowledged; and the weights are those that a single process has at that step, for all ranks have the same batch.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from waiting import until

from fxckpt.store.reader import Reader, candidates

LIVES = int(os.environ.get("FXCKPT_LIVES", "4"))
SEED = int(os.environ.get("FXCKPT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
STEPS = 10 * LIVES

SCRIPT = """
from script_prelude import *
from datetime import timedelta
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD"])
store = dist.TCPStore("127.0.0.1", int(os.environ["PORT"]), None, False, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
ddp = DistributedDataParallel(model)
opt = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
fxckpt.compile_step(opt, "d", model=model, every=1, keep=2, update="native", chunk_mb=1)
start = fxckpt.load()
print("START", start.step, digest(model), flush=True)
for step in fxckpt.steps({steps}):
    kill_window()
    ddp(torch.ones(2, 16) * (step % 7)).square().mean().backward()
    opt.step()
    opt.zero_grad()
    print("COMMITTED", opt.ckpt.statistics()["last_committed_step"] or 0, flush=True)
opt.ckpt.flush()
print("COMMITTED", opt.ckpt.statistics()["last_committed_step"], flush=True)
print("END", digest(model), flush=True)
opt.ckpt.shutdown()
"""


class Life:
    """One life of the job: so many processes, and the store by which they talk, which is the launcher's."""

    def __init__(self, fork_server, script, root, world):
        self.server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=60), wait_for_workers=False)
        where = {"WORLD": str(world), "PORT": str(self.server.port), "KILL_WINDOW": "0.01"}
        self.ranks = [fork_server.start(script, root, RANK=str(rank), **where) for rank in range(world)]

    def found(self, what):
        """What each rank has printed behind this word, the last time."""
        lines = [re.findall(rf"^{what} (.*)$", rank.output, re.MULTILINE) for rank in self.ranks]
        return [each[-1] for each in lines if each]

    def output(self):
        return "\n".join(f"rank {at}:\n{rank.output}" for at, rank in enumerate(self.ranks))

    def kill(self, draw):
        """Some of them, at once; and, as a launcher does, all others a moment later."""
        for rank in draw.sample(self.ranks, draw.randint(1, len(self.ranks))):
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        time.sleep(draw.choice((0.0, 0.05, 0.3)))
        for rank in self.ranks:
            rank.kill()


def reference():
    """Digests of the weights by step, of a process that nobody kills."""
    from digests import digest

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
    opt, found = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5), [digest(model)]
    for step in range(STEPS):
        model(torch.ones(2, 16) * (step % 7)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        found.append(digest(model))
    return found


@pytest.mark.usefixtures("one_thread")
def test_lives_of_any_number_of_ranks_go_on_from_one_step_that_was_acknowledged(fork_server, tmp_path, counted):
    draw, script, root = random.Random(SEED), tmp_path / "job.py", tmp_path / "run"
    script.write_text(SCRIPT.format(steps=STEPS))
    expected, acknowledged = reference(), 0
    for number in range(LIVES):
        life = Life(fork_server, script, root, draw.choice((1, 2, 2, 4) if LIVES > 4 else (2, 4, 1, 2)))
        until(lambda life=life: len(life.found("START")) == len(life.ranks) or not all(r.alive() for r in life.ranks))
        time.sleep(draw.uniform(0, 0.5))
        life.kill(draw)
        why = f"seed {SEED}, life {number}: {life.output()}"
        starts = set(life.found("START"))
        assert len(starts) <= 1, why
        for start in starts:
            step, weights = start.split()
            assert int(step) >= acknowledged and weights == expected[int(step)], why
        acknowledged = max([acknowledged, *map(int, life.found("COMMITTED"))])
        whole = candidates(root / "d")
        for each in whole:
            Reader(each.path).verify()
        assert max((each.record.step for each in whole), default=0) >= acknowledged, why
    last = Life(fork_server, script, root, 2)
    for rank in last.ranks:
        rank.wait()
    assert set(last.found("END")) == {expected[STEPS]}, f"seed {SEED}: {last.output()}"
    counted("lives of jobs of one to four ranks, killed", LIVES)
