"""Sums and counts of logged values in the middle of an epoch: those of ``self.log`` and those of torchmetrics.

Lightning's own checkpoints have neither, so a mean over an epoch that was resumed is one over its rest.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from fxckpt.compat.lightning import RESULT_FIELDS, new_result, sync_of


def results_state(results: Any) -> dict[str, Any]:
    """By key, how each value is logged, and what has come together of it."""
    return {key: _result_state(result) for key, result in results.items()}


def _result_state(result: Any) -> dict[str, Any]:
    meta = result.meta
    sums = {name: getattr(result, name) for name in ("value", "cumulated_batch_size") if hasattr(result, name)}
    return {
        "meta": {name: getattr(meta, name) for name in RESULT_FIELDS},
        "reduce": (meta.reduce_fx.__module__, meta.reduce_fx.__name__),
        "sync": sync_of(meta),
        "is_tensor": result.is_tensor,
        "has_reset": result.has_reset,
        "sums": sums if result.is_tensor else {},
        "cache": result._forward_cache,
        "computed": result._computed,
        "updates": result._update_count,
    }


def load_results(trainer: Any, module: Any, saved: Mapping[str, Any]) -> None:
    """Make the results of the epoch so far anew."""
    results = trainer.fit_loop.epoch_loop._results
    results.clear()
    for key, state in saved.items():
        result = new_result(trainer, results, state)
        for name, value in state["sums"].items():
            setattr(result, name, _on(module.device, value))
        if not state["is_tensor"]:
            result.value = operator.attrgetter(state["meta"]["metric_attribute"])(module)
        result.has_reset, result._update_count = state["has_reset"], state["updates"]
        result._forward_cache, result._computed = _on(module.device, state["cache"]), _on(module.device, state["computed"])
        results[key] = result


def metrics_state(module: torch.nn.Module) -> dict[str, Any]:
    """What the torchmetrics objects in a module have seen; of most of them no state dict says it."""
    return {
        name: {
            "states": {each: getattr(metric, each) for each in metric._defaults},
            "updates": metric._update_count,
            "computed": metric._computed,
        }
        for name, metric in _metrics(module).items()
    }


def load_metrics(module: torch.nn.Module, saved: Mapping[str, Any]) -> None:
    """Put that back."""
    for name, metric in _metrics(module).items():
        if name in saved:
            for each, value in saved[name]["states"].items():
                setattr(metric, each, _on(metric.device, value))
            metric._update_count, metric._computed = saved[name]["updates"], _on(metric.device, saved[name]["computed"])


def _metrics(module: torch.nn.Module) -> dict[str, Any]:
    """The metrics, by what torchmetrics has in each."""
    return {name: each for name, each in module.named_modules() if hasattr(each, "_defaults") and hasattr(each, "_update_count")}


def _on(device: torch.device, value: Any) -> Any:
    """Tensors as they are there, also in lists."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [_on(device, each) for each in value] if isinstance(value, list) else value
