"""Does an optimizer's step change anything outside: globals, class attributes, random generators?

A rehearsal runs the step once more than training does, so it must leave nothing behind. What its code can reach is read from the
code itself, by name: that asks nothing of generators and globals that other threads use at the same time.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import operator
import random
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fxckpt.compat.optimizers import plain_class
from fxckpt.graph.update.trace import NotTraceable
from fxckpt.optim.rehearsal import values

MOST = 2000
"""Functions that are followed; more are refused."""


@dataclass
class Reach:
    """What a step's code may use: ``containers`` by the names of globals, ``classes`` whose attributes it may set."""

    containers: list[tuple[str, Any]] = field(default_factory=list)
    classes: tuple[type, ...] = ()


def reach(opt: torch.optim.Optimizer) -> Reach:
    """Follow the step through every function that it names, but PyTorch's. Raises NotTraceable if one of them sets a global or
    names a random generator."""
    cls = plain_class(opt)
    found = Reach(classes=tuple(c for c in cls.__mro__ if not _is_library(c.__module__)))
    todo = [function for c in cls.__mro__ for function in _functions(vars(c).get("step"))]
    seen: set[types.CodeType] = set()
    while todo:
        function = todo.pop()
        if function.__code__ in seen or _is_library(function.__globals__.get("__name__")):
            continue
        seen.add(function.__code__)
        if len(seen) > MOST:
            raise NotTraceable(f"its step reaches more than {MOST} functions")
        for name, value in _named(function, cls):
            if _is_random(value):
                raise NotTraceable(f"it may draw random numbers: it names {name!r}")
            if _is_container(value):
                found.containers.append((name, value))
            todo += _functions(value)
    return found


def _is_library(module: str | None) -> bool:
    """PyTorch's and Python's own modules are not followed."""
    top = (module or "").partition(".")[0]
    return top in ("torch", "numpy", "builtins") or top in sys.stdlib_module_names


def _named(function: types.FunctionType, cls: type) -> Iterator[tuple[str, Any]]:
    """Everything that the names in a function's code may stand for: globals, attributes of the class, of modules that it names,
    and what it holds in cells. Raises NotTraceable for a global that it sets."""
    codes, names, space = [function.__code__], dict[str, None](), function.__globals__
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        names |= dict.fromkeys(code.co_names)
        for step in dis.get_instructions(code):
            if step.opname == "IMPORT_NAME":
                yield step.argval, sys.modules.get(step.argval)
            if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                raise NotTraceable(f"it changes the global {step.argval!r} of {function.__module__}")
    modules = [v for n in names if isinstance(v := space.get(n), types.ModuleType)]
    for name in names:
        if name in space:
            yield name, space[name]
        yield name, inspect.getattr_static(cls, name, None)
        yield from ((name, vars(m).get(name)) for m in modules if m.__name__.partition(".")[0] != "torch")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # an empty one
            yield name, cell.cell_contents


def _is_random(value: Any) -> bool:
    """Is it a random generator, a method of one, or a module of them?"""
    kinds = random.Random, np.random.Generator, np.random.RandomState
    owner = getattr(value, "__self__", None)
    return isinstance(value, kinds) or isinstance(owner, kinds) or value is random or value is np.random


def _is_container(value: Any) -> bool:
    """Can its elements change?"""
    return type(value) in values.CONTAINERS and hasattr(value, "clear")


def _functions(value: Any) -> list[types.FunctionType]:
    """The Python functions behind a value: through decorators, methods, properties, partials and classes."""
    if isinstance(value, types.FunctionType):
        inner = getattr(value, "__wrapped__", None)
        return [value, *(_functions(inner) if inner is not None else ())]
    if isinstance(value, (staticmethod, classmethod)):
        return _functions(value.__func__)
    if isinstance(value, property):
        return _functions(value.fget)
    if isinstance(value, functools.partial):
        return _functions(value.func)
    if isinstance(value, type) and not _is_library(value.__module__) and not issubclass(value, torch.optim.Optimizer):
        return [f for each in vars(value).values() if not isinstance(each, type) for f in _functions(each)]
    return []


@contextlib.contextmanager
def none_outside(opt: torch.optim.Optimizer, found: Reach) -> Iterator[None]:
    """Raises NotTraceable, and puts it back, if an attribute of its classes or an element of a container that its code names
    changes meanwhile."""
    before = [(cls, dict(vars(cls))) for cls in found.classes]
    named = [*found.containers, *((k, v) for _, attributes in before for k, v in attributes.items())]
    held = [(name, value, value.copy()) for name, value in named if _is_container(value)]
    try:
        yield
    finally:
        changed = [name for cls, attributes in before for name in _put_back(cls, attributes)]
        for name, value, copied in held:
            if len(value) != len(copied) or not all(map(operator.is_, _elements(value), _elements(copied))):
                value.clear()
                (value.update if isinstance(value, (dict, set)) else value.extend)(copied)
                changed.append(name)
    if changed:
        raise NotTraceable(f"it changes {changed[0]!r}, which is not its own")


def _put_back(cls: type, attributes: dict[str, Any]) -> list[str]:
    """Names of the attributes of a class that are others than before; they are as before then."""
    now = dict(vars(cls))
    changed = [k for k in {**now, **attributes} if k not in now or k not in attributes or now[k] is not attributes[k]]
    for name in changed:
        setattr(cls, name, attributes[name]) if name in attributes else delattr(cls, name)
    return changed


def _elements(container: Any) -> Any:
    """What a container holds; a dict its keys and values."""
    return [*container, *container.values()] if isinstance(container, dict) else container
