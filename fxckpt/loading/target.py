"""What a load restores into: the live objects of a run, or those that it was given."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fxckpt.compat.modules import Models, one_model, tensors_of
from fxckpt.compat.wrappers import unwrapped
from fxckpt.errors import SetupError
from fxckpt.graph.model.book import traces
from fxckpt.optim.contract.contract import Contract
from fxckpt.run import extra_state
from fxckpt.run.run import Run, live_runs, the_run
from fxckpt.saving.inventory import Inventory, take
from fxckpt.store.directory import local_path

StrPath = str | os.PathLike[str]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Target:
    """Live tensors by name, optimizers and extras; ``run`` if there is one."""

    inventory: Inventory
    optimizers: Sequence[torch.optim.Optimizer]
    extras: Sequence[extra_state.Extra]
    asked: bool  # for extras: else those of the checkpoint are nobody's business
    run: Run | None
    model: torch.nn.Module | None
    contracts: Sequence[Contract]  # of the optimizers


def find_target(
    directory: StrPath | None,
    model: Models | None,
    optimizer: Optimizers | None,
    extra: Mapping[str, object] | None,
) -> tuple[Target, str]:
    """What to restore into, and the directory to load from. Raises SetupError if that cannot be told."""
    place = None if directory is None else local_path(directory)
    asked = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    given = [unwrapped(each) for each in asked]
    run = _find_run(place, model, given)
    if run is not None:
        extras = run.capture.extras if extra is None else extra_state.extras(extra)
        module = run.arrangement.model if model is None else one_model(model)
        inventory = take(module, run.optimizers, traces)
        return Target(
            inventory, run.optimizers, extras, True, run, module, run.capture.contracts
        ), run.directory if place is None else place
    if place is None:
        raise SetupError("say which directory to load from")
    module = one_model(model)
    inventory = take(module, given, traces)
    contracts = [Contract(opt, tensors_of(module)) for opt in given]
    return Target(inventory, given, extra_state.extras(extra), extra is not None, None, module, contracts), place


def _find_run(place: str | None, model: Models | None, given: Sequence[torch.optim.Optimizer]) -> Run | None:
    """The run of these optimizers; without any, the only one, or the only one that checkpoints there."""
    run = next((each.ckpt._run for each in given if hasattr(each, "ckpt")), None)
    if run is not None or given:
        return run
    if place is None:
        return the_run()
    if model is not None:
        return None
    matching = [run for run in live_runs if os.path.abspath(run.directory) == os.path.abspath(place)]
    if len(matching) != 1:
        raise SetupError(f"load({place!r}): no run checkpoints there; pass model= (and optimizer=) to say what to load into")
    return matching[0]
