"""What a run writes into a record beside tensors, checked before anything live is touched.

A record's digest says that its bytes are those that were written, not by whom. What another program or version wrote is
``Corrupt`` here, not an exception from the middle of a half applied load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxckpt.data.generators import is_kind
from fxckpt.errors import Corrupt
from fxckpt.optim.contract.contract import is_own
from fxckpt.run import extra_state
from fxckpt.run.module_values import is_number
from fxckpt.saving.inventory import COMPLEX_OF, TORCH_DTYPES
from fxckpt.store.about import IMPORTED
from fxckpt.store.checks import has, is_anything, is_str, list_of, map_of
from fxckpt.store.dtypes import Tensor
from fxckpt.store.names import OPTIMIZER, state_key
from fxckpt.store.record import Record, TensorRecord
from fxckpt.store.typed_json import decode_state


@dataclass(frozen=True)
class Saved:
    """The decoded values of a record. ``optimizers``: class, groups, description of the state and gradients of each;
    ``early``: random generators, extras, buffers, modules; ``late``: further extras by name; ``places``: where in the
    optimizer's file each state lies, by its key there."""

    optimizers: list[dict[str, Any]]
    early: dict[str, Any]
    late: dict[str, Any]
    places: Mapping[str, TensorRecord]


def check_encoded(record: Record, path: str) -> None:
    """Check what is looked at before the encoded values are decoded. ``path`` is for the error. Raises Corrupt."""
    _need({"optimizers": _ENCODED(record.optimizers), "states": _STATE(record.state)}, path)


def decode(record: Record, tensors: Mapping[str, Tensor], path: str, base: Record | None = None) -> Saved:
    """What is about to be applied, checked; ``tensors`` are those of the extra state's file. ``base``: the checkpoint that has
    the optimizers' state, of a record of the journal. Raises Corrupt."""
    saved = Saved(
        decode_state(record.optimizers, tensors),
        decode_state(record.state["early"], tensors),
        decode_state(record.state["late"], tensors),
        {tensor.key: tensor for tensor in (record if base is None else base).tensors(OPTIMIZER)},
    )
    early = "random generators, extras or buffers"
    _need({"optimizers": _DECODED(saved.optimizers), early: _EARLY(saved.early), "extras": _values(saved.late)}, path)
    for index, each in enumerate(saved.optimizers):
        for name, described in each["state"].items():
            for key in described["keys"]:
                _check_state(saved.places.get(state_key(index, key, name)), key, described, f"{key}/{name}", path)
    return saved


def _need(checks: Mapping[str, bool], path: str) -> None:
    """Raise Corrupt for the first check that does not hold."""
    for what, holds in checks.items():
        if not holds:
            raise Corrupt(path, f"its {what} are not as a run of fxckpt writes them: another program wrote this record")


def _check_state(place: TensorRecord | None, key: str, described: Mapping[str, Any], what: str, path: str) -> None:
    """One value of an optimizer's state: a plain one, or a tensor that can be made as it is described."""
    if place is None:
        if key not in described["plain"]:
            raise Corrupt(path, f"the optimizer's {what} is neither in a file nor in the record")
        return
    is_pairs = place.shape[-1:] == (2,) and place.dtype in COMPLEX_OF
    fits = is_pairs or place.dtype == "C64" if key in described["complex"] else place.dtype != "C64"
    if place.dtype not in TORCH_DTYPES or not fits:
        raise Corrupt(path, f"the optimizer's {what} is {place.dtype}{list(place.shape)}, which no state of a run is")


def _is_strides(value: Any) -> bool:
    """Strides that stay numbers of 64 bits when they are counted in bytes."""
    return type(value) is tuple and all(type(each) is int and 0 <= each < 1 << 48 for each in value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_cuda_state(value: Any) -> bool:
    """Seed and offset, as bytes."""
    return _is_tensor(value) and value.dtype == torch.uint8 and value.dim() == 1 and value.device.type == "cpu"


_random = has({"torch": is_anything, "numpy": is_anything, "python": is_anything}, {"cuda": list_of(_is_cuda_state)})


def _is_random(value: Any) -> bool:
    """The states of the global generators, as new ones take them; or none of them, in an import."""
    return value == {} or (_random(value) and extra_state.is_random_state(value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_loops = has(
    {"epoch": _is_count, "batch": _is_count, "inside": is_anything, "sources": is_anything},
    {"amid": is_anything, "random": is_anything, "outermost": is_anything, "ends": is_anything},
)


def _is_loops(value: Any) -> bool:
    """Where a script's loops stood; what a loader's state holds, that loader looks at."""
    if not _loops(value) or type(value["sources"]) is not list:
        return False
    if value.get("random") is not None and not _is_random(value["random"]):
        return False
    if value.get("outermost") is not None and not _is_count(value["outermost"]):
        return False
    ends = value.get("ends", {})
    if not isinstance(ends, Mapping) or not all(_is_random(each) for each in ends.values()):
        return False
    return all(type(e) is tuple and len(e) == 2 and _is_count(e[0]) and type(e[1]) is dict for e in value["sources"])


def _is_number(value: Any) -> bool:
    """What an attribute of a module may become."""
    return value is None or is_number(value)


def _is_generator(value: Any) -> bool:
    """Kind and state of a generator; whether they fit the live one is asked there."""
    return _generator(value) and is_kind(value["kind"], value["state"])


_names = list_of(is_str)
_tensors = map_of(_is_tensor)
_values = map_of(is_anything)

# Before the values are decoded.
_encoded_group = has({"params": _names, "settings": is_anything})
_ENCODED = list_of(has({"class": is_str, "groups": list_of(_encoded_group), "state": is_anything, "gradients": is_anything}))
_encoded_early = has({"random": is_anything, "extra": _values, "buffers": is_anything, "modules": is_anything})
_import = has({}, {"equal": map_of(is_str)})
_STATE = has({"early": _encoded_early, "late": _values}, {IMPORTED: _import})

# After.
_group = has({"params": _names, "settings": lambda value: _values(value) and "params" not in value})
_state = has({"keys": _names, "strides": map_of(_is_strides), "complex": _names, "plain": _values}, {"host": _names})
_optimizer = {"class": is_str, "groups": list_of(_group), "state": map_of(_state), "gradients": _names}
_decoded = has(
    _optimizer, {"accumulated": _tensors, "accumulated_as": map_of(is_str), "own": is_anything, "given": list_of(_values)}
)


def _is_optimizer(value: Any) -> bool:
    """What is captured of its own (``optim.contract``) names parameters by their places."""
    return _decoded(value) and ("own" not in value or is_own(value["own"], sum(len(g["params"]) for g in value["groups"])))


_DECODED = list_of(_is_optimizer)
_early = {"random": _is_random, "extra": _values, "buffers": _tensors, "modules": _values}
_generator = has({"kind": is_str, "state": is_anything})
_of_modules = {"numbers": map_of(map_of(_is_number)), "generators": map_of(map_of(_is_generator))}
_optional = {
    **_of_modules,
    "remote": _tensors,
    "frozen": _names,
    "eval": _names,
    "contracts": map_of(_values),
    "loops": _is_loops,
    "held_back": _tensors,
    "held_back_as": map_of(is_str),
}
_EARLY = has(_early, _optional)
