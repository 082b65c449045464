"""Run a single-tensor update over lists of tensors, with the same kernels and the same bits.

Each operator of the body becomes its ``_foreach`` form. On CPU those are loops in C++ over the very kernels that the
single-tensor operators call ("slow path" in ATen's ForeachOpsKernels.cpp): only Python's share is gone, for a 64x64 parameter
most of the time. What a rehearsal noted may hold any operator: there, list kernels over one tensor become list kernels over all,
and an operator that has no list form runs in a loop.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.fx as fx

from fxckpt.graph.contract import finished
from fxckpt.graph.update.hoist import spread
from fxckpt.graph.update.trace import NotTraceable

aten: Any = torch.ops.aten

GROUP_BYTES = 1 << 21
"""Bytes of all columns that one group of a list kernel may touch. The operators go over a group one after the other; in a group
this small each finds in the cache what the last one left there. Measured, AdamW on 200 tensors of 64x64 against the stock step:
512 KiB take 1.2 of foreach's time and 0.67 of the single-tensor form's, 2 MiB 1.0 and 0.58; more gain nothing."""


def data_of(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.data``, as a node: no operator makes an alias whose changes autograd does not see."""
    return tensor.data


def datas_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The list form of ``data_of``."""
    return [t.data for t in tensors]


_SCALAR, _LIST = "scalar", "list"
_FORMS: dict[Any, dict[str, Callable]] = {
    # operator -> its list form by what its second operand is
    aten.add_.Tensor: {_SCALAR: torch._foreach_add_, _LIST: torch._foreach_add_},
    aten.add.Tensor: {_SCALAR: torch._foreach_add, _LIST: torch._foreach_add},
    aten.sub_.Tensor: {_SCALAR: torch._foreach_sub_, _LIST: torch._foreach_sub_},
    aten.sub.Tensor: {_SCALAR: torch._foreach_sub, _LIST: torch._foreach_sub},
    aten.mul_.Tensor: {_SCALAR: torch._foreach_mul_, _LIST: torch._foreach_mul_},
    aten.mul.Tensor: {_SCALAR: torch._foreach_mul, _LIST: torch._foreach_mul},
    aten.div_.Tensor: {_SCALAR: torch._foreach_div_, _LIST: torch._foreach_div_},
    aten.div.Tensor: {_SCALAR: torch._foreach_div, _LIST: torch._foreach_div},
    aten.lerp_.Scalar: {_LIST: torch._foreach_lerp_},
    aten.addcmul_.default: {_LIST: torch._foreach_addcmul_},
    aten.addcdiv_.default: {_LIST: torch._foreach_addcdiv_},
    aten.sqrt.default: {"": torch._foreach_sqrt},
    aten.sqrt_.default: {"": torch._foreach_sqrt_},
    aten.neg.default: {"": torch._foreach_neg},
    aten.abs.default: {"": torch._foreach_abs},
    aten.sign.default: {"": torch._foreach_sign},
    aten.sign_.default: {"": torch._foreach_sign_},
    aten.lerp.Scalar: {_LIST: torch._foreach_lerp},
    data_of: {"": datas_of},
}


_REDUCED = (torch.bfloat16, torch.float16)


def _multiply_(tensors: list[torch.Tensor], number: Any) -> Any:
    """``t.mul_(number)`` over a list of tensors of a reduced type: it multiplies by the number as float32, as it does by a tensor
    of one element, where ``torch._foreach_mul_(tensors, number)`` rounds the number to the type first."""
    return torch._foreach_mul_(tensors, torch.as_tensor(number, dtype=torch.float64))


_IN_PLACE = {getattr(aten, name).Tensor: getattr(aten, f"{name}_").Tensor for name in ("add", "sub", "mul", "div")}
_NEW = frozenset({*_IN_PLACE, aten.sqrt.default, aten.neg.default, aten.abs.default})  # their result is nobody else's memory


def _is_spent(value: fx.Node, reader: fx.Node) -> bool:
    """Is this a temporary that nobody but ``reader`` reads, and can it hold what ``reader`` makes of it?"""
    made, held = reader.meta.get("val"), value.meta.get("val")
    fits = made is None or held is None or (made.shape == held.shape and made.dtype == held.dtype)
    return fits and value.target in _NEW and set(value.users) == {reader} and reader.all_input_nodes.count(value) == 1


def widen_to_lists_pass(gm: fx.GraphModule, columns: int, dtypes: Sequence[torch.dtype], loops: bool = False) -> fx.GraphModule:
    """A body of single-tensor operators with list kernels; raises NotTraceable if an operator of it has none. The first
    ``columns`` inputs are tensors, of ``dtypes``. With ``loops`` any operator without a list form runs in a loop."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    tensors = set(gm.graph.find_nodes(op="placeholder")[:columns])
    for node in gm.graph.nodes:
        if node.op != "call_function":
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            continue
        form = _form(node, tensors, dtypes)
        if form is not None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), mapping.__getitem__)
            if node.target in (aten.addcmul_.default, aten.addcdiv_.default):  # their list forms name no scalar
                args, kwargs = (*args, kwargs.get("value", 1)), {}
            mapping[node] = graph.call_function(form, args, dict(kwargs))
        elif loops and (copied := _widened(node, tensors, graph, mapping)) is not None:
            mapping[node] = copied
        else:
            raise NotTraceable(f"{node.target} has no list form")
        tensors.add(node)
    return finished(fx.GraphModule(torch.nn.Module(), graph, "ListUpdate"))


def call_methods_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """A body with methods of ``torch.Tensor``, as PyTorch's own step calls them: for one tensor at a time they take less than
    operators or lists of one."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target in _FORMS:
            target = _over_its_temporary(node) or node.target
            mapping[node].target = getattr(torch.Tensor, target._schema.name.removeprefix("aten::"))
    return finished(fx.GraphModule(gm, graph, "TensorUpdate"))


def _over_its_temporary(node: fx.Node) -> Any:
    """The operator that writes its result over its first operand, if nobody else wants that; else None."""
    in_place = _IN_PLACE.get(cast(Any, node.target))
    return in_place if in_place is not None and _is_spent(cast(fx.Node, node.args[0]), node) else None


def _widened(node: fx.Node, tensors: set[fx.Node], graph: fx.Graph, mapping: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """An operator without a list form, over lists: a list kernel on one tensor, its result, or any other one in a loop. None
    where a tensor stands inside an argument."""
    arguments: list[Any] = [*node.args, *node.kwargs.values()]
    if node.target is operator.getitem:  # the only element of what a list kernel returned
        return mapping[arguments[0]] if _is_list_kernel(arguments[0].target) else None
    function = cast(Callable[..., Any], node.target)
    if not _is_list_kernel(node.target):
        inside = [v for a in arguments if isinstance(a, (list, tuple)) for v in a if isinstance(v, fx.Node)]
        if inside:
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), mapping.__getitem__)
        places = [i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a in tensors]
        names = [k for k, a in node.kwargs.items() if isinstance(a, fx.Node) and a in tensors]
        return graph.call_function(_loop(function, places, names), args, dict(kwargs)) if places else None
    if any(isinstance(a, fx.Node) and a in tensors for a in arguments):
        return None
    column = mapping[arguments[0][0]]

    def wide(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return mapping[value[0]] if value[0] in tensors else graph.call_function(spread, (mapping[value[0]], column))
        return mapping[value] if isinstance(value, fx.Node) else value

    return graph.call_function(function, tuple(map(wide, node.args)), {k: wide(v) for k, v in node.kwargs.items()})


def _is_list_kernel(target: Any) -> bool:
    """Is it one of PyTorch's ``_foreach`` operators?"""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name.startswith("aten::_foreach_")


def _loop(target: Callable, places: Sequence[int], names: Sequence[str]) -> Callable:
    """``target`` over lists: those arguments, by position and by name, are columns."""

    def loop(*args: Any, **kwargs: Any) -> list[Any]:
        out, row, named = [], list(args), dict(kwargs)
        for index in range(len(args[places[0]])):
            for place in places:
                row[place] = args[place][index]
            for name in names:
                named[name] = kwargs[name][index]
            out.append(target(*row, **named))
        return out

    return loop


def _form(node: fx.Node, tensors: set[fx.Node], dtypes: Sequence[torch.dtype]) -> Callable | None:
    """The list form of one operator; None if there is none that does just the same. ``dtypes``: those of its program."""
    forms = _FORMS.get(node.target)
    first = node.args[0] if node.args else None
    if forms is None or not isinstance(first, fx.Node) or first not in tensors:
        return None
    if "" in forms:
        return forms[""]
    if (in_place := _over_its_temporary(node)) is not None:
        forms = _FORMS[in_place]  # a new tensor costs its page faults; the bits are the same
    second = _LIST if node.args[1] in tensors else _SCALAR
    if second == _SCALAR and "alpha" in node.kwargs:
        return None
    if second == _SCALAR and forms is _FORMS[aten.mul_.Tensor]:
        held = first.meta.get("val")
        reduced = any(dtype in _REDUCED for dtype in (*dtypes, getattr(held, "dtype", None)))
        return _multiply_ if reduced else forms[second]
    return forms.get(second)


PARALLEL = 32768
"""Elements from which on PyTorch's kernels use several cores (``at::internal::GRAIN_SIZE``)."""


def groups(columns: Sequence[Sequence[torch.Tensor]], threads: int = 1) -> list[slice]:
    """Cut equally long columns into groups of at most ``GROUP_BYTES``, or of one member that is larger; for several threads into
    a multiple of their number that are about equally large, where there are so many members."""
    sizes = [sum(t.nbytes for t in row) for row in zip(*columns)]
    if not sizes:
        return []
    if threads > 1:
        total, parts = sum(sizes) or 1, threads * max(1, -(-sum(sizes) // (threads * GROUP_BYTES)))
        middles = [end - size / 2 for end, size in zip(itertools.accumulate(sizes), sizes)]
        cuts = [i for i in range(1, len(sizes)) if middles[i] * parts // total != middles[i - 1] * parts // total]
    else:
        cuts, filled = [], 0
        for index, size in enumerate(sizes):
            if index and filled + size > GROUP_BYTES:
                cuts.append(index)
                filled = 0
            filled += size
    return [slice(first, end) for first, end in zip([0, *cuts], [*cuts, len(sizes)])]
