"""Numbers and random generators among the plain attributes of modules: a counter, an annealed rate, a mask's generator.

They are in no state dict, and a run that resumes would begin with those that a constructor set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import compress
from operator import is_not
from typing import Any, NamedTuple

import numpy as np
import torch

from fxckpt.compat.module_attributes import is_registered, plain_attributes
from fxckpt.compat.modules import every_module
from fxckpt.data.generators import GENERATORS, entry, global_generators, new_of, packed, read, write

log: logging.Logger = logging.getLogger("fxckpt")

Values = dict[str, dict[str, Any]]
"""By module and attribute."""


class _Begun(NamedTuple):
    """A module as it was when the run began. ``before``: numbers, and None, which may become one, or a generator."""

    name: str
    attributes: dict[str, Any]
    before: dict[str, Any]
    every: frozenset[str]


def named(module: str, attribute: str) -> str:
    """An attribute of a module by its name in the model."""
    return f"{module}.{attribute}" if module else attribute


def is_number(value: object) -> bool:
    """A number that comes back as it was: no enum, no tensor."""
    return type(value) in (bool, int, float) or isinstance(value, (np.number, np.bool_))


class ModuleValues:
    """Those of the modules of one model. All are looked at for each checkpoint: as flat lists, which are compared in C."""

    def __init__(self) -> None:
        self._begun: list[_Begun] = []
        self._flat: list[tuple[_Begun, dict[str, Any], str, Any]] = []  # each number
        self._columns: list[tuple[Any, ...]] = []  # the same, attributes and names and values
        self._keys: list[tuple[str, str]] = []  # of their marks
        self._generators: list[tuple[_Begun, str]] = []

    def begin(self, model: torch.nn.Module | None) -> None:
        """The run begins, as its script made the model; None: without one."""
        modules = {id(module): (name, module) for name, module in ([] if model is None else every_module(model))}
        self._begun = [_begun(name, module) for name, module in modules.values()]
        self._flat = [(each, each.attributes, key, value) for each in self._begun for key, value in each.before.items()]
        self._columns = [*zip(*self._flat)][1:]
        self._keys = [("number", named(each.name, key)) for each, _, key, _ in self._flat]
        shared = {id(each) for each in global_generators().values()}
        found = [(each, key, v) for each in self._begun for key, v in each.attributes.items() if isinstance(v, GENERATORS)]
        self._generators = [(each, key) for each, key, value in found if id(value) not in shared]

    def take(self) -> tuple[Values, Values]:
        """The numbers that differ from what they were then; kind and state of each generator."""
        touched = self._touched()
        generators: Values = {}
        for each, key in [*self._generators, *((module, key) for module in touched for key in _new_generators(module))]:
            if isinstance(live := each.attributes.get(key), GENERATORS):
                generators.setdefault(each.name, {})[key] = entry(live, packed(read(live)))
        return _without_empty({each.name: _differing(each) for each in touched}), generators

    def numbers(self) -> Values:
        """Those of ``take``."""
        return _without_empty({each.name: _differing(each) for each in self._touched()})

    def _touched(self) -> list[_Begun]:
        """The modules in which a number is not the very object that it was, or an attribute is new. There may be thousands."""
        attributes, names, values = self._columns or ((), (), ())
        other = map(is_not, map(dict.get, attributes, names), values)
        touched = {each[0].name: each[0] for each in compress(self._flat, other)}
        for each in self._begun:
            if len(each.attributes) != len(each.every):
                touched[each.name] = each
        return list(touched.values())

    def marks(self) -> dict[tuple[str, str], object]:
        """Of all numbers, for ``PlainLoop``."""
        attributes, names, _ = self._columns or ((), (), ())
        return {key: repr(value) for key, value in zip(self._keys, map(dict.get, attributes, names)) if _is_plain(value)}

    def set_numbers(self, saved: Values) -> None:
        """Put them back, and all others to what they were when the run began."""
        for each in self._begun:
            wanted = saved.get(each.name, {})
            for key in _differing(each).keys() - wanted.keys():
                if key in each.before:
                    each.attributes[key] = each.before[key]
                else:
                    del each.attributes[key]
            for key, value in wanted.items():
                if is_registered(each.attributes, key) or not _is_plain(each.attributes.get(key)):
                    log.warning("fxckpt: %s was %r, and is no number any more", named(each.name, key), value)
                else:
                    each.attributes[key] = value

    def set_generators(self, saved: Values) -> None:
        """Put them into their saved states. One that is made at its first use, and has not come yet, is made."""
        for each in self._begun:
            for key, state in saved.get(each.name, {}).items():
                live = each.attributes.get(key)
                if live is None:
                    live = each.attributes[key] = new_of(state["kind"])
                if not isinstance(live, GENERATORS) or entry(live, None)["kind"] != state["kind"]:
                    what = "fxckpt: %s is no random generator of the kind %s any more"
                    log.warning(what, named(each.name, key), state["kind"])
                    continue
                write(live, state["state"])


def _begun(name: str, module: torch.nn.Module) -> _Begun:
    """A module, as it is now."""
    kept = {key: value for key, value in plain_attributes(module) if _is_plain(value)}
    return _Begun(name, vars(module), kept, frozenset(vars(module)))


def _differing(each: _Begun) -> dict[str, Any]:
    """The numbers that are not what they were; None in place of one counts, and the other way round."""
    now = each.attributes
    found = {
        key: now[key] for key, value in each.before.items() if now.get(key, value) is not value and _is_other(value, now[key])
    }
    return found | {key: now[key] for key in _new(each) if is_number(now[key])}


def _new(each: _Begun) -> list[str]:
    """The attributes that were not there when the run began."""
    return [] if len(each.attributes) == len(each.every) else [key for key in each.attributes if key not in each.every]


def _without_empty(found: Values) -> Values:
    """The modules of which something was found."""
    return {name: values for name, values in found.items() if values}


def _is_plain(value: Any) -> bool:
    """A number, or None in place of one."""
    return value is None or is_number(value)


def _is_other(before: Any, now: Any) -> bool:
    """Is it another number, by its bits?"""
    if not (is_number(now) or (now is None and is_number(before))):
        return False
    return type(now) is not type(before) or repr(now) != repr(before)


def _new_generators(each: _Begun) -> Iterator[str]:
    """Those that were not there when the run began."""
    for key in [*(key for key, value in each.before.items() if value is None), *_new(each)]:
        if isinstance(each.attributes.get(key), GENERATORS):
            yield key
