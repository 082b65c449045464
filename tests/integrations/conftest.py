"""A fork server whose processes have the packages that these tests are about: they take seconds to import."""

from __future__ import annotations

import contextlib

import pytest


@pytest.fixture(scope="session")
def _server_with_trainers(_fork_server, tmp_path_factory):
    modules = ("transformers.trainer", "accelerate", "peft", "fxckpt.hf")
    with contextlib.closing(_fork_server.with_more(tmp_path_factory.mktemp("trainers"), *modules)) as made:
        yield made


@pytest.fixture
def trainers_server(_server_with_trainers):
    """Starts scripts that train with transformers or Accelerate."""
    yield _server_with_trainers
    _server_with_trainers.end_runs()


@pytest.fixture(scope="session")
def _server_with_lightning(_fork_server, tmp_path_factory):
    modules = ("lightning", "torchdata.stateful_dataloader", "fxckpt.lightning")
    with contextlib.closing(_fork_server.with_more(tmp_path_factory.mktemp("lightning"), *modules)) as made:
        yield made


@pytest.fixture
def lightning_server(_server_with_lightning):
    """Starts scripts that train with Lightning or Fabric."""
    yield _server_with_lightning
    _server_with_lightning.end_runs()
