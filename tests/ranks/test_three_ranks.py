"""With three ranks sums of gradients depend on DDP's buckets, which a process makes anew: a run goes on with those it had."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from process_runs import environment
from repository import ROOT

SCRIPT = ROOT / "tests/support/three_ranks.py"


@pytest.fixture(scope="module")
def printed(tmp_path_factory, inductor_cache) -> list[str]:
    """What each of three ranks said."""
    folder = tmp_path_factory.mktemp("three")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(port), str(folder)],
            env=environment(inductor_cache),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(3)
    ]
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(said)
    return said


@pytest.mark.parametrize("way", ["one store", "a store each"])
def test_three_ranks_of_ddp_go_on_to_the_same_bits(printed, way):
    assert all(f"RESULT {way}: same" in each for each in printed), "\n".join(printed)


def test_where_buckets_cannot_be_made_as_they_were_it_is_said(printed):
    """Hooks on parameters would be called for gradients that are none. What it costs is seen here, too: other bits."""
    assert all("RESULT with hooks: other" in each for each in printed), "\n".join(printed)
    assert all("hooks on parameters kept fxckpt from making them as they were" in each for each in printed)
