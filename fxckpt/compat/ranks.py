"""Which rank of how many this process is, and the store by which they talk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where torchrun, Open MPI, MPICH and Slurm's ``srun`` say how many processes they started. The first that is set counts."""


def world_size() -> int:
    """Ranks of this job: torch.distributed's if it runs, else what the launcher says."""
    return dist.get_world_size() if _runs() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank; 0 outside a distributed job."""
    return dist.get_rank() if _runs() else int(os.environ.get("RANK", "0"))


def launched() -> tuple[str, int]:
    """The variable by which a launcher tells the number of processes it started, and the number; ``("", 1)`` without one."""
    name = next((each for each in _SIZES if os.environ.get(each, "").isdigit()), "")
    return name, int(os.environ[name]) if name else 1


def _runs() -> bool:
    return dist.is_available() and dist.is_initialized()


def default_store() -> tuple[Any, float] | None:
    """The key-value store by which this job's process group was made, and its timeout in seconds; None without a group, or if
    it has none (MPI).

    Private: a group does not show its store, and a store of our own would need a port that all ranks know."""
    if not _runs():
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()  # its stub lacks ``timeout``
    if store is None:
        return None
    # torchrun's agent may keep one store over restarts: what an earlier attempt said must not be heard.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"fxckpt/attempt_{attempt}", store), store.timeout.total_seconds()


def has_host_group() -> bool:
    """Can ranks send each other what lies in host memory?"""
    return _runs() and (_sends_host_memory() or dist.is_gloo_available())


@contextmanager
def host_group() -> Iterator[Any]:
    """A group of all ranks that sends what lies in host memory: the default one if it does, else one of gloo for this block. All
    ranks enter it."""
    if _sends_host_memory():
        yield dist.group.WORLD
        return
    group = dist.new_group(backend="gloo")
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _sends_host_memory() -> bool:
    return "cpu:" in dist.get_backend_config()
