"""Private parts of Lightning: where its loop fetches a batch, its counters, logged values and iterators. Tried with 2.6.

Its hooks will not do: none is called between two batches when validation, schedulers and logs of the first are behind, and those
at an epoch's end run before other callbacks. Its way of restarting from counters repeats some of that and skips other.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

_HOOKED = {"_load_combined_loader_states": "fit_loop", "on_run_end": "fit_loop", "advance": "epoch_loop"}
"""Methods that ours are put in front of or behind, and the loop they are of."""

COUNTS_OF_CALLBACKS = ("_last_global_step_saved", "_defer_save_until_validation", "_latest_update_step", "_latest_update_epoch")
"""Numbers that Lightning's own callbacks count on with, and leave out of their state."""

RESULT_FIELDS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip
"""How a value is logged, less what is a function."""


def missing_parts(trainer: Any) -> list[str]:
    """What this version has not."""
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    owners = {"fit_loop": fit_loop, "epoch_loop": epoch_loop}
    needed = [(owners[owner], name) for name, owner in _HOOKED.items()]
    needed += [(fit_loop, name) for name in ("_combined_loader", "_load_from_state_dict", "epoch_progress")]
    needed += [(epoch_loop, name) for name in ("_results", "_batches_that_stepped", "batch_progress")]
    needed += [(trainer, name) for name in ("_logger_connector", "_checkpoint_connector")]
    needed += [(trainer._logger_connector, name) for name in ("_callback_metrics", "_first_loop_iter", "_current_fx")]
    return [name for owner, name in needed if not hasattr(owner, name)]


# -- what is looked for -----------------------------------------------------------------------------------------------------


def restored_elsewhere(trainer: Any) -> bool:
    """Has the Trainer loaded a checkpoint of its own?"""
    return bool(trainer.ckpt_path or getattr(trainer._checkpoint_connector, "_loaded_checkpoint", None))


def validates_by_the_clock(trainer: Any) -> bool:
    """Is its validation due after a time?"""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def reads_its_iterator(trainer: Any) -> bool:
    """Does the training step take the iterator, in place of a batch?"""
    code = getattr(getattr(trainer.lightning_module.training_step, "__func__", None), "__code__", None)
    return code is not None and "dataloader_iter" in code.co_varnames[: code.co_argcount]


def scaler_of(trainer: Any) -> Any:
    """The ``GradScaler`` of precision 16-mixed, if any."""
    return getattr(trainer.precision_plugin, "scaler", None)


# -- the loop ---------------------------------------------------------------------------------------------------------------


def stand_in(
    fit_loop: Any, *, loaders_made: Callable[[], None], advance: Callable[[Any], None], run_ended: Callable[[], None]
) -> None:
    """Have these called when the loaders are made and not iterated over yet; when a batch is about to be fetched; behind the
    hooks at the end. Only in this Trainer."""
    epoch_loop = fit_loop.epoch_loop
    load_states, fetch, end = fit_loop._load_combined_loader_states, epoch_loop.advance, fit_loop.on_run_end

    def _load_combined_loader_states() -> None:
        load_states()
        loaders_made()

    def _advance(data_fetcher: Any) -> None:
        advance(data_fetcher)
        fetch(data_fetcher)

    def _on_run_end() -> None:
        end()
        run_ended()

    vars(fit_loop)["_load_combined_loader_states"] = _load_combined_loader_states
    vars(epoch_loop)["advance"], vars(fit_loop)["on_run_end"] = _advance, _on_run_end


def release(fit_loop: Any) -> None:
    """Take them away."""
    owners = {"fit_loop": fit_loop, "epoch_loop": fit_loop.epoch_loop}
    for name, owner in _HOOKED.items():
        vars(owners[owner]).pop(name, None)


def load_loops(loop: Any, state: Mapping[str, Any], prefix: str = "") -> None:
    """Put counters back as they were, without the mark that a loop restarts."""
    loop._load_from_state_dict(dict(state), prefix)
    for name, inner in vars(loop).items():
        if hasattr(inner, "_load_from_state_dict"):
            load_loops(inner, state, f"{prefix}{name}.")


def combined_state(fit_loop: Any) -> dict[str, Any]:
    """Where the iterator over all training loaders stands, beside those loaders."""
    iterator = getattr(fit_loop._combined_loader, "_iterator", None)
    fetched = getattr(fit_loop._data_fetcher, "fetched", 0)
    return {"index": getattr(iterator, "_idx", 0), "consumed": list(getattr(iterator, "_consumed", ())), "fetched": fetched}


def put_combined(fit_loop: Any, data_fetcher: Any, state: Mapping[str, Any]) -> None:
    """Put it back there."""
    iterator = fit_loop._combined_loader._iterator
    iterator._idx = state["index"]
    if hasattr(iterator, "_consumed"):
        iterator._consumed = list(state["consumed"])
    data_fetcher.fetched = state["fetched"]


def replace_at_once(writer: Any, path: str) -> None:
    """Have a ``CSVLogger`` write its file anew, for a new column, under another name first. It truncates the file otherwise, and
    a kill then takes all rows."""

    def _rewrite_with_new_header(fieldnames: list[str]) -> None:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        with open(path + ".new", "w", newline="") as file:
            written = csv.DictWriter(file, fieldnames)
            written.writeheader()
            written.writerows(rows)
        os.replace(path + ".new", path)

    if hasattr(writer, "_rewrite_with_new_header"):
        vars(writer)["_rewrite_with_new_header"] = _rewrite_with_new_header


def has_unwritten_rows(logger: Any) -> bool:
    """Has a ``CSVLogger`` rows that are not in its file yet? To ask for its ``experiment`` would make it, and delete the file."""
    return bool(getattr(getattr(logger, "_experiment", None), "metrics", ()))


# -- logged values ----------------------------------------------------------------------------------------------------------

_KEPT = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_first_loop_iter", "_current_fx")


def metrics_of(trainer: Any) -> dict[str, Any]:
    """The values that were logged last, and where in a loop."""
    found = {name: getattr(trainer._logger_connector, name) for name in _KEPT}
    return {name: dict(value) if isinstance(value, dict) else value for name, value in found.items()}


def put_metrics_of(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Put them back."""
    for name in _KEPT:
        value = saved[name]
        setattr(trainer._logger_connector, name, dict(value) if isinstance(value, dict) else value)


def sync_of(meta: Any) -> dict[str, Any]:
    """How a result is reduced over ranks."""
    return {"should": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only}


def new_result(trainer: Any, results: Any, state: Mapping[str, Any]) -> Any:
    """An empty result that is logged as this state says; ``self.log`` compares that at its next call."""
    import builtins

    import torch

    home: Any = sys.modules[type(results).__module__]
    module, name = state["reduce"]
    reduce_fx = getattr(builtins if module == "builtins" else torch, name)
    meta = home._Metadata(**state["meta"], reduce_fx=reduce_fx)
    sync = state["sync"]
    meta.sync = home._Sync(_should=sync["should"], fn=trainer.strategy.reduce, rank_zero_only=sync["rank_zero_only"])
    return home._ResultMetric(meta, state["is_tensor"]).to(trainer.strategy.root_device)
