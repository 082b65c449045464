"""Random generators: the process's own, those that belong to a loader, and the states of both."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fxckpt.compat.generators import Glance, looking_at
from fxckpt.errors import SetupError

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

_BITS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")  # numpy's algorithms
_DEEPEST, _MOST, _LONGEST = 8, 2000, 128  # levels, objects, elements of a container: a list of a million paths holds none
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, np.ndarray, type, types.ModuleType)
_PACKAGES = ("torch", "numpy", "builtins", "functools", "collections", "random", "accelerate", "datasets", "torchdata")


def global_generators() -> dict[str, Any]:
    """The generators that are used where none is named; those of CUDA devices once this process uses any."""
    found: dict[str, Any] = {
        "torch": torch.default_generator,
        "numpy": np.random.get_state.__self__,  # type: ignore[attr-defined]
        "python": random.getstate.__self__,  # type: ignore[attr-defined]
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.update({f"cuda.{at}": each for at, each in enumerate(torch.cuda.default_generators)})
    return found


def read(generator: Any) -> Any:
    """A generator's state, as quickly as it is to be had."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def same(a: Any, b: Any) -> bool:
    """Whether two states that :func:`read` gave are equal."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor):
        return a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


class Reader:
    """Reads the states of some generators again and again: where they lie, which costs a worker a tenth of asking for them
    (behind its data, the objects that they are made of are never in the processor's caches)."""

    def __init__(self, generators: Mapping[str, Any]):
        self._ways = [(name, each, looking_at(each)) for name, each in generators.items()]

    def read(self) -> dict[str, Any]:
        """All states, for :func:`same` and for :func:`packed`."""
        glances = ((name, each, look() if look is not None else None) for name, each, look in self._ways)
        return {name: read(each) if glance is None else glance for name, each, glance in glances}


def packed(state: Any) -> Any:
    """What :func:`read` or a :class:`Reader` gave as arrays and plain values; Python's 625 numbers as one array, which is a
    hundred times quicker. One that is packed stays as it is."""
    if isinstance(state, torch.Tensor):
        return state.numpy()
    if isinstance(state, Glance):
        return _unfolded(state)
    if isinstance(state, tuple):
        version, words, gauss = state
        return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}
    return state


def _unfolded(glance: Glance) -> Any:
    """A glance as the state asked for is packed."""
    if glance.kind == "torch":
        return np.frombuffer(glance.words, np.uint8).copy()
    words, gauss = np.frombuffer(glance.words, np.uint32).copy(), glance.gauss
    if glance.kind == "python":
        return {"version": random.Random.VERSION, "words": words, "gauss": gauss}
    state = {"key": words[:-1], "pos": int(words[-1])}
    return {"bit_generator": "MT19937", "state": state, "has_gauss": int(gauss is not None), "gauss": gauss or 0.0}


def write(generator: Any, state: Any) -> None:
    """Put a generator into a packed state. Raises TypeError for what is none: made into an array, it might be endless."""
    if isinstance(generator, torch.Generator):
        if not isinstance(state, np.ndarray):
            raise TypeError(f"a state of torch's generators is an array, not a {type(state).__name__}")
        generator.set_state(torch.from_numpy(np.array(state, np.uint8)))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))


def states(generators: Mapping[str, Any]) -> dict[str, Any]:
    """Their packed states."""
    return {name: packed(read(each)) for name, each in generators.items()}


def write_all(generators: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Put those that are there into their saved states."""
    for name, each in generators.items():
        if name in saved:
            write(each, saved[name])


def global_states() -> dict[str, Any]:
    """The states of the global generators, not packed."""
    return {name: read(each) for name, each in global_generators().items()}


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Those that were drawn from in between."""
    return {name for name, state in after.items() if name in before and not same(before[name], state)}


class kept_globals:
    """Inside, the global generators may be put anywhere; at its end they are as they were. Gives these states."""

    def __enter__(self) -> dict[str, Any]:
        self._before = global_states()
        return self._before

    def __exit__(self, *_: object) -> None:
        write_all(global_generators(), {name: packed(state) for name, state in self._before.items()})


class Owned:
    """The generators that belong to a loader, by the way of attributes from it, such as ``dataset.transform.rng``.

    They are looked for whenever they are asked for: a sampler or a data set may make one at its first use.
    """

    def __init__(self, roots: Callable[[], Mapping[str, Any]]):
        self._roots = roots

    def find(self) -> dict[str, Any]:
        """All of them; the global ones are not among them, whoever refers to them."""
        return dict(_generators_in(self._roots()))

    def states(self) -> dict[str, Any]:
        """Kind and packed state of each."""
        return {name: entry(each, packed(read(each))) for name, each in self.find().items()}

    def write(self, saved: Mapping[str, Any]) -> None:
        """Put all into their saved states. One that is made at its first use, and that has not come yet, is made."""
        found = self.find()
        for name, entry in saved.items():
            generator = found[name] if name in found else self._make(name, entry["kind"])
            if kind_of(generator) != entry["kind"]:
                raise SetupError(
                    f"{name} is a {kind_of(generator)} generator; the checkpoint has the state of a {entry['kind']} one"
                )
            write(generator, entry["state"])

    def _make(self, name: str, kind: str) -> Any:
        """Put a generator where the former process had made one."""
        *way, last = name.split(".")
        holder: Any = self._roots()
        for part in way:
            holder = _step(holder, part)
        if holder is None or isinstance(holder, (*_PLAIN, Mapping, list, tuple)) or getattr(holder, last, None) is not None:
            raise SetupError(f"the checkpoint has the state of a random generator at {name}, where this process has none")
        setattr(holder, last, new_of(kind))
        return getattr(holder, last)


def entry(generator: Any, state: Any) -> dict[str, Any]:
    """A generator's kind and a state of it."""
    return {"kind": kind_of(generator), "state": state}


def _step(holder: Any, part: str) -> Any:
    """One part of a way: a key, a place in a list, or an attribute."""
    if isinstance(holder, Mapping):
        return next((value for key, value in holder.items() if str(key) == part), None)
    if isinstance(holder, (list, tuple)):
        return holder[int(part)] if part.isdigit() and int(part) < len(holder) else None
    return dict(_attributes(holder)).get(part)


def kind_of(generator: Any) -> str:
    """What a state fits: the class, the device, and numpy's algorithm."""
    if isinstance(generator, torch.Generator):
        return f"torch.{generator.device.type}"
    if isinstance(generator, np.random.Generator):
        return f"numpy.{type(generator.bit_generator).__name__}"
    return "numpy.RandomState" if isinstance(generator, np.random.RandomState) else "python"


def new_of(kind: str) -> Any:
    """A generator of a kind. Raises ValueError for what is none; nothing else that is named so is called."""
    package, _, what = kind.partition(".")
    if package == "torch":
        return torch.Generator(device=what)
    if kind == "numpy.RandomState":
        return np.random.RandomState()
    if kind == "python":
        return random.Random()
    if package == "numpy" and what in _BITS:
        return np.random.Generator(getattr(np.random, what)())
    raise ValueError(f"there is no generator of kind {kind!r}")


def is_kind(kind: str, state: Any) -> bool:
    """Would a new generator of this kind take this state? Of another device than the host's nobody tries."""
    if kind.startswith("torch.") and kind != "torch.cpu":
        return isinstance(state, np.ndarray)
    try:
        write(new_of(kind), state)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, OverflowError):
        return False
    return True


def _generators_in(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Walk over attributes and small containers, nearest first, each object once."""
    seen = {id(each) for each in global_generators().values()}
    level, depth = list(roots.items()), 0
    while level and depth < _DEEPEST and len(seen) < _MOST:
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if id(value) in seen or isinstance(value, _PLAIN):
                continue
            seen.add(id(value))
            if isinstance(value, GENERATORS):
                yield name, value
            else:
                below += [(f"{name}.{part}", each) for part, each in _attributes(value)]
        level, depth = below, depth + 1


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds: elements of a small container, what a function or a bound method refers to, else attributes."""
    if isinstance(value, (list, tuple, dict)):
        if len(value) <= _LONGEST:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((str(key), each) for key, each in items if "." not in str(key))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.FunctionType):
        yield from _referred_to(value)
    elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        yield "__self__", value.__self__
    else:
        yield from getattr(value, "__dict__", {}).items()
        for kind in type(value).__mro__:
            if kind.__module__.partition(".")[0] not in _PACKAGES:
                yield from _of_class(kind, value)


def _of_class(kind: type, value: Any) -> Iterator[tuple[str, Any]]:
    """Slots of an object, and generators at module level that its methods use."""
    slots = vars(kind).get("__slots__", ())
    for slot in (slots,) if isinstance(slots, str) else tuple(slots):
        if not slot.startswith("__") and hasattr(value, slot):
            yield slot, getattr(value, slot)
    for method in list(vars(kind).values()):
        if isinstance(method, types.FunctionType):
            yield from ((name, each) for name, each in _referred_to(method) if isinstance(each, GENERATORS))


def _referred_to(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Variables that a function closes over, and generators at module level that it uses."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for name in function.__code__.co_names:
        if isinstance(function.__globals__.get(name), GENERATORS):
            yield name, function.__globals__[name]
