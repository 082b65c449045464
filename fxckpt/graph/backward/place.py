"""Puts one op for each layer into the backward graph, and pins whoever reads a parameter before it.

Inductor may write a node into the kernel of whoever uses it, so a node that reads a parameter (the ``grad * weight`` of a
LayerNorm) may run later than it stands. A pin is an op behind it, for which it must be there; the layer's op takes it as an
input, so nothing can put the op before it.
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from fxckpt.graph import ops
from fxckpt.graph.backward.legal import LEGAL, LegalPoint, outputs_of
from fxckpt.graph.backward.region import Region
from fxckpt.graph.contract import finished

_REALIZED = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
"""Kernels of their own, which Inductor writes into no other."""


def pin_readers_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """An op behind each node that reads a parameter or a gradient, unless it is a kernel of its own."""
    points: list[LegalPoint] = gm.meta[LEGAL]
    for reader in dict.fromkeys(reader for point in points for reader in point.readers):
        if reader.target in _REALIZED or outputs_of(reader) != [reader]:
            continue  # what has several results is a call of its own, too
        with gm.graph.inserting_after(reader):
            gm.graph.call_function(ops.pin_reader, (reader,))
    return finished(gm)


def place_updates_pass(gm: fx.GraphModule, region: Region) -> fx.GraphModule:
    """An op at each layer's legal point: all that it waits for are its inputs. Parameters are none, for Inductor would hand it a
    copy of one that an op changes."""
    for point in gm.meta[LEGAL]:
        before = point.last.next
        while before.target in (operator.getitem, ops.pin_reader):
            before = before.next
        waits = list(dict.fromkeys(value for reader in point.readers for value in outputs_of(reader)))
        with gm.graph.inserting_before(before):
            gm.graph.call_function(ops.layer_ready, (list(point.gradients), list(point.inputs), waits, region.token, point.layer))
    return finished(gm)
