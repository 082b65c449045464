"""CRC-32C of a layer as a step left it: what a step that is made again is compared with."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch

from fxckpt.engine import crc32c
from fxckpt.saving.inventory import storable


def digest(tensors: Iterable[torch.Tensor]) -> int:
    """Of tensors in host memory, one after the other, each in row-major order."""
    crc = 0
    for tensor in tensors:
        row_major = storable(tensor).contiguous()
        if row_major.numel():
            crc = crc32c((ctypes.c_char * row_major.nbytes).from_address(row_major.data_ptr()), crc)
    return crc
