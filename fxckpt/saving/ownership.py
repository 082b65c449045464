"""Refuses to leave out half of a model: what is trained must belong to a model that a checkpoint knows, or to no module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fxckpt.compat.module_state import mixed_modes, state_of
from fxckpt.compat.modules import named_parameters, owners_of
from fxckpt.errors import LayoutMismatch, SetupError
from fxckpt.graph.model.book import TraceBook
from fxckpt.saving.inventory import is_position, trained_by


def check_owned(model: torch.nn.Module | None, optimizers: Sequence[torch.optim.Optimizer], book: TraceBook) -> None:
    """Raise SetupError if a parameter of the optimizers lies in a live module that is in no model that was given or, without
    ``model=``, that no compiled graph has shown: its buffers, frozen parameters and modes would be in no checkpoint, and nobody
    would say so. A parameter of no module is complete by itself."""
    trained = {id(p): p for p in trained_by(optimizers)}
    known = book.models.names_by_id() if model is None else {id(p) for _, p in named_parameters(model)}
    unknown = [p for key, p in trained.items() if key not in known]
    owners = owners_of(unknown) if unknown else {}
    if model is None:
        named = _named(optimizers)
        owners = {key: each for key, each in owners.items() if key not in named or _keeps_more(each, trained)}
    if not owners:
        return None if model is not None else _check_shown(trained, book)
    kinds = {id(module): type(module).__name__ for module in owners.values()}
    whose = f"{len(owners)} trained parameters belong to a module that no checkpoint would know: {', '.join(kinds.values())}"
    lost = "Its buffers, its frozen parameters and the modes of its layers would begin anew after a restart"
    if model is not None:
        raise SetupError(f"{whose}. {lost}: give all that is trained, model=[a, b] or model={{'a': a, 'b': b}}")
    raise SetupError(
        f"{whose}. {lost}: nothing was given as model=, and torch.compile(..., backend=fxckpt.backend) has not compiled it yet. "
        "Pass model= to compile_step, for several models model=[a, b]"
    )


def _named(optimizers: Sequence[torch.optim.Optimizer]) -> set[int]:
    """The parameters that were given to their optimizer by name."""
    groups = [group for opt in optimizers for group in opt.param_groups if "param_names" in group]
    return {id(p) for group in groups for p in group["params"]}


def _keeps_more(module: torch.nn.Module, trained: Mapping[int, torch.Tensor]) -> bool:
    """Has it anything but these parameters that a checkpoint would have to hold?"""
    state = state_of(module)
    others = any(id(p) not in trained for p in module.parameters()) or any(True for _ in module.buffers())
    return others or bool(state["modules"] or state["contracts"] or mixed_modes([module]))


def _check_shown(trained: Mapping[int, torch.Tensor], book: TraceBook) -> None:
    """Raise SetupError if a compiled model keeps more than tensors, which nobody could give back before its first forward."""
    for model in book.models.alive():
        if any(id(p) in trained for p in model.parameters()):
            state = state_of(model)
            if found := [*state["modules"], *state["contracts"]]:
                kept = f"{found[0]!r} of this {type(model).__name__} keeps more than tensors in its state dict"
                raise SetupError(f"{kept}, which is in the checkpoints only with model=: pass it to compile_step")


def check_names(expected: Mapping[str, str]) -> None:
    """``expected``: names of a checkpoint whose tensors went to others by their place in the optimizers, and what those turn out
    to be called. Raises LayoutMismatch if they are two names: the place may be wrong, too."""
    found = {old: new for old, new in expected.items() if old != new and not is_position(old) and not is_position(new)}
    if found:
        what = "parameters were loaded by their place in the optimizers, and have other names than those in the checkpoint"
        pairs = [f"  checkpoint {old}, live {new}" for old, new in list(found.items())[:10]]
        raise LayoutMismatch("\n".join([f"{what}. Pass model= to compile_step, so that they are loaded by name:", *pairs]))
