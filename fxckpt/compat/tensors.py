"""Private facts about one tensor: its version, its wrappers, the autograd node that adds its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fxckpt.compat.spread import is_spread

set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled
"""What ``torch.no_grad`` calls on its way in and out: those seven Python calls take 40 µs when their code is cold."""


def is_transformed(tensor: torch.Tensor) -> bool:
    """Does the tensor belong to a transform of ``torch.func``? Such a one has no memory; nothing public tells."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor, or another view of its memory, was changed in place. Inference tensors do not count: always 0."""
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor; to ask each one first would cost twice
        return 0


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Is it a subclass that keeps its values in inner tensors (DTensor, torchao's quantized states)?"""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(tensor)


def gradient_accumulator(param: torch.Tensor) -> torch.autograd.graph.Node:
    """The autograd node that adds a gradient to ``param.grad``; DDP hooks it the same way. A hook on the tensor itself is visible
    to Dynamo; one on this node is not. It lives only while somebody holds it."""
    with torch.inference_mode(False), torch.enable_grad():
        behind: Any = param.view_as(param).grad_fn
        return behind.next_functions[0][0]


def gradient_node(param: torch.Tensor) -> Any:
    """Where ``on_gradient`` hooks a parameter. A DTensor itself: FSDP2 sets gradients past autograd's node, and calls the hooks
    for when one is there."""
    return param if is_spread(param) else gradient_accumulator(param)


def on_gradient(node: Any, told: Callable[..., None]) -> Any:
    """Have ``told`` called when a gradient reaches this ``gradient_node``, as long as that lives. Returns what takes it off."""
    return node.register_post_accumulate_grad_hook(told) if is_spread(node) else node.register_prehook(told)


def backward_under_way() -> int | None:
    """The number of the backward that runs in this thread, as its hooks do; None outside of one."""
    number = torch._C._current_graph_task_id()
    return None if number < 0 else number


def hooks_of(param: torch.Tensor) -> bool:
    """Has it hooks of its own, which see its gradient before or after it is added? Nothing public lists them."""
    return bool(param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None))


_Kind = TypeVar("_Kind", bound=torch.Tensor)

no_torch_function: Any = torch._C._disabled_torch_function_impl
"""The ``__torch_function__`` of a subclass whose ops reach ``__torch_dispatch__`` at once; the public way is a Python call."""


def shape_only(kind: type[_Kind], like: torch.Tensor) -> _Kind:
    """A tensor of a subclass with the shape of another and no memory. Nothing public makes one."""
    make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
    return make(kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device)


def leaves_of(tree: Any) -> list[Any]:
    """What lies in nested lists, tuples and dicts, as an op's arguments are; ``torch.utils._pytree`` is private by name only."""
    return torch.utils._pytree.tree_leaves(tree)
