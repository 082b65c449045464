"""Inductor's backward graph and its schedule, and the autograd nodes of compiled regions: what updates in a backward need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

Change = Callable[[fx.Graph], None]
"""Changes a graph in place."""

Check = Callable[[Sequence[Any]], Collection[Any]]
"""Is shown a schedule; returns those of its nodes that are to be left out."""


def placing_options(change: Change, check: Check, key: Any, users: dict[str, Any]) -> dict[str, Any]:
    """Inductor's settings with which ``change`` gets each graph before it is lowered and ``check`` each schedule. ``key`` decides
    what they do, and joins the keys of Inductor's caches. ``users``: the settings given so far; their own passes come first.

    Both slots are hooks of Inductor; the second, which gets the schedule once kernels are fused, has no public name."""
    import torch._inductor.config as config

    slots = ("post_grad_custom_post_pass", "_post_fusion_custom_pass")
    graph_users, schedule_user = (users.get(slot, getattr(config, slot)) for slot in slots)
    return dict(zip(slots, (_graph_pass(change, key, graph_users), _schedule_pass(check, key, schedule_user))))


def _graph_pass(change: Change, key: Any, users: Any) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    chain = users if isinstance(users, (list, tuple)) else [users] if users is not None else []

    class GraphPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for user in chain:
                user(graph)
            change(graph)

        def uuid(self) -> Any | None:
            return _key("fxckpt-places-updates", key, chain, CustomGraphPass)

    return GraphPass()


def _schedule_pass(check: Check, key: Any, user: Any) -> Any:
    from torch._inductor.custom_graph_pass import CustomSchedulerPass

    chain = [] if user is None else [user]

    class SchedulePass(CustomSchedulerPass):
        def __call__(self, nodes: list[Any]) -> list[Any]:
            for each in chain:
                nodes = each(nodes)
            dropped = set(map(id, check(nodes)))
            return [node for node in nodes if id(node) not in dropped]

        def uuid(self) -> Any | None:
            return _key("fxckpt-verifies-updates", key, chain, CustomSchedulerPass)

        def __reduce__(self) -> Any:  # it is pickled into the keys, as it is
            return str, (repr(self.uuid() or id(self)),)

    return SchedulePass()


def _key(name: str, key: Any, chain: Sequence[Any], base: Any) -> Any | None:
    """What goes into the keys of the caches; None, which turns them off, where a user's pass has no identity."""
    ids = tuple(user.uuid() if isinstance(user, base) else None for user in chain)
    return (name, repr(key), *ids) if all(ids) else None


def scheduled(node: Any) -> tuple[frozenset[str], Collection[str], frozenset[str]]:
    """The names of all that a node of a schedule runs, those of what must have run before it, and those of the buffers that it
    reads."""
    return (
        frozenset(node.get_operation_names()),
        node.ancestors,
        frozenset(dep.name for each in node.get_nodes() for dep in each.read_writes.reads),
    )


def called_op(node: Any, op: Any) -> tuple[list[str], list[Any]] | None:
    """If the node of a schedule calls ``op``: the buffers among its arguments, in order, and its other arguments."""
    kernel: Any = getattr(node, "node", None)
    if getattr(kernel, "op_overload", None) is not op:
        return None
    return [value.get_name() for value in kernel.inputs], list(kernel.constant_args)


def region_nodes(outputs: Any, mark: str) -> Iterator[torch.autograd.graph.Node]:
    """The autograd nodes of the compiled region that gave these outputs: one, most often. AOTAutograd makes a Function of each
    region, whose backward is the compiled one; an output that is a view of another has a node of its own in front of it. Not
    those whose metadata has ``mark``: an earlier region's, of which this one's output may be a view."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "CompiledFunctionBackward":
            if mark not in node.metadata:
                yield node
        elif len(seen) < 64:
            stack += [behind for behind, _ in node.next_functions if behind is not None]


def accumulates(node: Any) -> bool:
    """Will the backward that is under way add to the gradient of the parameter whose accumulator ``node`` is? Not if it was asked
    for other gradients (``torch.autograd.grad``), where the engine does not even answer for a leaf that was asked for. Raises
    RuntimeError outside of a backward."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        if torch._C._current_graph_task_id() < 0:
            raise
        return False


def call_at_end_of_backward(function: Callable[[], None]) -> None:
    """Have it called when the backward that is under way is complete, and not if it is left by an exception."""
    engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    engine.queue_callback(function)


def autograd_is_compiled() -> bool:
    """Does compiled autograd trace backwards now? It runs hooks, but not when the ops of a region run."""
    from torch._dynamo import compiled_autograd

    return bool(compiled_autograd.compiled_autograd_enabled)
