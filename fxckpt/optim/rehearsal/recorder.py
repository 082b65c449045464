"""Watches what an optimizer's own ``step()`` asks of PyTorch, on stand-ins that have no memory.

A class that is not of ``torch.optim`` may do anything, so nothing is assumed of it: its step runs, in plain Python, on
stand-ins of its parameters, gradients and states. What it computes with Python numbers, step counts and tensor
hyperparameters happens for real. What it asks of stand-ins is put on their tapes.

What would make a tape wrong for another tensor raises NotTraceable at once: a value read on the host, an operator over
two parameters, random numbers, a change of anything that is no stand-in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxckpt.compat.tracing import fake_mode, is_stand_in
from fxckpt.graph.update.foreach import data_of
from fxckpt.graph.update.trace import NotTraceable
from fxckpt.optim.rehearsal.stand_in import Hole, Op, Ref, StandIn

Args = tuple[Any, ...]

_TOLD = (
    "dtype device layout grad grad_fn is_leaf requires_grad is_sparse is_sparse_csr is_cuda is_cpu is_mps is_xpu is_meta "
    "is_mkldnn is_quantized is_nested"
)
_BLIND = {getattr(torch.Tensor, name).__get__ for name in _TOLD.split()} | {
    getattr(where, name) for where in (torch, torch.Tensor) for name in ("is_complex", "is_floating_point")
}
_BLIND |= {torch.is_tensor, torch.Tensor.get_device, torch.Tensor.type}
"""Functions and attributes from which no shape can be told, although they return no tensor."""

_REFUSED = {
    getattr(torch.Tensor, name): why
    for names, why in (
        ("data_ptr untyped_storage storage numpy __array__", "reads a tensor's memory itself"),
        ("requires_grad_", "changes requires_grad"),
        ("register_hook", "registers a hook"),
        ("__deepcopy__", "copies a parameter"),
        ("__reduce_ex__", "pickles a tensor"),
        ("backward", "runs autograd"),
    )
    for name in names.split()
}
_SET = (("data", "gives a parameter other data"), ("grad", "replaces a gradient"), ("requires_grad", "changes requires_grad"))
_REFUSED |= {getattr(torch.Tensor, name).__set__: why for name, why in _SET}
_DATA, _VERSION = (getattr(torch.Tensor, name).__get__ for name in ("data", "_version"))
_REFUSED[_VERSION] = "reads a version counter"
"""What looks behind a stand-in, or gives a tensor another identity than the one that a checkpoint knows."""


@functools.cache
def _kinds(target: Any) -> tuple[dict[int | str, str], frozenset[int | str]]:
    """Of an operator, by position and by name: its arguments' types, and which of them it writes to."""
    arguments = [] if target is data_of else [(key, a) for i, a in enumerate(target._schema.arguments) for key in (i, a.name)]
    return {key: str(a.type) for key, a in arguments}, frozenset(key for key, a in arguments if a.is_write)


def _written(target: Any, args: Args, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operator writes to."""
    written = _kinds(target)[1]
    return _tensors([value for key, value in [*enumerate(args), *kwargs.items()] if key in written])


class Recorder:
    """Watches one rehearsal. ``peeked``: the step's Python may have seen a shape; ``sized``: a size or a dimension is on a
    tape. Either way a tape is right for that one shape only."""

    def __init__(self, cast: Sequence[StandIn]):
        self.owner: dict[int, StandIn] = {each: stand_in for stand_in in cast for each in stand_in.names}
        self.host: dict[int, tuple[torch.Tensor, StandIn | None]] = {}  # tensors with values, and whose count they come from
        self.peeked: bool = False
        self.sized: bool = False
        self.reads_data: Any = False
        self.operators: int = 0
        self.refusal: NotTraceable | None = None  # kept, should the step catch it

    def add_count(self, tensor: torch.Tensor, owner: StandIn) -> None:
        """A copy of a step count, which the step may read and change."""
        self.host[id(tensor)] = (tensor, owner)

    def refuse(self, why: str) -> NotTraceable:
        """The exception to raise."""
        self.refusal = self.refusal or NotTraceable(why)
        return self.refusal

    # -- calls --

    def called(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        """One of PyTorch's Python functions, or an attribute of a tensor."""
        if not any(map(is_stand_in, _tensors((args, kwargs)))):
            return func(*args, **kwargs)
        if (why := _REFUSED.get(func)) is not None:
            raise self.refuse(f"it {why}")
        self.reads_data = func == _DATA  # comes down as a detach, from which it cannot be told
        out = func(*args, **kwargs)
        if not self.peeked and out is not None and func not in _BLIND and not _tensors(out):
            self.peeked = True
        return out

    # -- operators --

    def dispatched(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        """One operator: computed where it is the host's, noted where it is a stand-in's."""
        if func.namespace == "prim":  # asked by stand-ins themselves: their device
            return _fake(func, args, kwargs)
        if func.namespace == "profiler":  # around every step that has hooks
            return func(*args, **kwargs)
        if func.namespace != "aten":
            raise self.refuse(f"it calls {func}, which is not PyTorch's own")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.refuse(f"it draws random numbers ({func})")
        if torch.Tag.inplace_view in func.tags:
            raise self.refuse(f"it changes a tensor's shape ({func})")
        self.operators += 1
        if self.reads_data and func is torch.ops.aten.detach.default and (owner := self._owner(args[0])) is not None:
            self.reads_data = False
            return self._noted(owner, data_of, args, {}, functools.partial(_fake, func, args, {}))
        owners = {id(o): o for o in map(self._owner, _tensors((args, kwargs))) if o is not None}
        if not owners:
            return self._on_host(func, args, kwargs)
        if func._schema.name.startswith("aten::_foreach_"):
            return self._over_lists(func, args, kwargs)
        if len(owners) > 1:
            raise self.refuse(f"it updates a parameter by what it reads of another one ({func})")
        return self._body(next(iter(owners.values())), func, args, kwargs)

    def _owner(self, tensor: torch.Tensor) -> StandIn | None:
        """The stand-in that a tensor belongs to; None for one with values."""
        if not is_stand_in(tensor):
            return None
        found = self.owner.get(id(tensor))
        if found is None or id(tensor) not in found.names:
            raise self.refuse("it uses a tensor that no parameter of this step owns")
        return found

    def _on_host(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        """Compute with counts and hyperparameters; only what this rehearsal made may change."""
        if any(id(t) not in self.host for t in _written(func, args, kwargs)):
            raise self.refuse(f"it changes a tensor that is no parameter's ({func})")
        counted = {id(o): o for t in _tensors((args, kwargs)) if (o := self.host.get(id(t), (None, None))[1]) is not None}
        listed = func._schema.name.startswith("aten::_foreach_")
        if len(counted) > 1 and not listed:
            raise self.refuse(f"it computes with the counts of two parameters ({func})")
        out = func(*args, **kwargs)
        owners = [self.host[id(t)][1] for t in _tensors(args[0])] if listed and len(counted) > 1 else None
        for index, tensor in enumerate(_tensors(out)):
            if tensor.dim():
                raise self.refuse(f"it makes a tensor of its own ({func})")
            owner = owners[index] if owners else next(iter(counted.values()), None)
            self.host.setdefault(id(tensor), (tensor, owner))
        return out

    def _over_lists(self, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        """A list kernel is one operator for each element of its lists."""
        length, outs = len(args[0]), []
        for index in range(length):
            part = [[a[index]] if isinstance(a, (list, tuple)) else a for a in args]
            named = {k: [a[index]] if isinstance(a, (list, tuple)) else a for k, a in kwargs.items()}
            owners = {id(o): o for o in map(self._owner, _tensors((part, named))) if o is not None}
            if len(owners) != 1:
                raise self.refuse(f"a list kernel works on several parameters at once ({func})")
            out = self._body(next(iter(owners.values())), func, tuple(part), named)
            outs += list(out) if isinstance(out, (list, tuple)) else []
        return outs if func._schema.returns else None

    def _body(self, owner: StandIn, func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        if any(self._owner(t) is None for t in _written(func, args, kwargs)):
            raise self.refuse(f"a count or hyperparameter of it depends on the values of a tensor ({func})")

        def compute() -> Any:
            try:
                return _fake(func, args, kwargs)
            except Exception as error:
                if "DataDependent" in type(error).__name__ or "DynamicOutputShape" in type(error).__name__:
                    why = f"it branches on the values of a tensor, or computes with them on the host ({func})"
                    raise self.refuse(why) from None
                raise

        return self._noted(owner, func, args, kwargs, compute)

    def _noted(self, owner: StandIn, func: Any, args: Args, kwargs: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """Put an operator on the owner's tape."""
        kinds = _kinds(func)[0]
        encoded = tuple(self._encode(a, kinds.get(i, ""), owner) for i, a in enumerate(args))
        op = Op(func, encoded, tuple((k, self._encode(a, kinds.get(k, ""), owner)) for k, a in kwargs.items()))
        out = owner.next(op, compute)
        for tensor in _tensors(out):
            self.owner[id(tensor)] = owner
        return out

    def _encode(self, value: Any, kind: str, owner: StandIn) -> Any:
        """One argument: tensors by name, numbers as holes; sizes, dimensions and flags as they are."""
        if isinstance(value, torch.Tensor):
            if (holder := self._owner(value)) is not None:
                return Ref(holder.names[id(value)])
            if value.dim() or self.host.get(id(value), (None, owner))[1] not in (None, owner):
                raise self.refuse("it updates a parameter by another one's count, or by a tensor that is no parameter's")
            owner.scalars.append(value.clone())  # as it is now: the step may change it later
            return Hole(value.dtype)
        if isinstance(value, (list, tuple)):
            return tuple(self._encode(v, kind, owner) for v in value)
        if isinstance(value, bool) or not isinstance(value, (int, float, complex)):
            return value
        if isinstance(value, int) and "int" in kind:
            self.sized = True
            return value
        owner.scalars.append(value)
        return Hole(None)


def _fake(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """What the operator would return, without memory."""
    with fake_mode():
        return func(*args, **kwargs)


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for v in value for t in _tensors(v)]
