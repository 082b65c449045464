"""What a run writes into a record beside tensors, checked before anything live is touched.

The digest of a record says that its bytes are those that were written, not by whom. What another program wrote, or another
version, is ``Corrupt`` here, not an exception from the middle of a half applied load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxckpt.errors import Corrupt
from fxckpt.run import extra_state
from fxckpt.saving.inventory import TORCH_DTYPES
from fxckpt.store.record import Record, TensorRecord

Check = Callable[[Any], bool]


def _list_of(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def _map_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(type(key) is str and check(item) for key, item in value.items())


def _object(optional: Mapping[str, Check] | None = None, /, **checks: Check) -> Check:
    """A dict with these keys, and perhaps the optional ones; further ones are nobody's business here."""
    every = {**checks, **(optional or {})}
    return lambda value: (type(value) is dict and checks.keys() <= value.keys()
                          and all(check(value[key]) for key, check in every.items() if key in value))  # fmt: skip


def _anything(value: Any) -> bool:
    return True


def _is_str(value: Any) -> bool:
    return type(value) is str


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _is_strides(value: Any) -> bool:
    return type(value) is tuple and all(map(_is_size, value))


def _is_random(value: Any) -> bool:
    """The states of the global generators, as new ones take them."""
    known = _object({"cuda": _list_of(_is_cuda_state)}, torch=_anything, numpy=_anything, python=_anything)
    return known(value) and extra_state.is_random_state(value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_cuda_state(value: Any) -> bool:
    """Seed and offset, as bytes."""
    return _is_tensor(value) and value.dtype == torch.uint8 and value.dim() == 1 and value.device.type == "cpu"


_is_settings = _map_of(_anything)
_is_group = _object(params=_list_of(_is_str), settings=lambda value: _is_settings(value) and "params" not in value)
_is_encoded_group = _object(params=_list_of(_is_str), settings=_anything)
_is_described = _object({"host": _list_of(_is_str)}, keys=_list_of(_is_str), strides=_map_of(_is_strides),
                        complex=_list_of(_is_str), plain=_map_of(_anything))  # fmt: skip

_ENCODED = _list_of(_object(**{"class": _is_str}, groups=_list_of(_is_encoded_group), state=_anything, gradients=_anything))
_DECODED = _list_of(_object({"accumulated": _map_of(_is_tensor)}, **{"class": _is_str}, groups=_list_of(_is_group),
                            state=_map_of(_is_described), gradients=_list_of(_is_str)))  # fmt: skip
_STATE = _object(early=_object(random=_anything, extra=_map_of(_anything), buffers=_anything, modules=_anything),
                 late=_map_of(_anything))  # fmt: skip
_EARLY = _object({"remote": _map_of(_is_tensor), "frozen": _list_of(_is_str)}, random=_is_random,
                 extra=_map_of(_anything), buffers=_map_of(_is_tensor), modules=_map_of(_anything))  # fmt: skip


def check_encoded(record: Record, path: str) -> None:
    """What is looked at before the encoded values are decoded. Raises Corrupt."""
    for holds, what in ((_ENCODED(record.optimizers), "optimizers"), (_STATE(record.state), "states")):
        if not holds:
            raise Corrupt(path, f"its {what} are not as a run of fxckpt writes them: another program wrote this record")


def check_decoded(
    optimizers: Any, early: Any, late: Any, places: Mapping[str, TensorRecord], key_of: Callable[..., str], path: str
) -> None:
    """What is about to be applied. ``places``: tensors of the optimizer's file; ``key_of(index, state, name)``: their keys.

    Raises Corrupt.
    """
    for holds, what in ((_DECODED(optimizers), "optimizers"), (_EARLY(early), "random generators, extras or buffers"),
                        (_map_of(_anything)(late), "extras")):  # fmt: skip
        if not holds:
            raise Corrupt(path, f"its {what} are not as a run of fxckpt writes them: another program wrote this record")
    for index, saved in enumerate(optimizers):
        for name, described in saved["state"].items():
            for key in described["keys"]:
                _check_state(places.get(key_of(index, key, name)), key, described, f"{key}/{name}", path)


def _check_state(place: TensorRecord | None, key: str, described: Mapping[str, Any], what: str, path: str) -> None:
    """One value of an optimizer's state: a plain one, or a tensor that can be made as it is described."""
    if place is None:
        if key not in described["plain"]:
            raise Corrupt(path, f"the optimizer's {what} is neither in a file nor in the record")
        return
    known = place.dtype in TORCH_DTYPES
    pairs = key not in described["complex"] or (place.shape[-1:] == (2,) and place.dtype in ("F32", "F64"))
    if not known or not pairs:
        raise Corrupt(path, f"the optimizer's {what} is {place.dtype}{list(place.shape)}, which no state of a run is")
