"""A body with 0-dimensional tensors where it was traced with numbers, for Inductor, which would bake a number in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.fx as fx

from fxckpt.graph.contract import finished
from fxckpt.graph.update.trace import NotTraceable

aten: Any = torch.ops.aten


def _at_least(x: Any, low: Any) -> Any:
    return x.clamp(min=low) if isinstance(low, (int, float)) else torch.maximum(x, low)


def _at_most(x: Any, high: Any) -> Any:
    return x.clamp(max=high) if isinstance(high, (int, float)) else torch.minimum(x, high)


_TENSOR_FORMS: dict[Any, Callable[..., Any]] = {
    # The Scalar overloads want a Python number; these compute the same formula, as eager's kernels write it.
    aten.lerp_.Scalar: lambda x, end, weight: x.add_((end - x) * weight),
    aten.lerp.Scalar: lambda x, end, weight: x + (end - x) * weight,
    aten.addcmul_.default: lambda x, a, b, value: x.add_(a * value * b),
    aten.addcmul.default: lambda x, a, b, value: x + a * value * b,
    aten.addcdiv_.default: lambda x, a, b, value: x.add_(a * value / b),
    aten.addcdiv.default: lambda x, a, b, value: x + a * value / b,
    aten.add_.Tensor: lambda x, y, alpha=None: x.add_(y if alpha is None else y * alpha),
    aten.add.Tensor: lambda x, y, alpha=None: x + (y if alpha is None else y * alpha),
    aten.sub_.Tensor: lambda x, y, alpha=None: x.sub_(y if alpha is None else y * alpha),
    aten.sub.Tensor: lambda x, y, alpha=None: x - (y if alpha is None else y * alpha),
    aten.mul_.Tensor: lambda x, y: x.mul_(y),
    aten.mul.Tensor: lambda x, y: x * y,
    aten.div_.Tensor: lambda x, y: x.div_(y),
    aten.div.Tensor: lambda x, y: x / y,
    aten.eq.Scalar: lambda x, y: x == y,
    aten.clamp_.default: lambda x, low, high: x.copy_(_at_most(_at_least(x, low), high)),
    aten.index_put_.default: lambda x, mask, value: x.copy_(torch.where(mask[0], value, x)),
    aten.pow.Tensor_Scalar: lambda x, y: x**y,
}


def tensor_scalars_pass(gm: fx.GraphModule, scalars: int) -> fx.GraphModule:
    """Translate the operators that read one of the last ``scalars`` inputs; raises NotTraceable where one has no such form."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs = gm.graph.find_nodes(op="placeholder")
    moving = set(inputs[len(inputs) - scalars :])
    tracer = fx.proxy.GraphAppendingTracer(graph)
    for node in gm.graph.nodes:
        if node.op != "call_function" or moving.isdisjoint(node.all_input_nodes):
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            continue
        form = _TENSOR_FORMS.get(node.target)
        if form is None:
            raise NotTraceable(f"no tensor form of {node.target} with a changing scalar")
        proxies: Any = fx.map_arg((node.args, node.kwargs), lambda n: cast(Any, fx.Proxy(mapping[n], tracer)))
        mapping[node] = form(*proxies[0], **proxies[1]).node
    return finished(fx.GraphModule(torch.nn.Module(), graph, "UpdateOfTensors"))
