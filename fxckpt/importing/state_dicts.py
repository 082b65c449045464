"""State dicts as torch saves them: which entry is the model, which are optimizers, and whose state is whose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxckpt.errors import SetupError, StateError
from fxckpt.importing.source import Source, Stored, flat, is_tensor, of_torch
from fxckpt.store.typed_json import Unkept, encode_state

MODELS = ("model", "state_dict", "model_state_dict", "module")
OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizers", "optimizer_states")
"""Under which names scripts, torch's tutorials, Lightning and DeepSpeed keep them."""


def take(found: Any, source: Source) -> None:
    """Put what a file or directory holds into ``source``: a state dict, or a dict with one in it. Raises SetupError."""
    if not isinstance(found, Mapping):
        raise SetupError(f"it holds an object of type {type(found).__name__}, and no state dict")
    inside = next((key for key in MODELS if isinstance(found.get(key), Mapping)), None)
    for name, value in flat(found if inside is None else found[inside]):
        source.add(name, value)
    if not source.model:
        raise SetupError(f"no tensor is in it: a state dict is expected, or one under one of the names {', '.join(MODELS)}")
    for key, value in found.items() if inside is not None else ():
        if key in OPTIMIZERS and not source.optimizers:
            _take_optimizers(key, value, source)
        elif key == "step" and type(value) is int and value >= 0:
            source.step = value
        elif key != inside:
            source.left_out[str(key)] = (
                f"of type {type(value).__name__}, beside the model: give it to the objects of your script yourself"
            )


def _take_optimizers(key: str, value: Any, source: Source) -> None:
    """One optimizer's state dict, or a list of them; all or nothing, so that each stays in its place."""
    several = [value] if isinstance(value, Mapping) and "param_groups" in value else value
    several = list(several.values()) if isinstance(several, Mapping) else several
    try:
        if not isinstance(several, (list, tuple)):
            raise SetupError(f"of type {type(value).__name__}, no state dict of an optimizer")
        source.optimizers = [_optimizer(each, f"{key}[{index}]") for index, each in enumerate(several)]
    except (SetupError, StateError) as error:
        source.optimizers = []
        source.left_out[key] = str(error)


def _optimizer(found: Any, what: str) -> dict[str, Any]:
    """A copy of one state dict with its tensors ready to be written. Raises SetupError or StateError for what is none."""
    groups, states = (found.get("param_groups"), found.get("state")) if isinstance(found, Mapping) else (None, None)
    if not isinstance(groups, (list, tuple)) or not isinstance(states, Mapping) or not groups:
        raise SetupError(f"{what} is no state dict of an optimizer, with state and param_groups")
    if not all(isinstance(dict(group).get("params"), (list, tuple)) for group in groups):
        raise SetupError(f"{what} has a parameter group that lists no parameters")
    copied: dict[str, Any] = {"state": {}, "param_groups": [dict(group) for group in groups]}
    listed = {str(key): key for group in groups for key in group["params"]}  # DCP makes text of numbers, as keys only
    if len(listed) != sum(len(group["params"]) for group in groups) or not set(map(str, states)) <= set(listed):
        raise SetupError(f"{what} has state of parameters that are in none of its groups, or in two")
    for key, state in states.items():
        param = listed[str(key)]
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise SetupError(f"{what}: the state of parameter {param!r} is no dict by names")
        copied["state"][param] = {name: _value(item, f"{what}, {name} of parameter {param!r}") for name, item in state.items()}
    encode_state([{k: v for k, v in group.items() if k != "params"} for group in groups], Unkept(), f"{what}.param_groups")
    return copied


def _value(value: Any, what: str) -> Any:
    """A tensor for the file of tensors, or a value that the record can hold. Raises StateError."""
    if isinstance(value, Stored):
        return value
    if is_tensor(value):
        try:
            return of_torch(value, what)
        except SetupError:
            pass  # a sparse one, which the record can hold
    encode_state(value, Unkept(), what)
    return value


def named(found: dict[str, Any], index: int, names: Mapping[str, Stored]) -> dict[str, Any] | str:
    """A state dict whose parameters go by names of the model, if it says them (by themselves, or in ``param_names``), else by
    their places, ``optimizer0.1.3`` (optimizer, group, index): the names of parameters that have no other, which say as much as
    torch itself goes by. Or why it can have neither."""
    groups: list[dict[str, Any]] = []
    calls: dict[Any, str] = {}
    for g, group in enumerate(found["param_groups"]):
        params, given = list(group["params"]), group.get("param_names")
        if all(isinstance(each, str) for each in params):
            called = params
        elif isinstance(given, (list, tuple)) and len(given) == len(params):
            called = list(given)
        else:
            called = [f"optimizer{index}.{g}.{k}" for k in range(len(params))]
        unknown = [each for each in called if each not in names and not each.startswith(f"optimizer{index}.{g}.")]
        if unknown:
            return f"it has state of {unknown[0]!r}, which the model that was imported has not"
        calls |= dict(zip(params, called))
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({"params": called, "settings": settings})
    return {"groups": groups, "state": {calls[param]: state for param, state in found["state"].items()}}
