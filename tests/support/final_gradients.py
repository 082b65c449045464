"""When each gradient becomes final in an eager backward, and which orders of layers that contradicts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import nn


def finals(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, tuple[int, frozenset]]:
    """When each parameter's gradient became final in an eager backward, and the autograd nodes that it came from."""
    found: dict[str, tuple[int, frozenset]] = {}
    value = loss()
    feeders = _feeders(value.grad_fn)
    handles = [
        p.register_post_accumulate_grad_hook(lambda p, n=n: found.update({n: (len(found), feeders[id(p)])}))
        for n, p in model.named_parameters()
    ]
    value.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return found


def _feeders(root) -> dict[int, frozenset]:
    found: dict[int, set] = {}
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        for other, _ in node.next_functions:
            if other is None:
                continue
            if hasattr(other, "variable"):
                found.setdefault(id(other.variable), set()).add(node)
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return {i: frozenset(nodes) for i, nodes in found.items()}


def contradictions(layers, when: dict[str, tuple[int, frozenset]]) -> list[tuple[str, str]]:
    """Pairs of layers in the wrong order. A layer is final when its last gradient is. Layers whose last gradients come out
    of one autograd node are final at once: between them any order is right. A layer without any gradient comes last."""

    def final(layer):
        return max((when[p] for p in layer.params if p in when), key=lambda w: w[0], default=(len(when), frozenset()))

    return [(a.name, b.name) for a, b in combinations(layers, 2) if final(a)[0] > final(b)[0] and final(a)[1] != final(b)[1]]
