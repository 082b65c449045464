"""torchtitan's own Trainer with our checkpoint manager, killed and restarted under torchrun's agent (``make titan``).

Without torchtitan, ``test_titan.py`` has a trainer that calls its manager in the same order.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from process_runs import environment
from repository import SUPPORT
from waiting import TIMEOUT, committed

pytest.importorskip("torchtitan.trainer", reason="torchtitan is not installed: make titan installs it for itself")
pytestmark = pytest.mark.slow

LEFT = re.compile(r"\d+ \d+ [0-9a-f]{16}")


@pytest.fixture
def train(tmp_path, inductor_cache):
    """Two ranks; what each left (steps, tokens, a digest), and what they printed."""

    def run(where: str, **asked: int) -> tuple[set[str], str]:
        path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
             str(SUPPORT / "titan_itself.py"), where, *(f"{name}={value}" for name, value in asked.items())],
            env={**environment(inductor_cache), "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            cwd=tmp_path, text=True, capture_output=True, timeout=3 * TIMEOUT,
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        return set(LEFT.findall(done.stdout)), output

    return run


WAYS = {"fsdp": {}, "tp": {"tp": 2}, "compiled": {"compiled": 1}}


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_is_killed_ends_with_the_bits_of_one_without_checkpoints(way, train, tmp_path: Path):
    """Two optimizers, two micro-batches a step, layers that draw random numbers; the last step is none of the interval's."""
    plain, _ = train("plain", ours=0, **WAYS[way])
    killed, output = train("killed", kill=4, **WAYS[way])
    assert "restored step 2" in output, output
    assert len(plain) == 1 and killed == plain, output
    assert sorted(committed(tmp_path / "killed" / "store")) == ["step-000000002", "step-000000004", "step-000000005"]
