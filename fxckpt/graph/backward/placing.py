"""Compiles a region with its updates placed: which passes its graphs go through, and what is left out of a wrong schedule."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.fx as fx

from fxckpt.compat.placing import called_op, placing_options, scheduled
from fxckpt.graph import ops, passes
from fxckpt.graph.backward.legal import LEGAL, find_legal_points_pass, placeholders_of
from fxckpt.graph.backward.place import pin_readers_pass, place_updates_pass
from fxckpt.graph.backward.region import Region
from fxckpt.graph.backward.verify import Kernel, verify_backward

log: logging.Logger = logging.getLogger("fxckpt")


class Placing:
    """The passes of one region's compile. Nothing of it can fail training: what raises places nothing."""

    def __init__(self, region: Region):
        self.region: Region = region
        self._inputs: Mapping[str, int] = {}  # the region's parameters by the names that the backward graph has for them

    def options(self, users: Mapping[str, Any]) -> dict[str, Any]:
        """Inductor's settings for it; see ``compat.placing.placing_options``."""
        return placing_options(self.change, self.check, [VERSION, self.region.token], dict(users))

    def change(self, graph: fx.Graph) -> None:
        """Place the updates, if this is the backward: a forward has no gradients."""
        gm = graph.owning_module
        chosen: passes.Chosen = {
            find_legal_points_pass: {"region": self.region}, pin_readers_pass: {}, place_updates_pass: {"region": self.region},
        }  # fmt: skip
        if not isinstance(gm, fx.GraphModule):
            return
        try:
            passes.run(gm, chosen, given=("region",))
            self._inputs = placeholders_of(graph) if gm.meta[LEGAL] else {}
        except Exception as error:
            log.warning("fxckpt: no update is placed in a backward (%s: %s)", type(error).__name__, error)
            self._inputs = {}
            for op in (ops.layer_ready, ops.pin_reader):
                for node in graph.find_nodes(op="call_function", target=op):
                    graph.erase_node(node)
        finally:
            gm.meta.pop(LEGAL, None)

    def check(self, nodes: Sequence[Any]) -> Collection[Any]:
        """The nodes of a schedule that call an op too early for its layer."""
        if not self._inputs:
            return []
        kernels = [self._kernel(node) for node in nodes]
        wrong = verify_backward(kernels, self.region.layers)
        for reason in wrong.values():
            log.warning("fxckpt: a layer is not updated inside the backward: %s", reason)
        return [node for node, kernel in zip(nodes, kernels) if kernel.layer in wrong]

    def _kernel(self, node: Any) -> Kernel:
        """What the check has to know of a node."""
        names, before, reads = scheduled(node)
        op = called_op(node, ops.layer_ready)
        if op is None:
            read = frozenset(self._inputs.get(name, name) for name in reads)
            return Kernel(names, before, frozenset() if called_op(node, ops.pin_reader) else read)
        (buffers, constants), bound = op, self.region.bound
        *inputs, _, layer = constants
        changed = {each.index for each in bound if each.layer == self.region.layers[layer]}
        return Kernel(names, before, frozenset(), layer, frozenset({*changed, *buffers[: len(inputs)]}))


VERSION = 1
"""Of what the passes make of a graph: a part of the caches' keys."""
