"""Refuses to leave out half of a model: what is trained must belong to a model that a checkpoint knows, or to no module."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxckpt.compat.modules import named_parameters, owners_of
from fxckpt.errors import SetupError
from fxckpt.graph.model.book import TraceBook
from fxckpt.saving.inventory import trained_by


def check_owned(model: torch.nn.Module | None, optimizers: Sequence[torch.optim.Optimizer], book: TraceBook) -> None:
    """Raise SetupError if a parameter of the optimizers lies in a live module that is in no model that was given or, without
    ``model=``, that no compiled graph has shown: its buffers, frozen parameters and modes would be in no checkpoint, and nobody
    would say so. A parameter of no module is complete by itself."""
    known = book.models.names_by_id() if model is None else {id(p) for _, p in named_parameters(model)}
    unknown = [p for p in trained_by(optimizers) if id(p) not in known]
    owners = owners_of(unknown) if unknown else {}
    if not owners:
        return
    kinds = {id(module): type(module).__name__ for module in owners.values()}
    whose = f"{len(owners)} trained parameters belong to a module that no checkpoint would know: {', '.join(kinds.values())}"
    lost = "Its buffers, its frozen parameters and the modes of its layers would begin anew after a restart"
    if model is not None:
        raise SetupError(f"{whose}. {lost}: give all that is trained, model=[a, b] or model={{'a': a, 'b': b}}")
    raise SetupError(
        f"{whose}. {lost}: nothing was given as model=, and torch.compile(..., backend=fxckpt.backend) has not compiled it. Pass "
        "model= to compile_step, for several models model=[a, b]"
    )
