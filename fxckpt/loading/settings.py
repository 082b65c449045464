"""Says which settings of optimizers a script gives otherwise than it did before: after a restart the checkpoint's are used."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fxckpt.loading.schema import Saved
from fxckpt.optim.given import what_changed
from fxckpt.run.run import Run

log: logging.Logger = logging.getLogger("fxckpt")


def say_what_changed(saved: Saved, step: int, run: Run) -> None:
    """Name, in the life in which they came, settings that the script gives and did not give before: the checkpoint's are used."""
    for old, stepper in zip(saved.optimizers, run.steppers):
        if found := what_changed(old.get("given", ()), stepper.given):
            log.warning(
                "fxckpt: the script now says %s for %s, but what it had at step %d goes on: %s. Set opt.param_groups after "
                "load() to change it",
                ", ".join(found), old["class"], step, _in_force(found, stepper.opt),
            )  # fmt: skip


def _in_force(found: Sequence[str], opt: torch.optim.Optimizer) -> str:
    """The settings that are named there, as they are now."""
    names = dict.fromkeys(each.partition("=")[0] for each in found)
    values = {name: list(dict.fromkeys(repr(group.get(name)) for group in opt.param_groups)) for name in names}
    return ", ".join(f"{name}={' and '.join(each)}" for name, each in values.items())
