"""Lives of a job whose hosts go: disks are lost and change places between them, and ranks are killed at any instant.

``FXCKPT_LIVES`` says how many (2; ``make ranks``: 100). All ranks of a life start from one step, each with its own state, and
it is none before the last of which all ranks had said that their replicas are durable; and the final weights are those of a whole
run.
"""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest
from replicated_job import SCRIPT, Life, replicas
from waiting import until

from fxckpt.store.reader import Reader

LIVES = int(os.environ.get("FXCKPT_LIVES", "2"))
SEED = int(os.environ.get("FXCKPT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
STEPS, WORLD = 10 + 6 * LIVES, 3


@pytest.mark.usefixtures("one_thread")
def test_whatever_disks_are_lost_one_at_a_time_the_job_ends_with_the_bits_of_a_whole_run(fork_server, tmp_path, counted):
    draw, script = random.Random(SEED), tmp_path / "job.py"
    script.write_text(SCRIPT)
    whole = Life(fork_server, script, [tmp_path / f"whole{rank}" for rank in range(WORLD)], "0", STEPS).end()
    disks, sure, lost = [tmp_path / f"disk{rank}" for rank in range(WORLD)], 0, 0
    for number in range(LIVES):
        life, goal = Life(fork_server, script, disks, "0.01", STEPS), sure + draw.randint(1, 5)
        until(lambda life=life, goal=goal: life.replicated() >= goal or not all(each.alive() for each in life.ranks))
        time.sleep(draw.choice((0, 0, 0.03)))
        for rank in life.ranks:
            rank.kill()
        why = f"seed {SEED}, life {number}: {life.output}"
        check(life, sure, why)
        for disk in disks:
            for rank in range(WORLD):
                assert all(Reader(each).verify() is None for each in replicas(disk / "d", rank)), why
        sure = max(sure, life.replicated())
        if draw.random() < 0.7:
            shutil.rmtree(draw.choice(disks))
            lost += 1
        if draw.random() < 0.4:
            draw.shuffle(disks)
    last = Life(fork_server, script, disks, "0", STEPS)
    assert last.end() == whole, f"seed {SEED}: {last.output}"
    check(last, sure, f"seed {SEED}: {last.output}")
    counted("disks lost between lives of jobs of three ranks", lost)


def check(life, sure, why):
    """All start from one step, which is not before this one, each with what is its own."""
    found = [each.split() for each in life.found("START")]
    (step,) = {int(step) for step, _ in found}
    assert step >= sure and "cannot be loaded" not in life.output, why
    assert [whose for _, whose in found] == (["None"] * WORLD if step == 0 else [str(rank) for rank in range(WORLD)]), why
