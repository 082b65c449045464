"""Compile an update's body with Inductor: one kernel for every shape and depth.

An elementwise update does not see shapes, so it is compiled once over flat tensors of dynamic length, with several
*slots* in one call: a call costs about as much as updating 64x64 elements. Slots that a call does not need get tensors
of length zero. Scalars come in as 0-dim tensors; a Python float would be baked in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from fxckpt import _torch
from fxckpt.graph.hoist import Program
from fxckpt.graph.update import NotTraceable

log = logging.getLogger("fxckpt")

SLOTS = 8
"""Tensors per call. Measured, AdamW on two cores against the native fused step: 8 x 1024^2 takes 1.00 of its time with
one slot, 0.98 with four, 0.99 with eight; 200 x 64^2 takes 1.74, 1.04, 0.94; compiling takes 5.5, 6.4, 8.4 s."""

aten = torch.ops.aten



_TENSOR_FORMS: dict[Any, Callable[..., torch.Tensor]] = {
    # The Scalar overloads want a Python number; these compute the same formula, as eager's kernels write it.
    aten.lerp_.Scalar: lambda x, end, weight: x.add_((end - x) * weight),
    aten.lerp.Scalar: lambda x, end, weight: x + (end - x) * weight,
    aten.addcmul_.default: lambda x, a, b, value: x.add_(a * value * b),
    aten.addcmul.default: lambda x, a, b, value: x + a * value * b,
    aten.addcdiv_.default: lambda x, a, b, value: x.add_(a * value / b),
    aten.addcdiv.default: lambda x, a, b, value: x + a * value / b,
    aten.add_.Tensor: lambda x, y, alpha=None: x.add_(y if alpha is None else y * alpha),
    aten.add.Tensor: lambda x, y, alpha=None: x + (y if alpha is None else y * alpha),
    aten.sub_.Tensor: lambda x, y, alpha=None: x.sub_(y if alpha is None else y * alpha),
    aten.sub.Tensor: lambda x, y, alpha=None: x - (y if alpha is None else y * alpha),
    aten.mul_.Tensor: lambda x, y: x.mul_(y),
    aten.mul.Tensor: lambda x, y: x * y,
    aten.div_.Tensor: lambda x, y: x.div_(y),
    aten.div.Tensor: lambda x, y: x / y,
}


class _ScalarsAsTensors(fx.Interpreter):
    """Run a body with 0-dim tensors where it was traced with floats."""

    def __init__(self, body: fx.GraphModule, scalars: int):
        super().__init__(body)
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        self.moving = set(placeholders[len(placeholders) - scalars:])

    def run_node(self, n: fx.Node) -> Any:
        """Translate the operators that read a scalar, run the others as they are."""
        if n.op != "call_function" or not self.moving.intersection(n.all_input_nodes):
            return super().run_node(n)
        form = _TENSOR_FORMS.get(n.target)
        if form is None:
            raise NotTraceable(f"no tensor form of {n.target} with a changing scalar")
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return form(*args, **kwargs)


def scalar_dtype(dtype: torch.dtype) -> torch.dtype:
    """What eager kernels convert a Python scalar to: double for double, else single (their accumulation type)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compile_body(program: Program, slots: int = SLOTS) -> Callable[..., Any]:
    """Inductor's callable for ``slots`` tensors at once: ``(tensors of slot 0, of slot 1, ..., *scalars)``, all flat.

    Raises NotTraceable when a scalar reaches an operator that has no tensor form.
    """
    signature, width = program.signature, len(program.inputs)
    body = _ScalarsAsTensors(program.body, program.scalars)

    def update(*flat):
        scalars = flat[slots * width:]
        for i in range(slots):
            body.run(*flat[i * width:(i + 1) * width], *scalars)
        return ()

    # Lengths that differ from slot to slot (equal ones would become one symbol), none of them 0 or 1.
    example = [torch.empty(1024 + 96 * i + i, dtype=signature.dtype) for i in range(slots) for _ in range(width)]
    example += [torch.empty((), dtype=scalar_dtype(signature.dtype)) for _ in range(program.scalars)]
    return _torch.compile_flat(update, example)


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Do two tensors of one shape lie in memory in the same order? The strides of dimensions of size 1 mean nothing:
    a 1x1 convolution's gradient has others than its weight, and so has a momentum cloned from it."""
    return all(x == y for size, x, y in zip(a.shape, a.stride(), b.stride()) if size != 1)


def flat_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor's elements in storage order as one dimension, sharing memory; None if they are not dense."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    dense = same_layout(tensor, torch.empty_like(tensor, device="meta"))
    return torch.as_strided(tensor, (tensor.numel(),), (1,)) if dense else None


def flat_gradient(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient in the storage order of its parameter; copied only when its own order is another."""
    if not same_layout(grad, like) or grad.dtype != like.dtype:
        grad = torch.empty_like(like).copy_(grad)
    return flat_view(grad)


def pack(members: Sequence[Any], slots: int = SLOTS) -> list[Sequence[Any]]:
    """Cut a list into calls of at most ``slots``."""
    return [members[i:i + slots] for i in range(0, len(members), slots)]
