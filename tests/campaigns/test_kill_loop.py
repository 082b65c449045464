"""Promise 4, the process's half: SIGKILL at a random instant of a fast loop never costs a committed checkpoint.

``FXCKPT_KILLS`` says how often (8; ``make kills``: 100). Every tensor of the script is a known whole number of the step, so
whoever finds a checkpoint can tell from any of its bytes which step it is of, and that it is whole.
"""

from __future__ import annotations

import os
import random

import pytest
from known_sums import good, run_and_be_killed, told

KILLS = int(os.environ.get("FXCKPT_KILLS", "8"))

SCRIPT = """
from script_prelude import *
from known_sums import Sums, Tally, tell, wrong

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


@pytest.mark.slow
def test_kills_at_random_instants_leave_a_whole_step_no_older_than_the_last_reported_one(fork_server, tmp_path):
    script, directory = tmp_path / "train.py", tmp_path / "d"
    script.write_text(SCRIPT)
    seed = random.SystemRandom().randrange(2**32)
    chance, newest, kills, loads = random.Random(seed), 0, 0, []
    while kills < KILLS or newest <= KILLS or len(loads) < 2:  # runs that are killed before their first step show little
        kills += 1
        assert kills <= 20 * KILLS, f"seed {seed}: hardly a step was made"
        process = fork_server.start(script, directory)
        run_and_be_killed(process, directory, chance)
        at_least, lines = told(directory)
        newest = good(directory, max(at_least, newest))
        loads = [line for line in lines if line.startswith("loaded") and line != "loaded 0"]
