"""Says what training changes and no checkpoint holds: schedulers, modules, tensors in attributes, iterators of loaders."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from fxckpt.compat.alive import alive, reached_from
from fxckpt.compat.loaders import ITERATOR
from fxckpt.compat.module_attributes import plain_attributes
from fxckpt.compat.module_state import keeps_more
from fxckpt.compat.modules import Several, every_module
from fxckpt.compat.tensors import is_transformed
from fxckpt.compat.wrappers import unwrapped
from fxckpt.graph.model.book import traces
from fxckpt.run.arrangement import Arrangement
from fxckpt.run.extra_state import Extra
from fxckpt.run.loader_watch import LoaderWatch
from fxckpt.run.module_values import named
from fxckpt.run.plain_loop import mark, mark_buffer
from fxckpt.saving.guard import glimpse

log: logging.Logger = logging.getLogger("fxckpt")

_LOOKS = 2  # checkpoints at which it looks
_LONGEST = 64  # elements of a container that are looked at
_NAMED = 5

Marks = dict[str, object]


class Strays:
    """Looks at what is alive in the process at the first checkpoint, and says at the second what changed in between."""

    def __init__(self, arrangement: Arrangement, extras: Sequence[Extra]):
        self._arrangement, self._extras = arrangement, extras
        self._left = _LOOKS
        self._alive: list[weakref.ref[Any]] = []  # what was at the first look; to find it takes tens of milliseconds
        self._loaders = LoaderWatch()
        self._modules: dict[int, tuple[weakref.ref[torch.nn.Module], Marks]] = {}
        self._attributes: Marks = {}

    def models(self) -> list[torch.nn.Module]:
        """The modules whose parameters and buffers its run's checkpoints have."""
        return traces.models.alive() if self._arrangement.model is None else [self._arrangement.model]

    def extras(self) -> list[object]:
        """What else they have."""
        return [each.live for each in self._extras if each.live is not None]

    def let_go(self) -> None:
        """There are no more checkpoints to look at."""
        self._left, self._extras = 0, ()

    def look(self, loaders: Sequence[Any] | None) -> None:
        """A checkpoint is taken. ``loaders``: those that ``fxckpt.batches`` goes over; None: no others matter."""
        if self._left == 0:
            return
        self._left -= 1
        if self._left == _LOOKS - 1:
            self._alive = [weakref.ref(each) for each in alive(Strays, LRScheduler, torch.nn.Module, ITERATOR)]
        found = [each for ref in self._alive if (each := ref()) is not None]
        runs = [each for each in found if type(each) is Strays]
        models = [module for each in runs for model in each.models() for _, module in every_module(model)]
        known = reached_from([extra for each in runs for extra in each.extras()], models)
        known |= {key for each in runs for key in each.tensors()}
        if loaders is not None:
            self._loaders.look([each for each in found if issubclass(type(each), ITERATOR)], loaders)
        self._look_at_attributes(known)
        self._look_at_modules([m for m in found if issubclass(type(m), torch.nn.Module) and type(m) is not Several], known)
        if self._left == 0:
            self._look_at_schedulers([each for each in found if issubclass(type(each), LRScheduler)], known)
            self._modules, self._attributes, self._alive = {}, {}, []

    def tensors(self) -> Iterator[int]:
        """What is in its run's checkpoints under a name, by ``id``."""
        inventory = self._arrangement.inventory
        for kind in (inventory.trained, inventory.frozen, inventory.buffers, inventory.transient):
            yield from map(id, kind.values())

    def _look_at_schedulers(self, found: Iterable[LRScheduler], known: set[int]) -> None:
        """Those of this run's optimizers that nobody named."""
        optimizers = {id(each) for each in self._arrangement.optimizers}
        strays = [each for each in found if id(unwrapped(vars(each).get("optimizer"))) in optimizers and id(each) not in known]
        inner = {id(part) for each in strays for part in vars(each).get("_schedulers", ())}
        if kinds := [type(each).__name__ for each in strays if id(each) not in inner]:
            log.warning(
                "fxckpt: %s: a scheduler of this run's optimizer is in no checkpoint, so a run that resumes would begin its "
                "schedule anew. Name it in extra=, as in extra={'scheduler': scheduler}",
                _some(kinds),
            )

    def _look_at_modules(self, found: Sequence[torch.nn.Module], known: set[int]) -> None:
        """Those that are no part of what is known, and whose own tensors change."""
        marks = {id(each): (weakref.ref(each), own) for each in found if id(each) not in known and (own := _own(each, known))}
        before, self._modules = self._modules, marks
        parents = {id(child): each for each in found for child in (vars(each).get("_modules") or {}).values()}
        moved: dict[int, str] = {}
        for key, (ref, own) in marks.items():
            was = before.get(key)
            changed = [name for name in own if was and was[0]() is ref() and was[1].get(name, own[name]) != own[name]]
            if changed and (module := ref()) is not None:
                outer = _outermost(module, parents)
                moved.setdefault(id(outer), f"{type(outer).__name__} ({type(module).__name__}.{changed[0]})")
        if moved:
            log.warning(
                "fxckpt: these modules change while this run trains, and are in no checkpoint: %s. A run that resumes would "
                "begin with those that the script makes. Give them to compile_step, as model=[model, other], or name them in "
                "extra=; it does not matter if no later step reads them",
                _some(moved.values()),
            )

    def _look_at_attributes(self, known: set[int]) -> None:
        """Tensors that modules of ``model=`` keep beside parameters and buffers."""
        model = self._arrangement.model
        now = {} if model is None else dict(_kept(model, known))
        before, self._attributes = self._attributes, now
        if self._left == 0 and (moved := [name for name, each in now.items() if before.get(name) != each]):
            log.warning(
                "fxckpt: these attributes of modules hold tensors that change while this run trains, and are in no checkpoint: "
                "%s. A run that resumes would begin without them, which does not matter if no later step reads them. Else make "
                "each a buffer (register_buffer), or name in extra= what holds it",
                _some(moved),
            )


def _own(module: torch.nn.Module, known: set[int]) -> Marks:
    """Marks of its own parameters and buffers that nobody knows."""
    attributes = vars(module)
    tensors = [*(attributes.get("_parameters") or {}).items(), *(attributes.get("_buffers") or {}).items()]
    return {name: _mark(each) for name, each in tensors if each is not None and id(each) not in known and _is_plain(each)}


def _kept(model: torch.nn.Module, known: set[int]) -> Iterator[tuple[str, object]]:
    """By name, marks of the tensors in plain attributes. A module with a state of its own says what is in that."""
    for name, module in every_module(model):
        if keeps_more(module):
            continue
        for attribute, value in plain_attributes(module):
            if tensors := [each for each in _tensors_in(value) if id(each) not in known and _is_plain(each)]:
                yield named(name or type(module).__name__, attribute), [_mark(each) for each in tensors]


def _tensors_in(value: Any, depth: int = 2) -> Iterator[torch.Tensor]:
    """A tensor, or those in a small container."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and type(value) in (tuple, list, dict) and len(value) <= _LONGEST:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each, depth - 1)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Has it memory of its own? One of a tracer or a transform has not, and that of a sharded one may be gone."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or is_transformed(tensor):
        return False
    strided = tensor.layout is torch.strided and not tensor.is_quantized
    return strided and tensor.untyped_storage().nbytes() >= tensor.nbytes


def _mark(tensor: torch.Tensor) -> object:
    """What differs once it was changed: ``.data`` and kernels of norms move no version."""
    small = tensor.nbytes <= 1 << 16
    return mark_buffer(tensor) if small else (mark(tensor), glimpse(tensor))


def _outermost(module: torch.nn.Module, parents: Mapping[int, torch.nn.Module]) -> torch.nn.Module:
    """What it is part of, and that is part of nothing."""
    seen = {id(module)}
    while (parent := parents.get(id(module))) is not None and id(parent) not in seen:
        seen.add(id(parent))
        module = parent
    return module


def _some(names: Iterable[str]) -> str:
    """The first of them."""
    each = sorted(set(names))
    return ", ".join(each[:_NAMED]) + (" ..." if len(each) > _NAMED else "")
