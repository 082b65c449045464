"""Walks through the user's modules: inside torch's wrappers, the names of what they hold, and who holds a parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch

from fxckpt.compat.alive import alive
from fxckpt.compat.spread import sharded_parameters
from fxckpt.errors import SetupError

Models = torch.nn.Module | Sequence[torch.nn.Module] | Mapping[str, torch.nn.Module]
"""What ``model=`` takes."""

_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "CheckpointWrapper", "_checkpoint_wrapped_module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_original_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_original_module"),
)


_inner: WeakKeyDictionary[type, str] = WeakKeyDictionary()
"""By class, the attribute that holds the model inside; empty of a class that is no wrapper. Asked of each module at each
checkpoint."""


def wrapped_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """The model inside a wrapper of torch's or Fabric's, or None if it is no wrapper."""
    kind = type(module)
    attribute = _inner.get(kind)
    if attribute is None:
        attribute = _inner[kind] = _attribute_of(kind)
    return getattr(module, attribute) if attribute else None


def _attribute_of(kind: type) -> str:
    """These attributes are private. Their classes are looked up only where their module is imported already: nothing that exists
    can be of one that is not."""
    for where, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(where), name, None)
        if wrapper is not None and issubclass(kind, wrapper):
            return attribute
    return ""


def compiled_in_vain(model: object) -> str | None:
    """The class of a module of which ``torch.compile(DistributedDataParallel(module))`` compiles nothing: Dynamo compiles frames,
    leaves DDP's own to the interpreter, and looks at no forward that is defined in ``torch.nn`` when it is called from there."""
    compiled = False
    while isinstance(model, torch.nn.Module) and (inner := wrapped_module(model)) is not None:
        kind = type(model).__name__
        if compiled and kind == "DistributedDataParallel" and type(inner).__module__.startswith("torch.nn."):
            return type(inner).__name__
        compiled = compiled or kind == "OptimizedModule"
        model = inner
    return None


def own_buffers(module: torch.nn.Module, persistent: bool) -> list[tuple[str, torch.Tensor]]:
    """The module's own buffers that ``state_dict`` holds, or the others; nothing public tells them apart."""
    skipped = module._non_persistent_buffers_set
    return [(name, each) for name, each in module._buffers.items() if each is not None and (name not in skipped) == persistent]


class Several(torch.nn.Module):
    """Several models as one. It only points to them; a ``ModuleDict`` would refuse names that it has methods of."""

    def __init__(self, named: Mapping[str, torch.nn.Module]):
        super().__init__()
        self._modules.update(named)


def one_model(given: object) -> torch.nn.Module | None:
    """What was given as ``model=``, inside its wrappers, as one module whose names are those of a checkpoint: of several models
    as ``ModuleList`` and ``ModuleDict`` would name them. None if none was given. Raises SetupError for anything else."""
    if given is None or isinstance(given, torch.nn.Module):
        return None if given is None else unwrap_model(given)
    takes = "model= takes a torch.nn.Module, or a list or a dict of them"
    if not isinstance(given, (list, tuple, Mapping)):
        raise SetupError(f"{takes}; this is a {type(given).__name__}")
    named = dict(given) if isinstance(given, Mapping) else {str(at): each for at, each in enumerate(given)}
    for name, each in named.items():
        if not isinstance(each, torch.nn.Module):
            raise SetupError(f"{takes}; {name!r} is a {type(each).__name__}")
        if not isinstance(name, str) or not name or "." in name:
            raise SetupError(f"{takes} by names without dots, which its tensors' names begin with; one is called {name!r}")
    if not named:
        raise SetupError(f"{takes}; this {type(given).__name__} is empty")
    return Several(named)


def owners_of(params: Iterable[torch.Tensor]) -> dict[int, torch.nn.Module]:
    """By a parameter's ``id``, the outermost live module that it belongs to; those of no module are left out. A parameter does
    not know its module, so this looks at every object that the garbage collector knows, which takes some 50 ms."""
    wanted = {id(p) for p in params}
    parents: dict[int, torch.nn.Module] = {}
    found: dict[int, torch.nn.Module] = {}
    for each in alive(torch.nn.Module):
        if type(each) is Several:
            continue
        for child in (vars(each).get("_modules") or {}).values():
            parents.setdefault(id(child), each)
        for param in (vars(each).get("_parameters") or {}).values():
            if id(param) in wanted:
                found.setdefault(id(param), each)
    return {key: _outermost(module, parents) for key, module in found.items()}


def _outermost(module: torch.nn.Module, parents: Mapping[int, torch.nn.Module]) -> torch.nn.Module:
    """The module that this one is part of and that is part of none, inside torch's wrappers."""
    seen = {id(module)}
    while (parent := parents.get(id(module))) is not None and id(parent) not in seen:
        seen.add(id(parent))
        module = parent
    return unwrap_model(module)


def unwrap_model(model: torch.nn.Module) -> torch.nn.Module:
    """The user's module inside all wrappers, found by type and not by cutting text from names."""
    while (inner := wrapped_module(model)) is not None:
        model = inner
    return model


Walk = list[tuple[str, torch.nn.Module]]
"""What ``every_module`` finds. Several questions about one model at one instant are asked of one."""


def every_module(module: torch.nn.Module, name: str = "") -> Walk:
    """``(name, module)`` of every place where a module stands, under several names if it stands there several times. Wrappers
    inside the model (``torch.compile(block)`` in a list of blocks) take no part in names, so that a checkpoint does not depend on
    what was compiled. ``named_children`` would leave out what stands twice in one parent. Raises RecursionError for a module
    inside of itself, as ``Module.train`` does."""
    found: Walk = []
    _walk(module, name, found)
    return found


def _walk(module: torch.nn.Module, name: str, found: Walk) -> None:
    module = unwrap_model(module)
    found.append((name, module))
    if module._modules:
        within = f"{name}." if name else ""
        for key, child in module._modules.items():
            if child is not None:
                _walk(child, within + key, found)


def named_parameters(model: torch.nn.Module, walk: Walk | None = None) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """``(name, parameter)`` of every parameter, ties included, by the names of ``every_module``; of those that FSDP2 shards what
    the optimizer has. ``walk``: through this model, where it was made already."""
    sharded = sharded_parameters(model)
    for prefix, module in every_module(model) if walk is None else walk:
        for name, param in module._parameters.items():
            if param is not None:
                yield f"{prefix}.{name}" if prefix else name, sharded.get((id(module), name), param)


def places(walk: Walk) -> dict[str, tuple[Mapping[str, torch.Tensor | None], Mapping[str, torch.Tensor | None]]]:
    """By the names of the walk, what each module keeps its own parameters in, and its buffers."""
    return {name: (module._parameters, module._buffers) for name, module in walk}


def named_buffers(model: torch.nn.Module, walk: Walk | None = None) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """``(name, buffer, persistent)`` of every buffer, ties included, by the names of ``every_module``. ``walk`` as above."""
    for prefix, module in every_module(model) if walk is None else walk:
        if module._buffers:
            for persistent in (True, False):
                for name, buffer in own_buffers(module, persistent):
                    yield f"{prefix}.{name}" if prefix else name, buffer, persistent


def tensors_of(model: torch.nn.Module | None) -> set[int]:
    """Its parameters and buffers, by ``id``."""
    return set() if model is None else {id(t) for t in (*model.parameters(), *model.buffers())}


def extra_state_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """``(name, module)`` of modules that keep more than tensors in their state dict (``get_extra_state``)."""
    for name, module in every_module(model):
        if has_extra_state(module):
            yield name, module


def has_extra_state(module: torch.nn.Module) -> bool:
    """Does its class keep more than tensors by ``get_extra_state``?"""
    return type(module).get_extra_state is not torch.nn.Module.get_extra_state
