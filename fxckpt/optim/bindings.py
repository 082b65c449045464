"""Which tensors an optimizer's parameters and state are bound to, and what was replaced, moved or restructured since.

This is asked at every step, so the comparisons run at C speed; what changed is looked for only when something did.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from fxckpt.compat.optimizers import is_stock, settings_of
from fxckpt.compat.spread import is_spread, local
from fxckpt.graph.update.hoist import Program
from fxckpt.graph.update.trace import is_count, numeric_items, tensor_items
from fxckpt.optim.held import HeldWeakly

_END = object()
"""Behind the last object, so that one more or one less is another sequence."""

_params_of = operator.itemgetter("params")


def is_dense(value: object) -> bool:
    """Is it a tensor with memory of its own? Sparse gradients make sparse momentum."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


class BoundParam:
    """A parameter, the tensors of its state as they were when they were bound, and the program that updates them.

    ``param`` is what the optimizer has, ``local`` what lies in memory here: of a DTensor, this rank's part. The same of ``own``,
    the optimizer's own dict, where it has one, and of ``state``.
    """

    def __init__(self, name: str, param: torch.Tensor, group: int, index: int, state: dict[str, Any] | None):
        self.name: str = name
        self.param: torch.Tensor = param
        self.local: torch.Tensor = local(param)
        self.group: int = group
        self.own: dict[str, Any] = {} if state is None else state
        spread = any(map(is_spread, self.own.values()))
        self.state: dict[str, Any] = {key: local(value) for key, value in self.own.items()} if spread else self.own
        self.index = index  # among all of its optimizer
        self.address: int = self.local.data_ptr()
        self.entries: int = len(self.own)
        tensors = ((k, v) for k, v in sorted(self.state.items()) if is_dense(v))
        self.items: list[tuple[str, torch.Tensor, int]] = [(key, value, value.data_ptr()) for key, value in tensors]
        self.program: Program | None = None
        self.implementation = "single"
        self.compile = False
        self.flat = False  # its update is compiled, over its elements in the order of memory

    def stale(self) -> bool:
        """Was a tensor of it replaced or moved since it was bound? ``Bindings`` asks whether ``state`` is the optimizer's."""
        if local(self.param) is not self.local or self.local.data_ptr() != self.address or len(self.own) != self.entries:
            return True
        get = self.own.get
        return any(value is not local(get(key)) or value.data_ptr() != address for key, value, address in self.items)

    def bound(self, kind: str, key: str) -> torch.Tensor:
        """The tensor behind one input of a program; the parameter in place of its gradient, another one at every step."""
        return self.state[key] if kind == "state" else self.local

    @property
    def plain(self) -> bool:
        """Does it have state that is no tensor, or a sparse one, which may change without a new binding?"""
        return len(self.items) != len(self.state)

    def describe(self) -> dict[str, Any]:
        """Its state for the record: what it takes, with the files' tensors, to make it anew just as it is."""
        return {
            "keys": list(self.state),
            "strides": {k: tuple(t.stride()) for k, t, _ in self.items if not t.is_contiguous()},
            "complex": [k for k, t, _ in self.items if t.is_complex()],
            "plain": {k: v for k, v in self.state.items() if not is_dense(v)},
            "host": [k for k, t, _ in self.items if t.device.type == "cpu" and self.local.device.type != "cpu"],
        }

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What the layer owns of this parameter: ``("", parameter)`` and its state by key, less the counts."""
        return [("", self.local)] + [(k, v) for k, v, _ in self.items if not is_count(k, v, self.param)]

    def whole(self, key: str) -> torch.Tensor:
        """What the optimizer has, of one of these tensors or counts."""
        return self.own[key] if key else self.param

    def counts(self) -> list[tuple[str, torch.Tensor]]:
        """The 0-dimensional states, which advance before all updates."""
        return [(k, v) for k, v, _ in self.items if is_count(k, v, self.param)]


class Bindings:
    """The parameters of one optimizer as they were bound last, and whether they still are what the optimizer holds."""

    opt: HeldWeakly = HeldWeakly()

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt
        self.members: list[BoundParam] = []
        self.number: int = 0  # how often tensors were bound: what was made for another binding is void
        self._state: object = None
        self._states: list[dict[str, Any]] = []
        self._params: list[object] = []  # those of the groups, and _END
        self._traced = is_stock(opt)  # others may change their groups in every step, and are looked at in every step
        self._structure: list[tuple[Any, ...]] = []  # what of the groups decides which code runs
        self._names: list[str] = []  # of the entries of the groups, when they were compared last, ...
        self._values: list[object] = []  # ... and their values
        self._held = HeldTensors(())

    def take(self, members: Sequence[BoundParam]) -> None:
        """These are the optimizer's parameters now."""
        self.members = list(members)
        self._state, self._states = self.opt.state, list(self.opt.state.values())
        self._params = [*(m.param for m in members), _END]
        self._structure, self._names, self._values = self._structure_now(), [], []
        self._held = HeldTensors(members)
        self.number += 1

    def invalidate(self) -> None:
        """Forget the bindings: tensors were replaced, or a parameter group was added."""
        self._state = None

    def stale(self, copies: bool = True) -> bool:
        """Must tensors be bound anew before the next step? (Fence everything first: copies read the old ones.) Where those of the
        state lie is asked only for ``copies``, rehearsals and compiled code: PyTorch's own kernels find them anywhere."""
        state = self.opt.state
        params = itertools.chain(itertools.chain.from_iterable(map(_params_of, self.opt.param_groups)), (_END,))
        return (
            self._state is not state
            or len(state) != len(self._states)
            or not all(map(operator.is_, state.values(), self._states))
            or self._restructured()
            or not all(map(operator.is_, params, self._params))
            or self._held.moved(copies or not self._traced)
        )

    def replaced(self) -> list[str]:
        """Names of the parameters whose tensors are not those that were bound."""
        if not self.stale():
            return []
        state, members = self.opt.state, self.members
        given = list(itertools.chain.from_iterable(map(_params_of, self.opt.param_groups)))
        if len(given) != len(members):
            return [members[-1].name if members else "the first parameter"]
        if others := [m.name for m, param in zip(members, given) if m.param is not param]:
            return others
        # Whoever looks at opt.state[p] of a parameter without state makes an empty one: nothing was replaced.
        return [m.name for m in members if m.stale() or (state.get(m.param) or None) is not (m.own or None)]

    def _restructured(self) -> bool:
        """Did the groups change in what decides which code runs? Most steps find the very objects of the step before."""
        groups = self.opt.param_groups
        names = list(itertools.chain.from_iterable(groups))
        values = list(itertools.chain.from_iterable(map(dict.values, groups)))
        if names == self._names and all(map(operator.is_, values, self._values)):
            return False
        changed = self._structure != self._structure_now()
        # A list may change and stay the same object; the parameters, which are one, are compared one by one elsewhere.
        lists = any(isinstance(value, list) for name, value in zip(names, values) if name != "params")
        self._names, self._values = ([], []) if changed or lists else (names, values)
        return changed

    def _structure_now(self) -> list[tuple[Any, ...]]:
        return [self._of(group) if self._traced else (len(group["params"]),) for group in self.opt.param_groups]

    def _of(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """How many parameters a group has, its flags and integers, which of its other numbers are zero or negative, and the types
        and shapes of its tensors."""
        numbers = tuple((key, (value > 0) - (value < 0)) for key, value in numeric_items(group) if key[0] != "lr")
        read = settings_of(self.opt) - {"lr"}
        fixed = tuple((name, _fixed(value)) for name, value in group.items() if name in read)
        tensors = tuple((key, value.dtype, tuple(value.shape)) for key, value in tensor_items(group))
        return len(group["params"]), numbers, fixed, tensors


def _fixed(value: object) -> object:
    """Of an entry of a group what is part of the traced update: an integer, a flag; of anything else its type."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_fixed, value))
    return value if value is None or isinstance(value, (bool, int, str)) else type(value)


class HeldTensors:
    """Where the tensors of all parameters and states were when they were bound."""

    def __init__(self, members: Sequence[BoundParam]):
        self._mixed = [m for m in members if m.plain]  # with state that is no tensor, or a sparse one
        simple = [m for m in members if not m.plain]
        self._states = [m.own for m in simple]
        values = [value for state in self._states for value in state.values()]
        self._values = [*values, _END]
        self._spread = [t for t in (*(m.param for m in simple), *values) if is_spread(t)]
        self._parts = [local(t) for t in self._spread]
        self._all = [m.local for m in simple] + [local(value) for value in values]
        # Those of them whose place matters between copies, too: counts, and all that compiled code changes.
        self._fixed = [
            t for m in simple for t in (m.local, *([v for _, v, _ in m.items] if m.flat else [v for _, v in m.counts()]))
        ]
        self._all_addresses = [t.data_ptr() for t in self._all]
        self._fixed_addresses = [t.data_ptr() for t in self._fixed]

    def moved(self, copies: bool) -> bool:
        """Was one replaced or given other memory? ``BoundParam.stale`` for all of them, at C speed."""
        values = itertools.chain(itertools.chain.from_iterable(map(dict.values, self._states)), (_END,))
        tensors, addresses = (self._all, self._all_addresses) if copies else (self._fixed, self._fixed_addresses)
        return (
            not all(map(operator.is_, values, self._values))
            or list(map(torch.Tensor.data_ptr, tensors)) != addresses
            or not all(map(operator.is_, map(local, self._spread), self._parts))
            or (bool(self._mixed) and any(m.stale() for m in self._mixed))
        )
