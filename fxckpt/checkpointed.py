"""The optimizer that ``compile_step`` gives back: the same object, of a subclass whose step is a run's.

Only the class of the instance is swapped (as FSDP2's ``fully_shard`` does with modules), so ``isinstance(opt,
torch.optim.AdamW)`` holds and whoever keeps a reference sees the new step.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, cast

import torch

from fxckpt.compat.dynamo import only_inlined, untraced
from fxckpt.compat.instance_subclass import instance_subclass
from fxckpt.compat.optimizers import comes_by_itself, hooked, marked_for_schedulers, takes, watch_steps
from fxckpt.compat.tracing_step import compiled_by_itself, constant
from fxckpt.compat.wrappers import join
from fxckpt.graph.ops import optimizer_step, step_port
from fxckpt.handle import Handle, handle_of
from fxckpt.optim.contract.wrappers import held_by
from fxckpt.optim.strategy import Arguments
from fxckpt.run.one_graph import OneGraph
from fxckpt.run.run import Run, live_runs


class Checkpointed(torch.optim.Optimizer, metaclass=ABCMeta):
    """An optimizer that belongs to a run. Every one that ``compile_step`` took is an instance.

    For annotations, ``def train(opt: fxckpt.Checkpointed)``, and for type checkers, which know after
    ``isinstance(opt, fxckpt.Checkpointed)`` that ``opt`` is both what it was and one with ``.ckpt``.
    """

    _fxckpt_run: Run

    @property
    def ckpt(self) -> Handle:
        """The run's handle; all optimizers of one ``compile_step`` share it."""
        return handle_of(self._fxckpt_run)


def attach(opt: torch.optim.Optimizer, run: Run) -> None:
    """Make ``opt`` step through this run from now on, and keep it."""
    plain: type = type(opt)
    opt.__class__ = stepped_class(plain)
    cast(Checkpointed, opt)._fxckpt_run = run
    for each in (opt, *held_by(opt)):
        watch_steps(each, _foreign_step_begins, _foreign_step_ended)


def attach_wrapper(wrapper: Any) -> None:
    """Let the steps of what Accelerate or Fabric wrapped be those of its optimizer, which is attached, and give it ``.ckpt``."""
    join(wrapper, _CKPT_OF_INNER, Checkpointed)


_CKPT_OF_INNER = property(lambda self: self.optimizer.ckpt, doc=Checkpointed.ckpt.__doc__)

_NOT_IN_COMPILED_CODE = (
    "opt.step() cannot be an op of this graph: fxckpt's log says why. Without fullgraph=True a compiled function may call it all "
    "the same: its forward and backward are compiled, and this is not"
)


@functools.cache
def stepped_class(base: type) -> type:
    """The subclass of ``base`` whose step is ours. Pickles and copies are of ``base``: a run belongs to one process and one
    optimizer."""

    def step(self: Checkpointed, closure: Callable[[], Any] | None = None) -> Any:
        return self._fxckpt_run.stepping.step(self, closure)

    def step_with_arguments(self: Checkpointed, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        only_closure = names[0] == "closure" and len(given) == 1 and kwargs.keys() <= {"closure"}
        closure = Arguments(args, kwargs) if given and not only_closure else next(iter(given), None)
        return self._fxckpt_run.stepping.step(self, closure)

    names = takes(base)
    made_step: Any = step if names in ((), ("closure",)) else step_with_arguments
    made_step.__signature__ = inspect.signature(base.step)  # type: ignore[attr-defined]
    functools.update_wrapper(made_step, base.step, assigned=("__doc__",), updated=())  # type: ignore[attr-defined]
    outside = untraced(hooked(made_step), _NOT_IN_COMPILED_CODE, _called_outside)

    @functools.wraps(outside)
    def compiled_or_not(self: Checkpointed, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and _is_op_of_graph(self, [*args, *kwargs.values()]):
            return None
        self._opt_called = True  # type: ignore[attr-defined]
        return outside(self, *args, **kwargs)

    vars(compiled_or_not).pop("_torchdynamo_disable", None)  # that of what it wraps
    only_inlined(marked_for_schedulers(compiled_or_not))
    zero_grad = base.zero_grad  # type: ignore[attr-defined]

    @functools.wraps(zero_grad)
    def zeroed(self: Checkpointed, set_to_none: bool = True) -> None:
        if torch.compiler.is_dynamo_compiling() and _zeroed_in_graph(self, set_to_none):
            return
        zero_grad(self, set_to_none)

    only_inlined(zeroed)
    ours = {
        "step": compiled_or_not,
        "load_state_dict": _load_state_dict,
        "add_param_group": _add_param_group,
        "__del__": _dropped,
    }
    if zero_grad is torch.optim.Optimizer.zero_grad:
        ours["zero_grad"] = zeroed
    for_profilers = {} if issubclass(base, torch.optim.Optimizer) else {"_optimizer_step_code": lambda self: None}
    made = instance_subclass(base, {**for_profilers, **ours, "ckpt": Checkpointed.ckpt})
    Checkpointed.register(made)
    return made


def call_step(opt: Any) -> Any:
    """``opt.step()`` as a script calls it."""
    return type(opt).step(opt)


def _called_outside(self: Any, *_: Any, **__: Any) -> None:
    """Compiled code calls ``opt.step()`` behind a break of its graph, and Dynamo may not have asked for it."""
    self._fxckpt_run.one_graph.called_outside(compiled_by_itself(__name__))


def _is_op_of_graph(self: Any, given: list[Any]) -> bool:
    """Dynamo traces ``opt.step()``: have it be one op of the graph, if it can be."""
    graph = self._fxckpt_run.one_graph
    scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
    usual = not scaled and all(each is None for each in given)
    if _refuses_step(graph.name, usual):
        return False
    params = [param for group in graph.params for param in group]
    optimizer_step(params, [param.grad for param in params], int(graph.name))
    self._opt_called = True
    return True


def _zeroed_in_graph(self: Any, set_to_none: bool) -> bool:
    """Dynamo traces ``opt.zero_grad()``, which PyTorch hides from it: do it in the graph, if the step is to be there, too."""
    graph = self._fxckpt_run.one_graph
    if _refuses_zeroing(graph.name):
        return False
    for group in graph.params:
        for param in group:
            if param.grad is not None:
                if set_to_none:
                    param.grad = None
                else:
                    param.grad.zero_()
    return True


@constant
def _refuses_step(name: str, usual: bool) -> bool:
    return cast(OneGraph, step_port(int(name))).refuses_step(usual)


@constant
def _refuses_zeroing(name: str) -> bool:
    return cast(OneGraph, step_port(int(name))).refuses_zeroing()


def _load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Load, once no copy reads the tensors that it replaces."""
    self._fxckpt_run.closing.drop("load_state_dict() replaced its tensors")
    out = self._fxckpt_base.load_state_dict(self, *args, **kwargs)
    self._fxckpt_run.one_graph.look()
    return out


def _add_param_group(self: Any, param_group: dict[str, Any]) -> None:
    """Add a group; the checkpoint of a step that has not closed would have the old layers and the new groups."""
    if "_fxckpt_run" in self.__dict__:
        self._fxckpt_run.closing.drop("add_param_group() changed the optimizer before the step closed")
    self._fxckpt_base.add_param_group(self, param_group)
    if "_fxckpt_run" in self.__dict__:
        self._fxckpt_run.one_graph.look()


def _dropped(self: Any) -> None:
    """Nobody refers to it any more: its run ends, which no copy of it has."""
    if (run := vars(self).get("_fxckpt_run")) is not None:
        run.dropped()
    if (own := getattr(self._fxckpt_base, "__del__", None)) is not None:
        own(self)


@untraced
def _foreign_step_begins(opt: Any, *_: Any) -> None:
    """A hook: if this step does not come through the run, the run must know of it."""
    holder = _holder(opt)
    if holder is not None and comes_by_itself(opt, holder):
        holder._fxckpt_run.stepping.foreign_step_begins(holder)


@untraced
def _foreign_step_ended(opt: Any, *_: Any) -> None:
    """A hook: what was said to begin has been done."""
    holder = _holder(opt)
    if holder is not None and comes_by_itself(opt, holder):
        holder._fxckpt_run.stepping.foreign_step_ended(holder)


def _holder(opt: Any) -> Any:
    """The optimizer of a run whose step this one's is: itself, or one that holds it, as where a loop calls the two halves of a
    sharpness-aware step and the second ends with ``base_optimizer.step()``. A copy has the hooks, and no run."""
    if "_fxckpt_run" in vars(opt):
        return opt
    holders = (each for run in live_runs for each in run.optimizers if any(inner is opt for inner in held_by(each)))
    return next(holders, None)
