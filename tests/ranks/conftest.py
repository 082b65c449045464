"""What tests of ranks have in common."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from joint_ranks import Job


@pytest.fixture(scope="module")
def one_rank():
    """This process is a job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def job(root, monkeypatch):
    found = Job(root, monkeypatch)
    yield found
    for run in reversed(found.runs):  # rank 0 waits until all others have heard its last word
        if hasattr(run, "opt"):
            run.opt.ckpt._run.saver.abandon()
