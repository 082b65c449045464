"""The types of elements: what safetensors, torch and numpy call each, and its size. Stated here and nowhere else.

Torch's types go by their names (``bfloat16``), so that nothing imports torch to know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


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
    "C64": Dtype(8, "complex64"),
}
"""By safetensors' name: every type of whole bytes that a file may hold."""

PARTS: Mapping[str, str] = {"complex32": "F16", "complex64": "F32", "complex128": "F64", "<c8": "F32", "<c16": "F64"}
"""Torch's and numpy's complex types, which are written as pairs of real numbers of this type."""

_RARE = {"F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"}  # not every reader of safetensors knows these

OF_TORCH: Mapping[str, str] = {each.torch: name for name, each in DTYPES.items() if each.torch not in PARTS}
"""Torch's name of each type that is written as it is, and safetensors' name."""

OF_NUMPY: Mapping[str, str] = {each.numpy: name for name, each in DTYPES.items() if each.numpy is not None}
"""The same for numpy."""

OF_MODELS: Mapping[str, str] = {torch: name for torch, name in OF_TORCH.items() if name not in _RARE}
"""Of ``OF_TORCH``, what a model's parameters and buffers and an optimizer's state may have: any program can read that."""


def item_size(name: str) -> int:
    """Bytes per item of a safetensors type. Raises ``KeyError`` for what is none."""
    return DTYPES[name].nbytes


def numpy_dtype(name: str) -> np.dtype | None:
    """Numpy's type for a safetensors type, or None where this package knows none."""
    text = DTYPES[name].numpy
    return None if text is None else np.dtype(text)
