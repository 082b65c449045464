"""One training by torchtitan: where its boundaries are, what is kept of it, and how it goes on.

A boundary is the instant at which the trainer fetches the first batch behind a ``save()``: its step is complete then, with what
stands behind ``save()`` in a turn (validation, which draws random numbers). The counters of the trainer itself are a step ahead
by then, so they are noted in ``save()``. The last step has no fetch behind it: its boundary is in ``save()``.

A process that resumes makes its iterator behind ``load()``, which draws a random number. So the turns begin at the first fetch,
where the generators are put back once more.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fxckpt.compiled_optimizer import compile_step
from fxckpt.errors import SetupError
from fxckpt.handle import Handle
from fxckpt.loading.load import load
from fxckpt.loop import steps
from fxckpt.titan.checks import DATALOADER, LR_SCHEDULER, check
from fxckpt.titan.feed import let_go, watch

log: logging.Logger = logging.getLogger("fxckpt")

_ENDLESS = 1 << 62
_FEW = 2  # checkpoints that come and go, where others are kept for good


@dataclass(frozen=True)
class Given:
    """What the Trainer gives its checkpoint manager, as ``CheckpointManager`` describes it."""

    dataloader: Any
    model_parts: list[Any]
    optimizers: Any
    lr_schedulers: Any
    states: dict[str, Any]
    sd_adapter: Any
    base_folder: str


class Kept:
    """An object with a state, as a checkpoint has it: what it is now while ``live``, else what was noted. ``loads``: a load
    changes it."""

    def __init__(self, of: Any, live: bool, loads: bool):
        self.live = live
        self._of, self._loads = of, loads
        self._noted: Any = None

    def note(self) -> None:
        """What it is now is what a checkpoint is of."""
        self._noted = self._of.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """``state``: its own; None before any was noted."""
        return {"state": self._of.state_dict() if self.live else self._noted}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put it back, unless it is to stay as it is."""
        if self._loads and saved["state"] is not None:
            self._of.load_state_dict(saved["state"])
            self._noted = saved["state"]


class Training:
    """Made with the Trainer, when its optimizers and schedulers are there; ``end`` finishes it."""

    def __init__(self, config: Any, given: Given):
        check(config, given.model_parts, given.dataloader, given.states)
        self._config, self._given = config, given
        folder = os.path.join(given.base_folder, config.folder)
        excluded = config.exclude_from_loading
        self._noted = {name: Kept(each, False, name not in excluded) for name, each in given.states.items()}
        self._note()
        # To ask a loader for its state makes an iterator, which draws a random number: not before the trainer has made it.
        self._loader = Kept(given.dataloader, False, DATALOADER not in excluded)
        schedulers = Kept(given.lr_schedulers, True, LR_SCHEDULER not in excluded)
        kept = {DATALOADER: self._loader, LR_SCHEDULER: schedulers, **self._noted}
        optimizers = list(given.optimizers)
        forever = config.keep_latest_k == 0
        compile_step(
            optimizers, folder, model=given.model_parts[0], extra=kept, every=config.interval,
            keep=_FEW if forever else config.keep_latest_k, keep_every=config.interval if forever else None,
            update=config.update, on_error=config.on_error, on_divergence=config.on_divergence, read_back=config.read_back,
            preset=config.preset,
        )  # fmt: skip
        self._optimizer = optimizers[-1]
        self.handle: Handle = self._optimizer.ckpt
        self._turns: Iterator[int] | None = None
        self._over = False  # a step that no boundary has come behind
        self._begun = self._fetched = 0  # steps that were made at the last boundary, and when a batch was fetched last
        self.handle._run.loops.kept_elsewhere(given.dataloader)
        watch(given.dataloader, self._about_to_fetch)

    def load(self, step: int) -> bool:
        """Load, or begin with a model from elsewhere; False if there is neither. Raises as ``fxckpt.load``."""
        found = load(optimizer=self._optimizer, step=None if step == -1 else step).path is not None
        if not found and (self._config.initial_load_path or self._config.initial_load_in_hf):
            found = self._load_initial()
        if self._config.load_only:
            self.handle.shutdown()
        return found

    def _load_initial(self) -> bool:
        """torchtitan's own manager reads what it wrote, or what Hugging Face did, into the model."""
        from torchtitan.components.checkpointer import CheckpointManager

        theirs, given = self._config, self._given
        names = ("initial_load_path", "initial_load_model_only", "initial_load_in_hf", "initial_load_in_hf_quantized")
        chosen = {name: getattr(theirs, name) for name in names}
        nowhere = f"{theirs.folder}/none"  # it looks there first
        config = CheckpointManager.Config(enable=True, load_only=True, folder=nowhere, keep_latest_k=0, **chosen)
        manager = config.build(
            dataloader=given.dataloader, model_parts=given.model_parts, optimizers=given.optimizers,
            lr_schedulers=given.lr_schedulers, states=dict(given.states), sd_adapter=given.sd_adapter,
            base_folder=given.base_folder,
        )  # fmt: skip
        loaded = bool(manager.load())
        manager.close()
        return loaded

    def step_is_over(self, step: int, last: bool) -> bool:
        """``save()`` was called. Is there a checkpoint of this step?"""
        run = self.handle._run
        if not run.status.active:
            return False
        if self._turns is None:
            raise SetupError(
                "checkpointer.save() was called before a batch was fetched: call load(), then iterate over the dataloader"
            )
        if self._begun < run.clock.attempts == self._fetched:
            raise SetupError(
                "a batch of the next step was fetched before checkpointer.save() was called for this one, so a checkpoint "
                "would count it as used. Call save() behind the step, before the next batch is fetched"
            )
        self._note()
        self._over = True
        if last or (step == 1 and self._config.enable_first_step_checkpoint):
            run.stepping.take_at_boundary()
        if last:
            self._boundary()
            self.handle.flush()
        return run.stepping.is_taken()

    def _note(self) -> None:
        """Of what the trainer changes ahead of a boundary, the state now is what the next checkpoint has."""
        for each in self._noted.values():
            each.note()

    def _about_to_fetch(self) -> None:
        """The trainer asks for a batch."""
        if self._turns is None:
            self._turns = steps(_ENDLESS, optimizer=self._optimizer)
            next(self._turns)
            self._loader.live = True
            self._begun = self.handle._run.clock.attempts
        self._boundary()
        self._fetched = self.handle._run.clock.attempts

    def _boundary(self) -> None:
        """If a step is complete, everything is of one instant."""
        if self._over and self._turns is not None:
            self._over = False
            next(self._turns)
            self._begun = self.handle._run.clock.attempts

    def end(self) -> None:
        """Finish what is in flight, and leave the loader as it was. Where training fails, the step under way is dropped."""
        if sys.exc_info()[0] is None:
            self._boundary()
        let_go(self._given.dataloader)
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.close()  # type: ignore[attr-defined]
        self.handle.shutdown()
