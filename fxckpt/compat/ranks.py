"""Which rank of how many this process is.

Feature tests: ``tests/project/test_torch_private.py``.
"""

from __future__ import annotations

import torch


def world_size() -> int:
    """Ranks of this job: torch.distributed's if it runs, else what the launcher says."""
    import os

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank; 0 outside a distributed job."""
    import os

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
