"""Walks through the user's modules: inside torch's wrappers, and the names of what they hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper", "_checkpoint_wrapped_module"),
)


def wrapped_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """The model inside torch's own wrapper ``module``, or None if it is no wrapper. The attributes that hold it are private; the
    types are looked up only where their module is imported already."""
    for where, name, attribute in _WRAPPERS:
        kind = getattr(sys.modules.get(where), name, None)
        if kind is not None and isinstance(module, kind):
            return getattr(module, attribute)
    return None


def own_buffers(module: torch.nn.Module, persistent: bool) -> list[tuple[str, torch.Tensor]]:
    """The module's own buffers that ``state_dict`` holds, or the others; nothing public tells them apart."""
    skipped = module._non_persistent_buffers_set
    own = module.named_buffers(recurse=False, remove_duplicate=False)
    return [(name, tensor) for name, tensor in own if (name not in skipped) == persistent]


def unwrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """The user's module inside all wrappers, found by type and not by cutting text from names."""
    while (inner := wrapped_module(model)) is not None:
        model = inner
    return model


def every_module(module: torch.nn.Module, name: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """``(name, module)`` of every place where a module stands, under several names if it stands there several times. Wrappers
    inside the model (``torch.compile(block)`` in a list of blocks) take no part in names, so that a checkpoint does not depend on
    what was compiled. ``named_children`` would leave out what stands twice in one parent."""
    module = unwrap_model(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from every_module(child, f"{name}.{key}" if name else key)


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """``(name, parameter)`` of every parameter, ties included, by the names of ``every_module``."""
    for prefix, module in every_module(model):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, param


def named_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """``(name, buffer, persistent)`` of every buffer, ties included, by the names of ``every_module``."""
    for prefix, module in every_module(model):
        for persistent in (True, False):
            for name, buffer in own_buffers(module, persistent):
                yield f"{prefix}.{name}" if prefix else name, buffer, persistent


def tensors_of(model: torch.nn.Module | None) -> set[int]:
    """Its parameters and buffers, by ``id``."""
    return set() if model is None else {id(t) for t in (*model.parameters(), *model.buffers())}


def extra_state_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """``(name, module)`` of modules that keep more than tensors in their state dict (``get_extra_state``)."""
    for name, module in every_module(model):
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            yield name, module
