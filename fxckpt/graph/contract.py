"""What a pass is: a function from a graph to a graph, with what it requires of the passes before it.

A pass is a public function ``xxx_pass(gm, …) -> gm`` that ends in :func:`finished`, unless it changes nothing. All contracts are
checked before the first pass runs: a list that cannot work fails with what is missing and who provides it, and not with a wrong
graph. ``FXCKPT_DISABLE_PASSES=native_calls,widen_to_lists`` switches passes off by name, as far as nobody requires them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from fxckpt.errors import SetupError

log: logging.Logger = logging.getLogger("fxckpt")

SWITCH = "FXCKPT_DISABLE_PASSES"
"""The variable that switches passes off: their names, separated by commas."""


class ContractError(SetupError):
    """A pass lacks what it requires, or its graph is not what it promises."""


@dataclass(frozen=True)
class Pass:
    """One pass with its contract: the facts about the graph that it requires and those that it provides."""

    function: Callable[..., fx.GraphModule]
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``place_fences`` of ``place_fences_pass``."""
        return self.function.__name__.removesuffix("_pass")


def finished(gm: fx.GraphModule) -> fx.GraphModule:
    """How each pass ends: its graph checked, and its code written anew."""
    gm.graph.lint()
    gm.recompile()
    return gm


def switched_off() -> set[str]:
    """The names in ``FXCKPT_DISABLE_PASSES``."""
    return {name.strip() for name in os.environ.get(SWITCH, "").split(",")} - {""}


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], given: Iterable[str] = (), wanted: Sequence[str] = ()
) -> fx.GraphModule:
    """``gm`` after these passes, less those that are switched off. ``given``: what is true of it already; ``wanted``: what its
    user requires. Raises ContractError before any pass runs."""
    chosen, given_gm = checked(passes, given, wanted), gm
    told = log.isEnabledFor(logging.DEBUG)
    code = gm.code.strip() if told else ""
    if not told:  # a graph's code takes longer to write than a pass: write it once, after the last of them
        vars(given_gm)["recompile"] = lambda: None
    try:
        for each in chosen:
            gm = each.function(gm, **each.arguments)
            if told:
                before, code = code, gm.code.strip()
                changed = "no change" if before == code else f"the graph before\n{before}\nand after\n{code}"
                log.debug("pass %s: %s", each.name, changed)
    finally:
        vars(given_gm).pop("recompile", None)
    gm.recompile()
    return gm


def checked(passes: Sequence[Pass], given: Iterable[str] = (), wanted: Sequence[str] = ()) -> list[Pass]:
    """The passes that are not switched off; raises ContractError where one of them, or the user, lacks what it requires."""
    off, have = switched_off(), set(given)
    chosen = [each for each in passes if each.name not in off]
    users = [(f"the pass {each.name}", each.requires, each.provides) for each in chosen]
    for who, requires, provides in [*users, ("whoever runs the result", wanted, ())]:
        for fact in requires:
            if fact not in have:
                raise ContractError(f"{who} requires {fact!r}, and {_who_provides(fact, passes, off)}")
        have.update(provides)
    return chosen


def _who_provides(fact: str, passes: Sequence[Pass], off: set[str]) -> str:
    """The end of the sentence above."""
    names = [each.name for each in passes if fact in each.provides]
    if not names:
        return "no pass of the list provides it"
    if set(names) <= off:
        return f"{', '.join(names)}, which provides it, is switched off by {SWITCH}"
    return f"{', '.join(names)}, which provides it, comes later"
