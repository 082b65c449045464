"""Capture and restore what is not a parameter: random generators, schedulers, loaders, plain values, what has a state dict."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxckpt.compat.loaders import is_stateful
from fxckpt.data.generators import global_generators, packed, read, write
from fxckpt.errors import SetupError, StateError
from fxckpt.run import plain_values
from fxckpt.store.typed_json import Unkept, encode_state

log: logging.Logger = logging.getLogger("fxckpt")


@dataclass(frozen=True)
class Extra:
    """One entry of ``extra=``. ``early``: captured at the end of ``opt.step()``, else when the step closes.

    Generators and data loaders are early: the next batch may be drawn before the next forward. ``live`` is the object;
    ``plain``: it is a value that is changed in place, so it must stay of its kind.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]
    early: bool
    live: Any = None
    plain: bool = False

    def is_generator(self) -> bool:
        """Is it a random generator?"""
        return self.live is None

    def done_again(self) -> bool:
        """May it be put back once more, where a script has done again what it had done? A plain value, or a scheduler."""
        return self.plain or isinstance(self.live, torch.optim.lr_scheduler.LRScheduler)

    def misfit(self, saved: Any) -> str | None:
        """Why the object cannot become what was saved; None if it can, as far as can be told before it is tried."""
        return plain_values.replaces(self.live, saved) if self.plain else None


def extras(given: Mapping[str, Any] | None) -> tuple[Extra, ...]:
    """Check ``extra=`` and say how each object is captured. Raises SetupError for what has no state to capture."""
    if given is not None and not isinstance(given, Mapping):
        raise SetupError(f"extra= takes a dict of objects by name; this is a {type(given).__name__}")
    return tuple(_extra(name, value) for name, value in (given or {}).items())


def _extra(name: str, value: Any) -> Extra:
    if isinstance(value, torch.Generator):
        return Extra(name, value.get_state, value.set_state, True)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return Extra(name, lambda: bits.state, lambda state: setattr(bits, "state", state), True)
    if isinstance(value, np.random.RandomState):
        return Extra(name, value.get_state, value.set_state, True)
    if isinstance(value, random.Random):
        return Extra(name, lambda: packed(read(value)), lambda state: write(value, state), True)
    if is_stateful(value):
        return Extra(name, value.state_dict, value.load_state_dict, _is_loader(value), value)
    if plain_values.is_plain(value) and not plain_values.is_frozen(value):
        at = f"extra[{name!r}]"
        return Extra(
            name,
            lambda: plain_values.take_out(value, at),
            lambda saved: plain_values.put_back(value, saved, at),
            False,
            value,
            True,
        )
    raise SetupError(f"extra[{name!r}] is a {type(value).__name__}: {_advice(name, value)}")


def _is_loader(value: Any) -> bool:
    """Does it give batches? Its ``state_dict()`` may start an iterator, with workers and random numbers."""
    return hasattr(type(value), "__iter__") and not isinstance(value, torch.nn.Module)


def _advice(name: str, value: Any) -> str:
    """What to do about a value that has no state of its own."""
    if isinstance(value, torch.utils.data.DataLoader):
        return "it does not know its place in the data. Loop over it with `for x in fxckpt.batches(loader)`, which keeps that"
    if hasattr(type(value), "__next__"):
        return "an iterator cannot be put back to its place. Loop over what it came from with `for x in fxckpt.batches(...)`"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, tuple, frozenset)):
        return (
            f"a load cannot change it for whoever holds it. Keep it in a dict, extra={{'state': {{{name!r}: ...}}}}, and use that"
        )
    if plain_values.is_frozen(value):
        return "its class is frozen, so a load cannot change it. Keep it in a dict"
    needs = "it needs state_dict() and load_state_dict(), or to be a torch, numpy or Python random generator"
    if isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, type):
        return f"{needs}. Or give what it holds: extra={{{name!r}: vars(...)}}"
    return f"{needs}, or a plain value: a dict, list, dataclass instance, SimpleNamespace, array or tensor"


def probe(found: Iterable[Extra]) -> None:
    """Take each state once, so that what cannot be stored is said now and not at the first checkpoint. Raises SetupError with the
    path to it. Loaders are left alone, and whatever random numbers a ``state_dict()`` draws are put back."""
    before = random_state()
    try:
        for each in found:
            if each.live is not None and not each.early:  # generators have no `live`
                _probe(each)
    finally:
        set_random_state(before)


def _probe(each: Extra) -> None:
    """Take the state of one."""
    at = f"extra[{each.name!r}]"
    try:
        state = each.get()
        encode_state(state, Unkept(), at)
    except StateError as error:
        raise SetupError(f"{at}, a {type(each.live).__name__}, holds what no checkpoint can: {error}") from error
    except Exception as error:
        raise SetupError(f"{at}.state_dict(), of a {type(each.live).__name__}, raised {type(error).__name__}: {error}") from error
    off = isinstance(each.live, torch.amp.GradScaler) and not each.live.is_enabled()
    if not each.plain and not off and (state is None or (isinstance(state, Sized) and len(state) == 0)):
        log.warning(
            f"fxckpt: {at}.state_dict(), of a {type(each.live).__name__}, is empty: nothing of it will be in the checkpoints"
        )


def random_state() -> dict[str, Any]:
    """The global generators: torch, numpy, Python, and those of all CUDA devices if this process uses any."""
    found = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": packed(random.getstate())}
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def random_state_of(seed: int) -> dict[str, Any]:
    """What ``random_state`` gives of generators that were seeded with this, of 64 bits."""
    return {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "numpy": np.random.RandomState(seed % 2**32).get_state(),
        "python": packed(random.Random(seed).getstate()),
        "seed": seed,
    }


def is_random_state(value: Mapping[str, Any]) -> bool:
    """Whether new generators take these states."""
    try:
        torch.Generator().set_state(value["torch"])
        np.random.RandomState().set_state(value["numpy"])
        write(random.Random(), value["python"])
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, OverflowError):
        return False
    return True


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators back. An import has nothing to put back."""
    if not state:
        return
    torch.set_rng_state(state["torch"])
    if "seed" in state:
        torch.cuda.manual_seed_all(state["seed"])
    for device, saved in zip(range(torch.cuda.device_count()), state.get("cuda", ())):
        torch.cuda.set_rng_state(saved, device)
    np.random.set_state(state["numpy"])
    write(global_generators()["python"], state["python"])
