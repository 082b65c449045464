"""Capture and restore what is not a parameter: random generators, schedulers, loaders, anything with a state dict."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxckpt.errors import SetupError


@dataclass(frozen=True)
class Extra:
    """One entry of ``extra=``. ``early``: captured at the end of ``opt.step()``, else when the step closes.

    Generators and data loaders are early: the next batch may be drawn before the next forward.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    early: bool
    generator: bool = False


def extras(given: Mapping[str, Any] | None) -> tuple[Extra, ...]:
    """Check ``extra=`` and say how each object is captured. Raises SetupError for what has no state to capture."""
    return tuple(_extra(name, value) for name, value in (given or {}).items())


def _extra(name: str, value: Any) -> Extra:
    if isinstance(value, torch.Generator):
        return Extra(name, value.get_state, value.set_state, True, True)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return Extra(name, lambda: bits.state, lambda state: setattr(bits, "state", state), True, True)
    if isinstance(value, np.random.RandomState):
        return Extra(name, value.get_state, value.set_state, True, True)
    if isinstance(value, random.Random):
        return Extra(name, lambda: _packed(value.getstate()), lambda state: value.setstate(_unpacked(state)), True, True)
    if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))):
        needs = "it needs state_dict() and load_state_dict(), or to be a torch, numpy or Python random generator"
        raise SetupError(f"extra[{name!r}] is a {type(value).__name__}: {needs}")
    early = hasattr(type(value), "__iter__") and not isinstance(value, torch.nn.Module)
    return Extra(name, value.state_dict, value.load_state_dict, early)


def random_state() -> dict[str, Any]:
    """The global generators: torch, numpy, Python, and those of all CUDA devices if this process uses any."""
    found = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": _packed(random.getstate())}
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def _packed(state: tuple) -> dict[str, Any]:
    """Python's generator state with its 625 words as one array: as single numbers they take milliseconds to encode."""
    version, words, gauss = state
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def _unpacked(state: Mapping[str, Any]) -> tuple:
    return state["version"], tuple(state["words"].tolist()), state["gauss"]  # an array: anything else may be endless


def is_random_state(value: Mapping[str, Any]) -> bool:
    """Whether new generators take these states."""
    try:
        torch.Generator().set_state(value["torch"])
        np.random.RandomState().set_state(value["numpy"])
        random.Random().setstate(_unpacked(value["python"]))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, OverflowError):
        return False
    return True


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators back."""
    torch.set_rng_state(state["torch"])
    for device, saved in zip(range(torch.cuda.device_count()), state.get("cuda", ())):
        torch.cuda.set_rng_state(saved, device)
    np.random.set_state(state["numpy"])
    random.setstate(_unpacked(state["python"]))
