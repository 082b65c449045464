"""CUDA: which device a tensor lies on, which stream that device trains on, and whether a graph is being captured.

Copies and waits are the engine's: in its threads, and in the committer's, torch's CUDA runtime is not called. This is the seam
for tests, too. Nothing here is initialised unless a tensor of the run lies on a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from fxckpt.errors import SetupError

STAGING = 256 << 20
"""Bytes of pinned memory, unless staging_mb says otherwise: a bus copies faster than a disk writes, and a fence waits on the host
only when no chunk is free for a layer's copy."""

LEAST_CHUNKS = 8
"""A chunk that several layers share holds its buffer until the last of them; with fewer there might be none for others."""


class Devices:
    """The CUDA devices of a run. ``driver``: the library to open, ``$FXCKPT_CUDA_DRIVER`` or ``libcuda.so.1``."""

    def __init__(self) -> None:
        self.driver: str | None = os.environ.get("FXCKPT_CUDA_DRIVER") or None

    def of(self, tensor: torch.Tensor) -> int | None:
        """The driver's number of the device the tensor lies on; None for host memory. torch numbers devices as the driver does:
        both see what CUDA_VISIBLE_DEVICES leaves, MIG instances included."""
        return tensor.device.index if tensor.device.type == "cuda" else None

    def is_on_one(self, tensor: torch.Tensor) -> bool:
        """Does it lie on a device?"""
        return self.of(tensor) is not None

    def all_of(self, tensors: Iterable[torch.Tensor]) -> set[int]:
        """The devices that these tensors lie on."""
        return {found for found in map(self.of, tensors) if found is not None}

    def streams(self, ordinals: Iterable[int]) -> dict[int, int]:
        """The driver's handle of each device's *current* stream: the one that an update of this step is put into."""
        return {ordinal: torch.cuda.current_stream(ordinal).cuda_stream for ordinal in ordinals}

    def name(self, ordinal: int) -> str:
        """What the device is called."""
        return torch.cuda.get_device_name(ordinal)

    def there(self) -> torch.device | None:
        """A device on which something can be computed; None if there is none."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    def capturing(self) -> bool:
        """Is a CUDA graph being captured on the current stream?"""
        return torch.cuda.is_current_stream_capturing()


def check(tensor: torch.Tensor) -> None:
    """Raises SetupError for a tensor on a device that cannot be copied from."""
    kind = tensor.device.type
    if kind == "cpu" or (kind == "cuda" and torch.version.hip is None):
        return
    name = "ROCm" if kind == "cuda" else kind
    raise SetupError(
        f"fxckpt checkpoints tensors on the CPU and on CUDA devices; found one on {tensor.device} ({name}). "
        "Set FXCKPT_DISABLE=1 to run without checkpoints."
    )


def count_values(counts: Sequence[Sequence[torch.Tensor]]) -> list[tuple[float, ...]]:
    """The values of 0-dimensional tensors, row by row; those on a device with one wait for each device and type."""
    flat = [t for row in counts for t in row]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(flat):
        if tensor.device.type != "cpu":
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    values: dict[int, float] = {}
    for members in groups.values():
        values.update(zip(members, torch.stack([flat[i].detach().reshape(()) for i in members]).tolist()))
    found = iter(values[i] if i in values else t.item() for i, t in enumerate(flat))
    return [tuple(next(found) for _ in row) for row in counts]
