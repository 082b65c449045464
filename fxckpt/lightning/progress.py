"""Everything of a Trainer that is no tensor of the model or its optimizers, as one object with a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fxckpt.compat.lightning import COUNTS_OF_CALLBACKS, combined_state, load_loops, metrics_of, put_combined, put_metrics_of
from fxckpt.errors import SetupError
from fxckpt.lightning.logs import positions
from fxckpt.lightning.results import load_metrics, load_results, metrics_state, results_state


class Progress:
    """Where a Trainer stands.

    ``amid``: at a batch that is about to be fetched; False behind the last one. ``here``: Lightning's fetcher, while a load takes
    place at that instant; other loads only prepare what comes before it. ``loaded``: the state that was loaded last.
    """

    def __init__(self, trainer: Any, module: Any, callback: Any):
        self.amid: bool = False
        self.here: Any = None
        self.loaded: dict[str, Any] = {}
        self._trainer, self._module, self._own = trainer, module, callback

    # -- taking ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Loops, callbacks, schedulers, logged values, and what the module's and the data module's own hooks keep."""
        trainer = self._trainer
        return {
            "amid": self.amid,
            "should_stop": trainer.should_stop,
            "loops": trainer.fit_loop.state_dict(),
            "combined": combined_state(trainer.fit_loop),
            "metrics": metrics_of(trainer),
            "results": results_state(trainer.fit_loop.epoch_loop._results),
            "torchmetrics": metrics_state(self._module),
            "callbacks": {key: self._callback_state(each) for key, each in self._callbacks()},
            "module": self._kept_by(self._module.on_save_checkpoint) if _is_own(self._module, "on_save_checkpoint") else {},
            "datamodule": None if trainer.datamodule is None else trainer.datamodule.state_dict(),
            "schedulers": [(type(s).__name__, s.state_dict()) for s in self._schedulers()],
            "logs": positions(trainer.loggers),
        }

    def _callbacks(self) -> Iterator[tuple[str, Any]]:
        """All others, by Lightning's keys, numbered where two have the same."""
        seen: dict[str, int] = {}
        for each in self._trainer.callbacks:
            if each is not self._own:
                key = str(each.state_key)
                seen[key] = seen.get(key, -1) + 1
                yield f"{key} {seen[key]}", each

    def _callback_state(self, callback: Any) -> dict[str, Any]:
        """Its own state; the modules that it keeps, if that has no tensors; some numbers that Lightning's forget."""
        state = callback.state_dict()
        modules = {} if _holds_tensors(state) else {name: each.state_dict() for name, each in self._modules_in(callback)}
        own = _is_own(callback, "on_save_checkpoint")
        return {
            "state": state,
            "modules": modules,
            "counts": {name: vars(callback)[name] for name in COUNTS_OF_CALLBACKS if name in vars(callback)},
            "hook": self._kept_by(lambda kept: callback.on_save_checkpoint(self._trainer, self._module, kept)) if own else {},
        }

    def _modules_in(self, callback: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """Averages of the model, which only Lightning's own files hold."""
        for name, value in vars(callback).items():
            if isinstance(value, torch.nn.Module) and value is not self._module:
                yield name, value

    def _kept_by(self, hook: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """What a hook adds to a checkpoint of Lightning's."""
        kept = self._lightnings()
        given = set(kept)
        hook(kept)
        return {name: value for name, value in kept.items() if name not in given}

    def _lightnings(self) -> dict[str, Any]:
        """What such a checkpoint has for its hooks to look at."""
        trainer = self._trainer
        return {"state_dict": self._module.state_dict(), "epoch": trainer.current_epoch, "global_step": trainer.global_step}

    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in self._trainer.lr_scheduler_configs]

    # -- putting back ---------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what may be put back now: all of it at the instant of the checkpoint, else what the way there needs."""
        self.loaded = dict(state)
        self._trainer.should_stop = state["should_stop"]
        for key, each in self._callbacks():
            if key in state["callbacks"]:
                self._load_callback(each, state["callbacks"][key])
        if self._trainer.datamodule is not None and state["datamodule"] is not None:
            self._trainer.datamodule.load_state_dict(state["datamodule"])
        if _is_own(self._module, "on_load_checkpoint") and state["module"]:
            self._module.on_load_checkpoint({**self._lightnings(), **state["module"]})
        load_metrics(self._module, state["torchmetrics"])
        if self.here is not None:
            self._load_here(state)

    def _load_here(self, state: Mapping[str, Any]) -> None:
        """What a new process has only now: iterators, schedulers that a callback puts in the place of others, logged values."""
        self._load_schedulers(state["schedulers"])
        if state["amid"]:
            load_loops(self._trainer.fit_loop, state["loops"])
            put_combined(self._trainer.fit_loop, self.here, state["combined"])
            load_results(self._trainer, self._module, state["results"])
        self.put_metrics()

    def head(self) -> None:
        """Set the counters to the beginning of the epoch that the checkpoint is of, as it is when all epochs before are over."""
        loops = self.loaded["loops"]
        if self.loaded["amid"]:
            progress = loops["epoch_progress"]
            over = {kind: dict.fromkeys(progress[kind], progress[kind]["processed"]) for kind in ("total", "current")}
            loops = {**loops, "epoch_progress": {**progress, **over}}
        load_loops(self._trainer.fit_loop, loops)

    def put_metrics(self) -> None:
        """The values that were logged last."""
        put_metrics_of(self._trainer, self.loaded["metrics"])

    def _load_callback(self, callback: Any, state: Mapping[str, Any]) -> None:
        if state["state"]:
            callback.load_state_dict(state["state"])
        modules = dict(self._modules_in(callback))
        for name, tensors in state["modules"].items():
            if name in modules:
                modules[name].load_state_dict(tensors)
        vars(callback).update({name: value for name, value in state["counts"].items() if name in vars(callback)})
        if _is_own(callback, "on_load_checkpoint") and state["hook"]:
            callback.on_load_checkpoint(self._trainer, self._module, {**self._lightnings(), **state["hook"]})

    def _load_schedulers(self, saved: Any) -> None:
        live = self._schedulers()
        kinds, wanted = [type(each).__name__ for each in live], [kind for kind, _ in saved]
        if kinds != wanted:
            raise SetupError(
                f"the checkpoint has the schedulers {wanted or 'none'}, and configure_optimizers gives {kinds or 'none'}"
            )
        for scheduler, (_, state) in zip(live, saved):
            scheduler.load_state_dict(state)


def _is_own(value: Any, hook: str) -> bool:
    """Has its class, or one that is not Lightning's, a hook of this name?"""
    kind = next((k for k in type(value).__mro__ if hook in vars(k)), None)
    return kind is not None and kind.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")


def _holds_tensors(state: Any) -> bool:
    """Are there tensors in this state, in dicts of dicts?"""
    if isinstance(state, Mapping):
        return any(
            isinstance(each, Mapping) and any(isinstance(v, torch.Tensor) for v in each.values()) for each in state.values()
        )
    return False
