"""All bytes of a tensor, of which ranks may have parts."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> bytes:
    """On every rank; all must ask."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().contiguous().numpy().tobytes()


def local(tensor: torch.Tensor) -> bytes:
    """Those that this rank has."""
    found = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found.detach().contiguous().numpy().tobytes()
