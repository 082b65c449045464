"""What modules keep beside registered tensors: modes, extra state, and what their own state dict methods and hooks add."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fxckpt.compat.modules import every_module, has_extra_state, unwrap_model

_MODULE = torch.nn.Module

_OTHER_FORMS = ("torchtitan.", "torch.distributed.fsdp.")
"""Where hooks are from that give parameters other names and forms in a state dict, and add nothing to them: torchtitan's take
fused projections apart, FSDP2's (on every module) see that parameters are sharded. To ask them at each checkpoint would copy
those, over all ranks."""


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """``modules``: extra state by module; ``eval``: the modules that are in eval mode; ``contracts``: by module, what its own
    ``state_dict()`` has beyond registered tensors."""
    every = every_module(model)  # one walk: large models have thousands
    contracts = own_contracts(model) if any(_has_contract(module) for _, module in every) else ()
    return {
        "modules": {name: module.get_extra_state() for name, module in every if has_extra_state(module)},
        "eval": [name for name, module in every if not module.training],
        "contracts": {name: added for name, module in contracts if (added := added_entries(module))},
    }


def mixed_modes(models: Iterable[torch.nn.Module]) -> list[str]:
    """The modules that are in another mode than the model they are part of."""
    return [name for model in models for name, module in every_module(model) if module.training != model.training]


def set_modes(model: torch.nn.Module, evaluating: set[str]) -> dict[bool, list[str]]:
    """Put every module into training or eval mode; returns the names of those that changed, by the mode they are in now. Not by
    ``train()``, which classes override."""
    changed: dict[bool, list[str]] = {True: [], False: []}
    for name, module in every_module(model):
        if module.training != (wanted := name not in evaluating):
            module.training = wanted
            changed[wanted].append(name or type(module).__name__)
    return changed


def own_contracts(model: torch.nn.Module, name: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """``(name, module)`` of the outermost modules whose state dict a class or a hook has a say in: it may hold more than the
    tensors that are registered. What is inside of such a one is its business: a hook sees the keys of all its children."""
    module = unwrap_model(model)
    if _has_contract(module):
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from own_contracts(child, f"{name}.{key}" if name else key)


def _has_contract(module: torch.nn.Module) -> bool:
    """Does something beside torch's own code make its state dict?"""
    kind = type(module)
    overridden = kind._save_to_state_dict is not _MODULE._save_to_state_dict or kind.state_dict is not _MODULE.state_dict
    hooks = [*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()]
    return overridden or "state_dict" in vars(module) or not all(map(_gives_other_forms, hooks))


def _gives_other_forms(hook: Any) -> bool:
    """Is it one of a package whose hooks add nothing?"""
    return str(getattr(hook, "__module__", "")).startswith(_OTHER_FORMS)


def keeps_more(module: torch.nn.Module) -> bool:
    """Does its class or a hook say what else than tensors is in its state dict?"""
    return has_extra_state(module) or _has_contract(module)


def added_entries(module: torch.nn.Module) -> dict[str, Any]:
    """What ``module.state_dict()`` has beyond extra state and registered tensors, be they under other names there."""
    registered = dict(_registered(module))
    places = {place for tensor in registered.values() if (place := _place(tensor)) is not None}
    return {
        key: value
        for key, value in module.state_dict().items()
        if key not in registered and not _is_extra_state(key) and (_place(value) is None or _place(value) not in places)
    }


def give_back(module: torch.nn.Module, entries: Mapping[str, Any]) -> None:
    """Have the module take what it had added, by its own ``load_state_dict``: its tensors must be in place. Whatever that raises
    goes up."""
    state = module.state_dict()  # with the versions that hooks look for, and what is in place already
    for key in [key for key in state if _is_extra_state(key)]:
        del state[key]
    state.update(entries)
    module.load_state_dict(state, strict=False)


def _registered(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by the keys of the module's own state dict, wrappers and all."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _is_extra_state(key: str) -> bool:
    """Is it the entry of ``get_extra_state``?"""
    return key.rpartition(".")[2] == "_extra_state"


def _place(value: Any) -> tuple[int, torch.dtype, torch.Size] | None:
    """What tells that two tensors are one; None for what is no dense tensor of memory."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or not value.numel():
        return None
    try:
        return value.data_ptr(), value.dtype, value.shape
    except RuntimeError:  # a subclass without memory of its own
        return None


def takes_shapes(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> bool:
    """Would the module's own ``_load_from_state_dict`` give its buffers the shapes of ``values``, as observers and codebooks do?
    Asked of a twin that shares no tensor with it, so nothing live changes. Its code may do anything, and raise anything."""
    if type(module)._load_from_state_dict is _MODULE._load_from_state_dict:
        return False
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    params = {name: None if p is None else torch.nn.Parameter(p.to("meta"), False) for name, p in module._parameters.items()}
    vars(twin).update(_buffers=buffers, _parameters=params, _load_state_dict_pre_hooks={})  # hooks know the live module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is copied to a meta tensor goes nowhere
            fill(twin, values)
    except Exception:
        return False
    now = {name: getattr(twin, name) for name in values}
    return all(isinstance(t, torch.Tensor) and (t.shape, t.dtype) == (values[n].shape, values[n].dtype) for n, t in now.items())


def fill(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Have the module's own ``_load_from_state_dict`` set these buffers. Raises RuntimeError with what it complains of."""
    held = {
        name: tensor.detach() for name, tensor in [*module._parameters.items(), *module._buffers.items()] if tensor is not None
    }
    problems: list[str] = []
    with torch.no_grad():
        state = {**held, **values}
        module._load_from_state_dict(state, "", {"version": module._version}, False, [], [], problems)
    if problems:
        raise RuntimeError("; ".join(problems))
