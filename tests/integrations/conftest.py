"""A fork server whose processes have the packages that these tests are about: they take seconds to import."""

from __future__ import annotations

import contextlib

import pytest
from fork_server import ForkServer


@pytest.fixture(scope="session")
def _server_with_trainers(inductor_cache):
    with contextlib.closing(ForkServer(inductor_cache, "transformers.trainer", "accelerate", "peft", "fxckpt.hf")) as made:
        yield made


@pytest.fixture
def trainers_server(_server_with_trainers):
    """Starts scripts that train with transformers or Accelerate."""
    yield _server_with_trainers
    _server_with_trainers.end_runs()


@pytest.fixture(scope="session")
def _server_with_lightning(inductor_cache):
    with contextlib.closing(ForkServer(inductor_cache, "lightning", "torchdata.stateful_dataloader", "fxckpt.lightning")) as made:
        yield made


@pytest.fixture
def lightning_server(_server_with_lightning):
    """Starts scripts that train with Lightning or Fabric."""
    yield _server_with_lightning
    _server_with_lightning.end_runs()
