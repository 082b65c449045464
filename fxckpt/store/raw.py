"""A dense tensor as bytes, whichever library it is of: what a file of the extra state, or a message, holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fxckpt.store.dtypes import OF_NUMPY, OF_TORCH, PARTS

if TYPE_CHECKING:
    import torch

Tensor: TypeAlias = "np.ndarray | torch.Tensor | RawTensor"
"""What can be written: a numpy array, a torch tensor on the CPU, or bytes."""


@dataclass(frozen=True)
class RawTensor:
    """A dense row-major tensor of safetensors type ``dtype`` as bytes, whether or not numpy knows the type."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def raw_tensor(value: Tensor) -> RawTensor:
    """A numpy array, CPU torch tensor or ``RawTensor`` as bytes, in place if contiguous. Complex ones as real pairs."""
    if isinstance(value, RawTensor):
        return value
    if isinstance(value, np.ndarray):
        return _raw_array(value)
    name = str(value.dtype).removeprefix("torch.")
    real, torch = value.detach(), sys.modules["torch"]
    if name in PARTS:
        real = torch.view_as_real(real.resolve_conj())
    dense = real.resolve_neg().contiguous().reshape(-1)  # where there is one element, with any stride
    flat = dense.as_strided(dense.shape, (1,)).view(torch.uint8).numpy()
    return RawTensor(PARTS.get(name) or OF_TORCH[name], tuple(real.shape), flat.data)


def _raw_array(array: np.ndarray) -> RawTensor:
    """A numpy array as bytes; types that safetensors lacks are complex (real pairs) or kept as U8 (dates, text, …)."""
    name, dense = array.dtype.str, np.ascontiguousarray(array).reshape(-1)
    shape = (*array.shape, 2) if name in PARTS else array.shape if name in OF_NUMPY else (array.nbytes,)
    data = dense.view(np.uint8) if array.size else np.empty(0, np.uint8)
    return RawTensor(PARTS.get(name) or OF_NUMPY.get(name, "U8"), tuple(shape), data.data)
