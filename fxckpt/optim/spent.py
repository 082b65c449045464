"""What stands in ``param.grad`` once an update inside the backward has used it up: a tensor without memory, which says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from fxckpt.compat.tensors import leaves_of, no_torch_function, shape_only
from fxckpt.errors import SetupError


class SpentGradient(torch.Tensor):
    """Has the shape of its parameter and no values. Whatever reads it, or adds to it, raises SetupError with the layer's name."""

    layer: str

    __torch_function__ = no_torch_function

    @staticmethod
    def __new__(cls, param: torch.Tensor, layer: str) -> SpentGradient:
        spent = shape_only(cls, param)
        spent.layer = layer
        return spent

    def __init__(self, *_: object) -> None:
        """All is made by ``__new__``."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> NoReturn:
        leaves = leaves_of((args, kwargs))
        raise _used(next(leaf.layer for leaf in leaves if isinstance(leaf, SpentGradient)), str(func))

    def tolist(self) -> NoReturn:
        raise _used(self.layer, "tolist")

    def numpy(self, *, force: bool = False) -> NoReturn:
        raise _used(self.layer, "numpy")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SpentGradient({self.layer!r}, shape={tuple(self.shape)})"


def _used(layer: str, by: str) -> SetupError:
    """The error that says which layer's gradient it was, and what to do."""
    return SetupError(
        f"the gradient of layer {layer!r} was used up inside the backward, and {by} needs it: with "
        'updates="in_backward" a layer is updated as soon as its gradient is final, and its memory is given back. Loops that '
        'read or add up gradients need updates="after_backward"'
    )
