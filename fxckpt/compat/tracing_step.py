"""What Dynamo has traced so far of a function that is about to call ``opt.step()``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

_OF_SCHEDULERS = frozenset({"_opt_called"})
"""What a step itself sets on its optimizer, for schedulers."""


@dataclass(frozen=True)
class Traced:
    """``backend``: the user's own; ``begins``: it is the function from its beginning, and not what is left of it behind a break;
    ``targets``: those of the graph's nodes; ``backward``: one is in the graph; ``context``: one is open around the step;
    ``state``: the function has looked at the optimizer's state; ``waits``: a change of the optimizer that Dynamo makes only
    behind the whole graph, in words; empty if there is none."""

    backend: Any
    begins: bool
    targets: list[Any]
    backward: bool
    context: bool
    state: bool
    waits: str


def traced_so_far(opt: torch.optim.Optimizer) -> Traced | None:
    """Of the function that Dynamo traces now; None outside. What Dynamo keeps of a compile has no public face."""
    from torch._dynamo.symbolic_convert import tls

    tx = getattr(tls, "current_tx", None)
    if tx is None:
        return None
    forget_source_of_none()
    targets = [node.target for node in tx.output.graph.nodes]
    entered = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    context = not torch.is_grad_enabled() or targets.count(entered[0]) != targets.count(entered[1])
    begins = not tx.output.root_tx.f_code.co_name.startswith("torch_dynamo_resume_in_")
    backward, waits = torch.autograd.grad in targets, _waits(tx.output.side_effects, opt)
    state = id(opt.state) in tx.output.side_effects.id_to_variable
    return Traced(innermost(tx.output.compiler_fn), begins, targets, backward, context, state, waits)


def innermost(backend: Any) -> Any:
    """The backend that the user named, behind Dynamo's wrappers, the options, and wrappers that say what they wrap."""
    while True:
        for name in ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__"):
            inner = getattr(backend, name, None)
            if callable(inner):
                backend = inner
                break
        else:
            return backend


def _waits(effects: Any, opt: torch.optim.Optimizer) -> str:
    """Dynamo runs what a function does to Python objects behind the graph."""

    def changed(value: object, but: Collection[str] = ()) -> bool:
        var = effects.id_to_variable.get(id(value))
        if var is None:
            return False
        attributes = set(effects.store_attr_mutations.get(var, ()))
        return bool(attributes.difference(but)) if attributes else bool(effects.is_modified(var))

    if changed(opt, _OF_SCHEDULERS):
        return "an attribute of the optimizer"
    groups = opt.param_groups
    if changed(groups) or any(changed(group) or changed(group["params"]) for group in groups):
        return "a setting of the optimizer"
    state: Any = opt.state
    if changed(state) or any(changed(each) for each in state.values()):
        return "the optimizer's state"
    if any(changed(p, {"grad"}) for group in groups for p in group["params"]):
        return "an attribute of a parameter"
    return ""


def forget_source_of_none() -> None:
    """Dynamo 2.13 has one object for all ``None`` that it meets, and where a function reads ``p.grad`` after it has set it to
    None, notes there that None is found in ``p.grad``: compiled code then sets gradients to whatever is there at that moment, in
    every function of the process. To be called while Dynamo traces, before it writes code."""
    constant = sys.modules.get("torch._dynamo.variables.constant")
    none = getattr(constant, "CONSTANT_VARIABLE_NONE", None)
    if none is not None:
        none.source = None


def compiled_by_itself(of: str) -> bool:
    """Does ``torch.compile`` itself call the function of module ``of`` whose call is under way, and no script?"""
    frame: Any = sys._getframe(1)
    caller = ""
    while frame is not None:
        name, frame = frame.f_globals.get("__name__"), frame.f_back
        if name == of:
            caller = "" if frame is None else str(frame.f_globals.get("__name__"))
    return caller.startswith("torch._dynamo.")


constant: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.assume_constant_result
"""Has Dynamo call the function while it traces, and take what it gives for a constant."""
