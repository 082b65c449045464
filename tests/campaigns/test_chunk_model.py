"""The engine's chunk states and fences, by brute force: every interleaving of a training thread and the writers.

``FXCKPT_MODEL=full`` (``make model``) tries larger settings.
"""

from __future__ import annotations

import os
import re

import chunk_model as model
import pytest
from chunk_model import Setting, explore
from repository import ROOT

WHOLE = os.environ.get("FXCKPT_MODEL") == "full"
SETTINGS = {
    "two writers": Setting(),
    "no staging": Setting(staging=0),
    "a cancel": Setting(writers=1, cancels=1),
    "a fault": Setting(writers=1, faults=1),
    "both": Setting(steps=1, faults=1, cancels=1),
    "shared chunks": Setting(chunks=((0, 1), (0, 1)), steps=2, writers=1),
    "an empty layer": Setting(chunks=((0,), ()), writers=1),
    "a late layer": Setting(chunks=((0, 1), (0,)), late=(1,)),
    "a late layer, no room": Setting(chunks=((0, 1), (0,)), late=(1,), staging=0),
}
LARGE = {
    "two writers, two faults, a cancel": Setting(faults=2, cancels=1),
    "three steps": Setting(steps=3, writers=2),
    "three layers": Setting(chunks=((0, 1), (1, 2), (2,)), layers=3, staging=2),
    "three writers": Setting(writers=3, faults=1),
}
LINES = {
    "a fence waits for who copies": Setting(writers=1),
    "a fence ends who is starved": Setting(chunks=((0, 1), (0,)), late=(1,), staging=0),
    "who helped wakes the writers": Setting(),
    "writers pass over a chunk that is helped": Setting(),
    "writers are woken to close the files": Setting(writers=1, cancels=1),
    "who works on it keeps it": Setting(writers=2, faults=1, cancels=1, steps=1),
    "who uses it gives it back": Setting(writers=1, cancels=1),
}


@pytest.mark.parametrize("name", [*SETTINGS, *(LARGE if WHOLE else {})])
def test_no_interleaving_breaks_a_checkpoint_or_hangs(name, counted):
    setting = {**SETTINGS, **LARGE}[name]
    states, ends, broken = explore(setting)
    counted("states of the chunk model", states)
    assert broken is None
    assert (("DURABLE",) * setting.steps in ends or (setting.late and not setting.staging)) and states > 100
    assert not setting.cancels or any("CANCELLED" in end for end in ends)
    assert not setting.faults or any("FAILED" in end for end in ends)


@pytest.mark.parametrize("line", LINES)
def test_the_model_notices_a_line_that_is_left_out(line):
    setting = Setting(**{**vars(LINES[line]), "without": line})
    _, _, broken = explore(setting)
    assert broken is not None, f"nothing breaks without: {line}"


def test_the_model_has_the_states_of_the_engine():
    header = (ROOT / "csrc" / "core" / "internal.h").read_text()
    for name, states in (
        ("state", (model.ACTIVE, model.DURABLE, model.FAILED, model.CANCELLED)),
        ("sync_state", (model.UNSYNCED, model.SYNC_TAKEN, model.SYNCED)),
    ):
        assert re.search(rf"enum {name} {{ ?([A-Z_, ]+?) ?}}", header)[1].split(", ") == list(states)
    pieces = re.search(r"enum piece_state {(.*?)}", header, re.DOTALL)[1]
    assert {model.IDLE, model.TAKEN, model.DONE} <= set(re.findall(r"[A-Z]+", pieces))
