"""Names of parameters and buffers, relative to the model a user would save.

``torch.compile``, DDP and their kin wrap a model in a module of their own, and so put ``_orig_mod.`` or
``module.`` into every name. Such wrappers are recognised by type, never by their text: a user's own attribute
called ``module`` keeps its name. A tensor that is there twice (tied weights, a shared module) has the first
name a walk meets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from fxckpt.compat import modules
from fxckpt.compat.dynamo import called_modules, compiling_scope, first_module
from fxckpt.compat.modules import unwrap_model

T = TypeVar("T", bound=Tensor)

_KEYS = re.compile(r"\['?([^'\]]+)'?\]")


def named_parameters(root: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Each parameter of ``root`` once, with its clean FQN, in registration order."""
    return _once(modules.named_parameters(root))


def named_buffers(root: nn.Module, persistent: bool = True) -> list[tuple[str, Tensor]]:
    """Each buffer that ``state_dict`` would hold (or would not), once, with its clean FQN."""
    return _once((name, buffer) for name, buffer, kept in modules.named_buffers(root) if kept == persistent)


def _once(named: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """Each tensor under the first of its names."""
    found: dict[int, tuple[str, T]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


def find_roots(sources: Sequence[Any]) -> list[nn.Module]:
    """The models that the graph being compiled belongs to, to be asked inside a backend call.

    First the outermost module that is being called right now. Names relative to it are the same for every
    region of a model: after a graph break, for a submodule whose own frame is compiled, and for blocks that
    are compiled one by one (their own names would collide). Then, for a compiled function that no module
    calls (a whole training step), the first module on the path of each input: ``L['trainer'].model`` for one
    of its parameters.
    """
    found = [unwrap_model(module) for module in called_modules()[:1]]
    scope = compiling_scope()
    for source in sources:
        module = first_module(source, scope)
        if module is not None:
            found.append(unwrap_model(module))
    return _outermost(found)


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that are not part of an earlier one."""
    kept: list[nn.Module] = []
    known: set[int] = set()
    for module in modules:
        if id(module) in known:
            continue
        kept.append(module)
        known.update(id(m) for m in module.modules())
    return kept


def name_from_source(text: str) -> str:
    """The FQN that Dynamo's path to a tensor spells out: what is left where no model can be found.

    ``L['self']._modules['h']._modules['0']._parameters['weight']`` gives ``h.0.weight``.
    """
    at = re.search(r"\._(modules|parameters|buffers)\[", text)
    keys = _KEYS.findall(text[at.start() :] if at else "")
    return ".".join(keys) if keys else text
