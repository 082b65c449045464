"""What torch itself keeps among the attributes of a module, which are private names of its own and of its hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

OWN_NAMES: frozenset[str] = frozenset(vars(torch.nn.Module()))
"""What every module has: its mode, its hooks, its parameters and buffers."""


def plain_attributes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` of what a module's author keeps in it beside parameters, buffers and modules."""
    made = {name for hook in module._forward_pre_hooks.values() for name in _made_by(hook)}
    for name, value in vars(module).items():
        if name not in OWN_NAMES and name not in made:
            yield name, value


def is_registered(attributes: Mapping[str, Any], name: str) -> bool:
    """Is it a parameter, a buffer or a module of the module with these attributes? One of the same name would hide it."""
    return any(name in attributes[kind] for kind in ("_parameters", "_buffers", "_modules"))


def _made_by(hook: Any) -> Iterator[str]:
    """The attribute that a hook of torch's computes anew before each forward, from parameters: ``weight_norm``,
    ``spectral_norm`` and pruning keep its name."""
    if type(hook).__module__.startswith("torch.nn.utils."):
        for name in ("name", "_tensor_name"):
            if isinstance(found := getattr(hook, name, None), str):
                yield found
