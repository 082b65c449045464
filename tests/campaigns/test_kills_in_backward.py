"""Killed at any instant of a backward that updates layers, a run ends with the bits of one that nobody killed.

``FXCKPT_IN_BACKWARD`` says how often (2; ``make in-backward``: 200, a quarter of them of code that Inductor compiled and that
later lives find in its cache).
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import pytest
from armed_life import PLACES, marked
from storing import fast_directory

KILLS = int(os.environ.get("FXCKPT_IN_BACKWARD", "2"))
RUNS, OF_A_RUN = max(1, KILLS // 25), min(KILLS, 25)
STEPS_OF_A_LIFE = 9  # at most: four until the first armed backward, three of those, and two more


@pytest.mark.parametrize("number", range(RUNS))
def test_killed_at_any_instant_of_a_backward_it_ends_with_the_same_bits(number, fork_server, tmp_path, counted):
    code = "inductor" if number % 4 == 3 else "interpreted"
    script, how = tmp_path / "train.py", {"INTERPRETED": "1"} if code == "interpreted" else {}
    script.write_text("import armed_life\narmed_life.live()\n")
    how["STEPS"] = str(STEPS_OF_A_LIFE * (OF_A_RUN + 1))
    seed = random.SystemRandom().randrange(2**32)
    chance, places, starts = random.Random(seed), Counter(), []
    with fast_directory(tmp_path) as stores:
        how["STORES"] = str(stores)
        whole = fork_server.start(script, tmp_path / "whole", **how).succeed()
        for _ in range(OF_A_RUN):
            run = fork_server.start(
                script, tmp_path / "killed", KILL=f"{chance.randint(2, 3)} {chance.uniform(0, 1.1):.4f}", **how
            )
            output = run.wait()
            assert run.returncode == -signal.SIGALRM, f"seed {seed}: it was not killed\n{output}"
            places[marked(tmp_path / "killed")] += 1
            starts.append(int(output.split("START ")[1].split()[0]))
        again = fork_server.start(script, tmp_path / "killed", **how).succeed()
    assert again["DIGEST bits"] == whole["DIGEST bits"], f"seed {seed}: {places}"
    assert all(int(each["DIGEST armed"]) > 0 for each in (whole, again))
    assert starts == sorted(starts) and starts[-1] > starts[0] == 0
    assert again["DIGEST warm"] == str(code == "inductor")
    print(f"{code}, seed {seed}: {dict(places)}")
    for place in PLACES:
        counted(f"kills of a backward with updates, {code}, {place}", places[place])
