"""What tests of ranks have in common."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from joint_ranks import Job
from rank_server import started


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


@pytest.fixture(scope="session")
def rank_server(_fork_server, tmp_path_factory):
    """The process that ranks are forked from; see rank_lives.py."""
    with started(_fork_server, tmp_path_factory.mktemp("ranks")) as made:
        yield made
