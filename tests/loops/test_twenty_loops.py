"""Twenty loops after public scripts: plain, with fxckpt, and killed at random and resumed, they end with the same bits.

Each script of ``scripts/`` stands there as its author would change it; the lines that changed are marked and counted.
``FXCKPT_LOOPS`` says how often each is run again to be killed (once, by one kill; ``make loops``: 20 times, by three each).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from loop_runs import Loop
from marked_script import changed_lines, without_fxckpt

ROUNDS = int(os.environ.get("FXCKPT_LOOPS", "1"))
KILLS = 3 if ROUNDS > 1 else 1
MOST_CHANGED = 8
IN_FLIGHT = 3  # checkpoints may be under way, and are given up, when a tensor proves to change outside of steps
SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))


def test_there_are_twenty_and_each_is_changed_in_eight_lines_at_most():
    changed = {path.stem: changed_lines(path.read_text()) for path in SCRIPTS}
    assert len(changed) == 20
    assert {name: lines for name, lines in changed.items() if not 4 <= lines <= MOST_CHANGED} == {}
    assert not [path.stem for path in SCRIPTS if "fxckpt" in without_fxckpt(path.read_text())]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_loop_ends_with_the_same_bits_plain_whole_and_killed_at_random(script, fork_server, tmp_path, counted):
    loop = Loop(fork_server, script.read_text(), tmp_path)
    plain, whole = loop.plain(), loop.whole()
    assert whole == plain, "fxckpt changed the bits of an uninterrupted run"
    assert whole.committed > IN_FLIGHT >= whole.dropped
    for seed, resumed in loop.killed_anew(ROUNDS, KILLS, plain.backwards):
        assert resumed.lines == plain.lines, f"seed {seed}: resumed, it ended otherwise"
        counted("kills of loops as people write them", KILLS)
