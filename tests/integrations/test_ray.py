"""Ray Train starts workers again that were killed, and they end with the bits of a run that nobody killed (``make ray``)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from process_runs import environment
from repository import ROOT
from waiting import TIMEOUT

pytest.importorskip("ray.train.torch", reason="Ray is not installed: make ray installs it for itself")
pytestmark = pytest.mark.slow

END = re.compile(r"worker (\d) ends at step (\d+) with weights ([0-9a-f]{16})")
START = re.compile(r"worker (\d) starts at step (\d+)")


@pytest.fixture
def train(tmp_path, inductor_cache):
    """The example; what it prints. Ray prints some lines of its workers twice."""

    def run(where: str, *arguments: str) -> str:
        script = ROOT / "examples" / "train_ray.py"
        done = subprocess.run(
            [sys.executable, str(script), "--dir", where, *arguments], cwd=tmp_path, text=True, capture_output=True,
            env={**environment(inductor_cache), "RAY_USAGE_STATS_ENABLED": "0"}, timeout=5 * TIMEOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_workers_that_ray_starts_again_end_with_the_bits_of_a_whole_run(train, tmp_path: Path):
    whole = set(END.findall(train("whole")))
    output = train("killed", "--kill", "21")
    assert {rank for rank, _, _ in whole} == {"0", "1"} and len({(step, weights) for _, step, weights in whole}) == 1
    assert set(END.findall(output)) == whole, output
    starts = {(rank, int(step)) for rank, step in START.findall(output)}
    later = {step for _, step in starts} - {0}
    assert len(later) == 1 and 0 < later.pop() <= 20, output  # both at one step, of which there is a checkpoint
