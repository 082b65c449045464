"""The types of elements: what safetensors, torch and numpy call each, and its size; dense tensors of them as bytes.

Torch's types go by their names (``bfloat16``), so that nothing imports torch to know them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch


class Dtype(NamedTuple):
    """One type: bytes per item, torch's name, and numpy's (``dtype.str``) if there is one."""

    nbytes: int
    torch: str
    numpy: str | None = None


DTYPES: Mapping[str, Dtype] = {
    "BOOL": Dtype(1, "bool", "|b1"),
    "U8": Dtype(1, "uint8", "|u1"),
    "I8": Dtype(1, "int8", "|i1"),
    "F8_E4M3": Dtype(1, "float8_e4m3fn"),
    "F8_E4M3FNUZ": Dtype(1, "float8_e4m3fnuz"),
    "F8_E5M2": Dtype(1, "float8_e5m2"),
    "F8_E5M2FNUZ": Dtype(1, "float8_e5m2fnuz"),
    "F8_E8M0": Dtype(1, "float8_e8m0fnu"),
    "I16": Dtype(2, "int16", "<i2"),
    "U16": Dtype(2, "uint16", "<u2"),
    "F16": Dtype(2, "float16", "<f2"),
    "BF16": Dtype(2, "bfloat16"),
    "I32": Dtype(4, "int32", "<i4"),
    "U32": Dtype(4, "uint32", "<u4"),
    "F32": Dtype(4, "float32", "<f4"),
    "I64": Dtype(8, "int64", "<i8"),
    "U64": Dtype(8, "uint64", "<u8"),
    "F64": Dtype(8, "float64", "<f8"),
    "C64": Dtype(8, "complex64", "<c8"),
}
"""By safetensors' name: every type of whole bytes that a file may hold."""

PARTS: Mapping[str, str] = {"complex32": "F16", "complex128": "F64", "<c16": "F64"}
"""Torch's and numpy's complex types that safetensors lacks: written as pairs of real numbers of this type. Earlier versions wrote
complex64 so, too."""

OF_TORCH: Mapping[str, str] = {each.torch: name for name, each in DTYPES.items() if each.torch not in PARTS}
"""Torch's name of each type that is written as it is, and safetensors' name. Not every reader of safetensors knows the rarer
8-bit floats; a file without them is no matter to it."""

OF_NUMPY: Mapping[str, str] = {each.numpy: name for name, each in DTYPES.items() if each.numpy is not None}
"""The same for numpy."""


def item_size(name: str) -> int:
    """Bytes per item of a safetensors type. Raises ``KeyError`` for what is none."""
    return DTYPES[name].nbytes


def numpy_dtype(name: str) -> np.dtype | None:
    """Numpy's type for a safetensors type, or None where this package knows none."""
    text = DTYPES[name].numpy
    return None if text is None else np.dtype(text)


Tensor: TypeAlias = "np.ndarray | torch.Tensor | RawTensor"
"""What can be written: a numpy array, a torch tensor on the CPU, or bytes."""


@dataclass(frozen=True)
class RawTensor:
    """A dense row-major tensor of safetensors type ``dtype`` as bytes, whether or not numpy knows the type."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def raw_tensor(value: Tensor) -> RawTensor:
    """A numpy array, CPU torch tensor or ``RawTensor`` as bytes, in place if contiguous; what is in ``PARTS`` as real pairs."""
    if isinstance(value, RawTensor):
        return value
    if isinstance(value, np.ndarray):
        return _raw_array(value)
    name = str(value.dtype).removeprefix("torch.")
    real, torch = value.detach().resolve_conj(), sys.modules["torch"]
    if name in PARTS:
        real = torch.view_as_real(real)
    dense = real.resolve_neg().contiguous().reshape(-1)  # where there is one element, with any stride
    flat = dense.as_strided(dense.shape, (1,)).view(torch.uint8).numpy()
    return RawTensor(PARTS.get(name) or OF_TORCH[name], tuple(real.shape), flat.data)


def _raw_array(array: np.ndarray) -> RawTensor:
    """A numpy array as bytes; types that safetensors lacks are wide complex ones (real pairs) or kept as U8 (dates, text, …)."""
    name, dense = array.dtype.str, np.ascontiguousarray(array).reshape(-1)
    shape = (*array.shape, 2) if name in PARTS else array.shape if name in OF_NUMPY else (array.nbytes,)
    data = dense.view(np.uint8) if array.size else np.empty(0, np.uint8)
    return RawTensor(PARTS.get(name) or OF_NUMPY.get(name, "U8"), tuple(shape), data.data)
