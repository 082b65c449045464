"""The passes that split a traced update into scalars, computed once a step on the host, and the tensor work of each layer.

Left inside, the 0-dimensional arithmetic (step count, bias correction) is computed again for every parameter, and by
Inductor for every element: an AdamW step then takes two to four times as long.

``host`` advances the step counts of ONE parameter (the representative) and returns the scalars as doubles; whoever runs
it gives the other parameters of the same count the same new counts. ``body`` is all the rest:

* ``each``: traced for one parameter, called for each;
* ``columns``: traced for two; every tensor list is a whole *column* (all parameters, all gradients, ...), so the same
  graph serves lists of any length.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxckpt.graph.contract import finished
from fxckpt.graph.update.trace import NotTraceable, Role, Signature


@dataclass(frozen=True)
class Program:
    """An update ready to run.

    ``host(*counts, *hypers) -> tuple of scalars`` with ``counts`` the representative's 0-dim states, in the order of
    ``counts``, mutated in place. ``body(*columns, *scalars)`` takes for each entry of ``inputs`` one tensor (``each``)
    or the list of tensors (``columns``).
    """

    signature: Signature
    style: str  # "each" or "columns"
    host: fx.GraphModule
    body: fx.GraphModule
    counts: tuple[str, ...]
    inputs: tuple[tuple[str, Any], ...]  # ("param", None), ("grad", None), ("state", key)
    scalars: int
    dtypes: tuple[torch.dtype, ...] = ()  # of ``inputs``
    outcomes: tuple[bool, ...] = ()  # how its branches on counts and hyperparameters went
    branches: fx.GraphModule | None = None  # ``(*counts, *hypers) -> tuple of bools``; changes the counts it is given

    @property
    def key(self) -> Any:
        """What tells programs apart."""
        return self.signature, self.outcomes

    @property
    def grad_at(self) -> int:
        """Which of ``inputs`` is the gradient, the one that is another tensor at every step."""
        return [kind for kind, _ in self.inputs].index("grad")

    def asks(self, counts: Sequence[torch.Tensor], hypers: Sequence[Any]) -> tuple[bool, ...]:
        """How its branches go for these counts, which stay as they are, and hyperparameters."""
        if self.branches is None:
            return ()
        return tuple(map(bool, self.branches.forward(*(c.clone() for c in counts), *hypers)))

    def values(self, group: dict[str, Any]) -> list[Any]:
        """A parameter group's hyperparameters in the order in which ``host`` takes them."""
        return [group[name] if i is None else group[name][i] for name, i in self.signature.hyperparameters]


def spread(value: Any, column: Sequence[torch.Tensor]) -> list[Any]:
    """The scalar list of a ``ScalarList`` kernel: one value for each tensor of the column."""
    return [value] * len(column)


def mark_host_pass(gm: fx.GraphModule, counts: Sequence[str]) -> fx.GraphModule:
    """Mark each node with ``meta["host"]``: does it compute on the host, a number or an in-place change of a count? Raises
    NotTraceable where the update branches on anything else."""
    for node in gm.graph.nodes:
        node.meta["host"] = _is_host(node, counts)
    if not all(node.meta["host"] for node in gm.graph.output_node().all_input_nodes):
        raise NotTraceable("it branches on the values of a tensor")
    return finished(gm)


def _is_host(node: fx.Node, counts: Sequence[str]) -> bool:
    role = _role(node)
    if role is not None:
        return role.kind == "hyper" or (role.kind == "state" and role.key in counts)
    if node.op == "get_attr":
        return True  # a lifted constant, such as the 1 that list kernels add to their counts
    if node.op != "call_function" or not all(n.meta["host"] for n in node.all_input_nodes):
        return False
    return node.target is not operator.getitem and _is_small(node.meta.get("val"))


def _role(node: fx.Node) -> Role | None:
    """What a placeholder stands for."""
    return node.meta.get("role")


def _is_small(value: Any) -> bool:
    """A number, or a 0-dim tensor, or lists of them, or nothing at all."""
    if isinstance(value, (list, tuple)):
        return all(_is_small(v) for v in value)
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def snapshot_counts_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """Where the body reads a count that is changed later in the trace, let it read a copy: all host work runs first."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    root: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node.meta["host"] and _mutates(node):
            target: Sequence[Any] = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
            for each in target:
                written[root.get(each, each)] = order[node]
            if len(target) == 1:
                root[node] = root.get(target[0], target[0])
    for node in [n for n in order if not n.meta["host"] and n.op == "call_function"]:
        for read in node.all_input_nodes:
            if read.meta["host"] and written.get(root.get(read, read), -1) > order[node]:
                with gm.graph.inserting_before(node):
                    copied = gm.graph.call_function(torch.ops.aten.clone.default, (read,))
                copied.meta.update(val=read.meta.get("val"), host=True)
                node.replace_input_with(read, copied)
    return finished(gm)


def split(gm: fx.GraphModule, signature: Signature) -> Program:
    """Cut a traced update, all of whose host work may run first, in two. Raises NotTraceable where a tensor decides a scalar or
    a list is not a whole column."""
    host = _HostBuilder(gm, signature)
    body = _BodyBuilder(gm, host)
    body.build()
    branches = gm.graph.output_node().all_input_nodes
    return Program(
        signature,
        "each" if body.count == 1 else "columns",
        host.module(body.scalars),
        body.module(),
        counts_of(signature),
        tuple(body.inputs),
        len(body.scalars),
        tuple(node.meta["val"].dtype for node in body.columns.values()),
        gm.meta["outcomes"],
        host.module([host.map[node] for node in branches]) if branches else None,
    )


def counts_of(signature: Signature) -> tuple[str, ...]:
    """The 0-dimensional states that the host advances."""
    return tuple(key for key, scalar in signature.state if scalar)


def _mutates(node: fx.Node) -> bool:
    """Does this operator write to an argument?"""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


class _HostBuilder:
    """The host graph: every parameter's scalar chain folded onto the representative's, equal nodes made one."""

    def __init__(self, gm: fx.GraphModule, signature: Signature):
        self.graph, self.owner = fx.Graph(), gm
        self.map: dict[fx.Node, fx.Node] = {}
        self.known: dict[Any, fx.Node] = {}
        self.writes = 0  # in-place changes so far: what is read before and after one differs
        inputs: dict[tuple[str, Any], fx.Node] = {("state", key): self.graph.placeholder(key) for key in counts_of(signature)}
        for key in signature.hyperparameters:
            inputs["hyper", key] = self.graph.placeholder("_".join(str(k) for k in key if k is not None))
        for node in gm.graph.nodes:
            if node.meta["host"]:
                role = _role(node)
                self.map[node] = inputs[role.kind, role.key] if role else self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        """This node on the representative's values; the same node if another parameter's chain already has it."""
        args = tuple(_fold(a, self.map) for a in node.args)  # each apart: x * x is no list of parameters
        kwargs = _fold(node.kwargs, self.map)
        mutable = _mutates(node)
        roles = [role for n in node.all_input_nodes if (role := _role(n)) is not None]
        owners = {role.index for role in roles if role.kind == "state"}
        if mutable and owners and 0 not in owners:
            # Another parameter's count: the representative's was advanced by the twin of this node.
            key = (node.target, repr(args), repr(kwargs), "write")
            if key not in self.known:
                raise NotTraceable("the counts of two parameters are advanced differently")
            return self.known[key]
        key = (node.target, repr(args), repr(kwargs), "write" if mutable else str(self.writes))
        if not mutable and key in self.known:
            return self.known[key]
        self.writes += mutable
        copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        copied.meta["val"] = node.meta.get("val")
        self.known[key] = copied
        return copied

    def module(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """A module of this graph that returns ``results``: the scalars that the body reads, or how branches go."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.graph_copy(self.graph, copies)
        graph.output(tuple(copies[node] for node in results))
        for node in reversed(list(graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and not _mutates(node):
                graph.erase_node(node)
        return fx.GraphModule(self.owner, graph, "Scalars")


_FUNCTIONS = {torch.ops.aten.add_.Tensor: torch.Tensor.add_, torch.ops.aten._local_scalar_dense.default: torch.Tensor.item}


def native_calls_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """Call what PyTorch's own step calls, ``torch._foreach_add_``, where that was traced as an operator: the operator is the
    same, but takes its arguments apart several times as slowly, 10 us for one and 100 us for 200 tensors."""
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name.removeprefix("aten::")
            listed = getattr(torch, name, node.target) if name.startswith(("_foreach_", "_fused_")) else node.target
            node.target = _FUNCTIONS.get(node.target, listed)
    return finished(gm)


def _fold(value: Any, mapping: dict[fx.Node, fx.Node]) -> Any:
    """Arguments on the representative; a list of the same value once per parameter becomes a list of one."""
    if isinstance(value, fx.Node):
        return mapping[value]
    if isinstance(value, dict):
        return {k: _fold(v, mapping) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        folded = [_fold(v, mapping) for v in value]
        if len(folded) > 1 and isinstance(folded[0], fx.Node) and all(v is folded[0] for v in folded):
            folded = folded[:1]
        return type(value)(folded)
    return value


class _BodyBuilder:
    """The tensor graph, with scalars as inputs and (for list kernels) columns in place of tensors."""

    def __init__(self, gm: fx.GraphModule, host: _HostBuilder):
        self.traced, self.host, self.graph = gm.graph, host, fx.Graph()
        self.count = sum(role.kind == "param" for n in gm.graph.nodes if (role := _role(n)) is not None)
        self.map: dict[fx.Node, fx.Node] = {}
        self.inputs: list[tuple[str, Any]] = []
        self.scalars: list[fx.Node] = []
        self.columns: dict[tuple[str, Any], fx.Node] = {}
        self.placed: dict[fx.Node, fx.Node] = {}

    def build(self) -> None:
        """Copy every node that is not the host's."""
        self._declare_inputs()
        for node in self.traced.nodes:
            if node.meta["host"] or node.op in ("placeholder", "output"):
                continue
            if node.target is operator.getitem and self.count > 1:
                continue  # an element of a column; lists of them are folded back where they are used
            copied = self.graph.create_node(node.op, node.target, self._arg(node.args), self._arg(node.kwargs))
            copied.meta["val"] = node.meta.get("val")
            self.map[node] = copied

    def _declare_inputs(self) -> None:
        """Placeholders first: one for each column that the tensor work reads, then one for each scalar it reads."""
        body = [n for n in self.traced.nodes if not n.meta["host"] and n.op == "call_function"]
        read = dict.fromkeys(i for n in body for i in n.all_input_nodes)
        for node in self.traced.nodes:
            role = _role(node)
            if role is None or role.kind == "hyper" or node not in read:
                continue
            name = (role.kind, role.key)
            if name not in self.columns:
                label = {"param": "param", "grad": "grad"}.get(role.kind, str(role.key))
                self.columns[name] = self.graph.placeholder(label)
                self.columns[name].meta["val"] = node.meta.get("val")
                self.inputs.append(name)
        for node in read:
            if _is_scalar(node):
                value = self.host.map[node]
                if value not in self.placed:
                    self.placed[value] = self.graph.placeholder(f"scalar{len(self.scalars)}")
                    self.scalars.append(value)

    def _arg(self, value: Any) -> Any:
        """One argument of a body node, translated."""
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, dict):
            return {k: self._arg(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return tuple(self._arg(v) for v in value)
        if isinstance(value, list):
            return self._list(value)
        return value

    def _node(self, node: fx.Node) -> fx.Node:
        """A lone value: a scalar, an earlier result, or (for one parameter) an input."""
        if _is_scalar(node):
            return self.placed[self.host.map[node]]
        if (role := _role(node)) is not None:
            if self.count > 1:
                raise NotTraceable("a list kernel's graph uses one parameter apart from the others")
            return self.columns[role.kind, role.key]
        if node not in self.map:
            raise NotTraceable("a list kernel's graph uses one result apart from the others")
        return self.map[node]

    def _list(self, items: list) -> Any:
        """A list argument: of one parameter's tensors, or a whole column."""
        if not items or self.count == 1:
            return [self._arg(v) for v in items]
        if all(not isinstance(v, fx.Node) for v in items):
            return items
        if not all(isinstance(v, fx.Node) for v in items):
            raise NotTraceable("a list kernel's argument mixes constants and tensors")
        if len(items) != self.count:
            raise NotTraceable(f"a list of {len(items)} where {self.count} parameters were traced")
        first = _role(items[0])
        column = [] if first is None else [Role(first.kind, i, first.key) for i in range(len(items))]
        if first is not None and first.kind != "hyper" and [_role(v) for v in items] == column:
            return self.columns[first.kind, first.key]
        if all(v.target is operator.getitem and v.args == (items[0].args[0], i) for i, v in enumerate(items)):
            return self.map[items[0].args[0]]
        scalars = {self._node(v) for v in items if v.meta["host"]}
        if len(scalars) == 1 and all(v.meta["host"] for v in items):
            return self.graph.call_function(spread, (scalars.pop(), self.columns["param", None]))
        raise NotTraceable("a list kernel's argument is not a whole column")

    def module(self) -> fx.GraphModule:
        """The body returns nothing: it works in place."""
        self.graph.output(())
        return fx.GraphModule(torch.nn.Module(), self.graph, "Update")


def _is_scalar(node: fx.Node) -> bool:
    """A value that the host hands to the body: all of its values but the counts themselves."""
    role = _role(node)
    return node.meta["host"] and (role is None or role.kind == "hyper")
