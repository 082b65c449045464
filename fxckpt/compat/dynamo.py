"""What Dynamo and AOTAutograd know of the graph being compiled, and keeping their hands off our frames."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from fxckpt.compat.modules import unwrap_model


def untraced(function: Callable, why: str | None = None, noticed: Callable | None = None) -> Callable:
    """``torch.compiler.disable``, at no cost while nothing is compiled: it takes a tenth of a millisecond when its code is cold,
    as it is after a backward pass. Dynamo sees a frame only while a callback is set, looks for the attribute where it would
    inline a call, and ``skip_code`` keeps it from the frame itself. All three are private; without them it is the function
    itself. ``why`` is for who asked for one graph without breaks; ``noticed`` is called before it, with the same arguments, where
    compiled code calls it."""

    def called(*args: Any, **kwargs: Any) -> Any:
        if noticed is not None:
            noticed(*args, **kwargs)
        return function(*args, **kwargs)

    disabled = torch.compiler.disable(function if noticed is None else called, reason=why)
    try:
        from torch._C._dynamo.eval_frame import get_eval_frame_callback
        from torch._dynamo.eval_frame import skip_code
    except ImportError:
        return disabled

    def quick(*args: Any, **kwargs: Any) -> Any:
        if get_eval_frame_callback() is None:
            return function(*args, **kwargs)
        return disabled(*args, **kwargs)

    wrapped: Any = functools.wraps(function)(quick)
    wrapped._torchdynamo_disable, wrapped._torchdynamo_disable_msg = True, why
    skip_code(quick.__code__)
    return wrapped


def only_inlined(function: Callable) -> Callable:
    """Have Dynamo trace ``function`` where it traces a caller, and never compile its frame by itself."""
    try:
        from torch._dynamo.eval_frame import skip_code
    except ImportError:
        return function
    skip_code(function.__code__)
    return function


def called_modules() -> list[torch.nn.Module]:
    """The modules whose call is under way on this thread, outermost first. Read from the stack, since no API tells a backend
    which model it compiles. ``Module.__call__`` is a frame of its own in front of every forward, hooked or compiled, so other
    methods of a module (a trainer's) do not count."""
    code = torch.nn.Module.__call__.__code__
    frame, found = inspect.currentframe(), []
    while frame is not None:
        if frame.f_code is code:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found[::-1]


def graph_input(node: fx.Node, example: Any) -> tuple[Any, Any]:
    """``(live object, Dynamo's source or None)`` of a placeholder; valid during the backend call only. ``grapharg`` is Dynamo's
    record of the input. It still holds the live parameter where the example does not: DDP's splits are compiled with fake
    examples. In the second split an activation has no ``grapharg``."""
    arg = node.meta.get("grapharg")
    if arg is None:
        return example, None
    return arg.example, arg.source


def source_name(source: Any) -> str:
    """Dynamo's path to an input, as text; a method in 2.11, a property in 2.13."""
    return source.name() if callable(source.name) else source.name


def compiling_scope() -> dict[str, dict[str, Any]] | None:
    """Locals and globals of the frame that Dynamo compiles right now, by the names its sources use; None outside."""
    from torch._dynamo.symbolic_convert import tls

    tx = getattr(tls, "current_tx", None)
    return None if tx is None else {"L": tx.output.local_scope, "G": tx.output.global_scope}


def compiled_module() -> weakref.ref[Any] | None:
    """The module whose method Dynamo compiles right now: the ``self`` of that frame. None where there is none. With
    ``block.compile()`` this is the block; the outermost module being called is the whole model."""
    scope = compiling_scope()
    owner = None if scope is None else scope["L"].get("self")
    return weakref.ref(unwrap_model(owner)) if isinstance(owner, torch.nn.Module) else None


def first_module(source: Any, scope: dict[str, dict[str, Any]] | None) -> torch.nn.Module | None:
    """The outermost module on the path ``source``, followed in ``scope``; None where it cannot be followed."""
    steps = []
    while source is not None:
        steps.append(source)
        source = getattr(source, "base", None)
    start, scope = steps.pop(), scope or {"L": {}, "G": {}}
    value = (
        scope["L"].get(start.local_name) if hasattr(start, "local_name") else scope["G"].get(getattr(start, "global_name", ""))
    )
    while not isinstance(value, torch.nn.Module) and value is not None and steps:
        value = _follow(value, steps.pop())
    return value if isinstance(value, torch.nn.Module) else None


def _follow(value: Any, step: Any) -> Any:
    if hasattr(step, "member"):
        return getattr(value, step.member, None)
    if not hasattr(step, "index"):
        return value  # a source that only marks what its base is
    try:
        return value[step.index]
    except (TypeError, LookupError):
        return None


def compile_under_way() -> tuple[int | None, weakref.ref[Any] | None]:
    """``(frame, token)``: a recompile keeps the frame and has another token; DDP's splits of a compile share both.
    ``torch.compiler`` offers no name for either. The frame's number starts again at 0 after ``torch._dynamo.reset()``; the token
    is Dynamo's context of this one compile."""
    current = torch._guards.CompileContext.current_compile_id()
    context = torch._guards.TracingContext.try_get()
    return getattr(current, "frame_id", None), None if context is None else weakref.ref(context)


def limits_reached() -> int:
    """How often Dynamo has given up compiling a function in this process, as it was compiled too often: it runs eagerly from then
    on. It counts by the texts of its graph breaks; there is no other record of it."""
    utils = sys.modules.get("torch._dynamo.utils")
    counted = {} if utils is None else utils.counters["unimplemented"]
    return sum(times for text, times in counted.items() if text.startswith("Dynamo recompile limit exceeded"))


def input_index(desc: Any) -> int | None:
    """Dynamo's placeholder index behind an AOTAutograd input descriptor, through subclass and view unpacking. The descriptors are
    AOTAutograd's only record of which placeholder of the joint graph is which input."""
    while desc is not None:
        if type(desc).__name__ == "PlainAOTInput":
            return desc.idx
        desc = getattr(desc, "base", None) or getattr(desc, "base_of", None)
    return None


def gradient_of(desc: Any) -> int | None:
    """Dynamo's placeholder index of the input whose gradient an AOTAutograd output is; None for other outputs."""
    while type(desc).__name__ == "SubclassGetAttrAOTOutput":
        desc = desc.base
    return input_index(desc.grad_of) if type(desc).__name__ == "GradAOTOutput" else None


def output_index(desc: Any) -> int | None:
    """Which output of Dynamo's graph an AOTAutograd output is; None for what AOTAutograd added."""
    return desc.idx if type(desc).__name__ == "PlainAOTOutput" else None


def is_view(node: fx.Node) -> bool:
    """Whether the node's result may share memory with its input: by the alias sets of the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def copied_graph_module(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """``graph``, made of nodes of Dynamo's ``gm``, as a module that compilers take for one of Dynamo's: what they look for is in
    its ``meta``, and, as where an input comes from, in an attribute of each placeholder."""
    made = fx.GraphModule(gm, graph, type(gm).__name__)
    made.meta.update(gm.meta)
    sources = {node.name: vars(node).get("_dynamo_source") for node in gm.graph.find_nodes(op="placeholder")}
    for node in graph.find_nodes(op="placeholder"):
        node._dynamo_source = sources.get(node.name)
    if hasattr(gm, "_param_name_to_source"):
        made._param_name_to_source = gm._param_name_to_source
    return made
