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
from fxckpt.graph.update.trace import numeric_items, tensor_items
from fxckpt.optim.bound_param import BoundParam

_END = object()
"""Behind the last object, so that one more or one less is another sequence."""

_params_of = operator.itemgetter("params")


class Bindings:
    """The parameters of one optimizer as they were bound last, and whether they still are what the optimizer holds."""

    def __init__(self, opt: torch.optim.Optimizer):
        self.opt = opt
        self.members: list[BoundParam] = []
        self.number: int = 0  # how often tensors were bound: what was made for another binding is void
        self._state: object = None
        self._states: list[dict[str, Any]] = []
        self._params: list[object] = []  # those of the groups, and _END
        self._traced = is_stock(opt)  # others may change their groups in every step, and are looked at in every step
        self._groups = GroupStructure(opt, self._traced)
        self._held = HeldTensors(())

    def take(self, members: Sequence[BoundParam]) -> None:
        """These are the optimizer's parameters now."""
        self.members = list(members)
        self._state, self._states = self.opt.state, list(self.opt.state.values())
        self._params = [*(m.param for m in members), _END]
        self._groups.take()
        self._held = HeldTensors(members)
        self.number += 1

    def invalidate(self) -> None:
        """Forget the bindings: tensors were replaced, or a parameter group was added."""
        self._state = None

    def stale(self, copies: bool = True) -> bool:
        """Must tensors be bound anew before the next step? (fence everything first: copies read the old ones)

        Where the tensors of the state lie is asked only for ``copies``, for rehearsals, and where compiled code updates them:
        PyTorch's own kernels find them wherever they are.
        """
        state = self.opt.state
        params = itertools.chain(itertools.chain.from_iterable(map(_params_of, self.opt.param_groups)), (_END,))
        return (
            self._state is not state
            or len(state) != len(self._states)
            or not all(map(operator.is_, state.values(), self._states))
            or self._groups.changed()
            or not all(map(operator.is_, params, self._params))
            or self._held.moved(copies or not self._traced)
        )

    def replaced(self) -> list[str]:
        """Names of the parameters whose tensors are not those that were bound."""
        state, members = self.opt.state, self.members
        given = list(itertools.chain.from_iterable(map(_params_of, self.opt.param_groups)))
        if len(given) != len(members):
            return [members[-1].name if members else "the first parameter"]
        if others := [m.name for m, param in zip(members, given) if m.param is not param]:
            return others
        # Whoever looks at opt.state[p] of a parameter without state makes an empty one: nothing was replaced.
        return [m.name for m in members if m.stale() or (state.get(m.param) or None) is not (m.state or None)]


class GroupStructure:
    """What of an optimizer's parameter groups decides which code runs, and whether that has changed."""

    def __init__(self, opt: torch.optim.Optimizer, traced: bool):
        self.opt: torch.optim.Optimizer = opt
        self._traced = traced
        self._structure: list[tuple[Any, ...]] = []
        self._names: list[str] = []  # of the entries of the groups, when they were compared last, ...
        self._values: list[object] = []  # ... and their values

    def take(self) -> None:
        """It is as it should be now."""
        self._structure, self._names, self._values = self._now(), [], []

    def changed(self) -> bool:
        """Is it another one? Most steps find the very objects of the step before."""
        groups = self.opt.param_groups
        names = list(itertools.chain.from_iterable(groups))
        values = list(itertools.chain.from_iterable(map(dict.values, groups)))
        if names == self._names and all(map(operator.is_, values, self._values)):
            return False
        changed = self._structure != self._now()
        # A list may change and stay the same object; the parameters, which are one, are compared one by one elsewhere.
        lists = any(isinstance(value, list) for name, value in zip(names, values) if name != "params")
        self._names, self._values = ([], []) if changed or lists else (names, values)
        return changed

    def _now(self) -> list[tuple[Any, ...]]:
        return [self._of(group) if self._traced else (len(group["params"]),) for group in self.opt.param_groups]

    def _of(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """How many parameters a group has, its flags and integers, which of its other numbers are zero or negative, and the
        types and shapes of its tensors."""
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
        self._states = [m.state for m in simple]
        values = [value for state in self._states for value in state.values()]
        self._values = [*values, _END]
        self._all = [m.param for m in simple] + values
        # Those of them whose place matters between copies, too: counts, and all that compiled code changes.
        self._fixed = [
            t for m in simple for t in (m.param, *([v for _, v, _ in m.items] if m.flat else [v for _, v in m.counts()]))
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
            or (bool(self._mixed) and any(m.stale() for m in self._mixed))
        )
