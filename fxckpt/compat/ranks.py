"""Which rank of how many this process is."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def world_size() -> int:
    """Ranks of this job: torch.distributed's if it runs, else what the launcher says."""
    return dist.get_world_size() if _runs() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank; 0 outside a distributed job."""
    return dist.get_rank() if _runs() else int(os.environ.get("RANK", "0"))


def _runs() -> bool:
    return dist.is_available() and dist.is_initialized()


def default_store() -> tuple[dist.Store, float] | None:
    """The key-value store by which this job's process group was made, and its timeout in seconds; None without a group.

    Private: a group does not show its store, and a store of our own would need a port that all ranks know."""
    if not _runs():
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()  # its stub lacks ``timeout``
    return store, store.timeout.total_seconds()
