"""Optimizers that hold others, and whether a checkpoint of the inner one alone would be enough."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fxckpt.compat.optimizers import callers, forwards, plain_class
from fxckpt.errors import SetupError
from fxckpt.optim.contract.pack import Packer, Unstorable


def held_by(opt: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizers in its attributes, or in lists and dicts there."""
    for value in list(vars(opt).values()):
        each = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        yield from (v for v in each if isinstance(v, torch.optim.Optimizer) and v is not opt)


def refuse_inner(opt: torch.optim.Optimizer) -> None:
    """Raise SetupError if the step under way is made by another optimizer that holds ``opt`` and keeps state of its own (slow
    weights, a count): no checkpoint of ``opt`` has it."""
    for outer in callers(opt):
        if any(inner is opt for inner in held_by(outer)) and not forwards(outer) and _keeps_state(outer, opt):
            name, inner = plain_class(outer).__name__, plain_class(opt).__name__
            raise SetupError(
                f"this {inner} is stepped by a {name} (of {plain_class(outer).__module__}) that holds it and keeps state of its "
                f"own, which no checkpoint of the {inner} has. Call compile_step on the {name}: its checkpoints hold both"
            )


def _keeps_state(outer: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> bool:
    """Does it keep anything but the inner optimizer?"""
    if getattr(outer, "state", None) and outer.state is not inner.state:
        return True
    try:
        nodes = Packer(outer).attributes(outer)
    except Unstorable:
        return True
    return any(kind not in ("optimizer", "fixed", "same") for node in nodes.values() for kind in node)
