"""What ``compile_step`` refuses at once: what is no optimizer, wraps one, is taken already, or cannot be stored."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import torch

from fxckpt.checkpointed import Checkpointed
from fxckpt.compat.accelerate import steps_elsewhere
from fxckpt.compat.fabric import strategy_that_steps
from fxckpt.compat.module_state import state_of
from fxckpt.compat.modules import compiled_in_vain, named_parameters, one_model, tensors_of
from fxckpt.compat.optimizers import forwards, steps_like_one
from fxckpt.compat.spread import box_of, is_flattened, is_zero, sharded_as, steps_in_backward, steps_in_hooks
from fxckpt.compat.wrappers import scaler_of, unwrapped
from fxckpt.config import disabled
from fxckpt.errors import SetupError, StateError
from fxckpt.graph.model.book import traces
from fxckpt.optim.contract.contract import Contract
from fxckpt.optim.contract.wrappers import held_by
from fxckpt.optim.stepper import refuse_repeated
from fxckpt.run import extra_state
from fxckpt.run.run import live_runs
from fxckpt.saving.inventory import check_storable, storable, take, trained_by
from fxckpt.saving.ownership import check_owned
from fxckpt.store.typed_json import Unkept, encode_state

log: logging.Logger = logging.getLogger("fxckpt")


def check(
    optimizers: Sequence[object], model: object, extra: Mapping[str, object] | None
) -> tuple[list[torch.optim.Optimizer], torch.nn.Module | None, tuple[extra_state.Extra, ...]]:
    """The optimizers, the models as one and the extras, once they can make a run; raises SetupError if not."""
    if not optimizers:
        raise SetupError("compile_step needs an optimizer, or a list of them; the list is empty")
    if sharded := next(filter(None, map(strategy_that_steps, optimizers)), None):
        raise SetupError(
            f"the {sharded} of this optimizer's Fabric shards what it trains, or makes the steps itself: there is no opt.step() "
            "whose layers could be copied. Use another strategy, or save with fabric.save()"
        )
    inner = [unwrapped(each) for each in optimizers]
    _refuse_zero(inner)
    checked = [_free_optimizer(each) for each in inner]
    module = one_model(model)
    names = {} if module is None else {id(p): name for name, p in named_parameters(module)}
    _refuse_what_steps_elsewhere(checked, model, names)
    _check_parameters(checked, names)
    extras = extra_state.extras(_with_scalers(optimizers, extra))
    if not disabled():
        for each in checked:
            Contract(each, tensors_of(module))
        _warn_of_other_runs(names)
        _warn_of_what_is_not_compiled(model)
        extra_state.probe(extras)
        if module is not None:
            _check_model(module, checked)
    return checked, module, extras


def check_parts(module: torch.nn.Module | None, optimizers: Sequence[torch.optim.Optimizer], world: int) -> None:
    """Raises SetupError for a parameter whose other parts would be in no checkpoint, where so many ranks (``world``) write each,
    or that no model gives a name."""
    named = {} if module is None else dict(named_parameters(module))
    for name, param in [*named.items(), *(("a parameter", each) for each in trained_by(optimizers))]:
        if (box := box_of(param)) is None:
            continue
        if module is None:
            raise SetupError("these parameters are DTensors: pass model=, whose names say on all ranks which part is of which")
        if world == 1 and not box.is_whole:
            raise SetupError(
                f"{name!r} is a DTensor ({sharded_as(param)}), of which each rank has a part: have all ranks name one directory, "
                "which they then write together (writer='thread', after torch.distributed.init_process_group())"
            )


def _refuse_zero(optimizers: Sequence[object]) -> None:
    """Raises SetupError for a ``ZeroRedundancyOptimizer``, and for the optimizer of one rank's share in it."""
    for opt in optimizers:
        if is_zero(opt):
            raise SetupError(
                "a ZeroRedundancyOptimizer sends each parameter from the rank that stepped it to all others behind opt.step(): a "
                "checkpoint of its inner optimizer would mix two steps. Give the inner class all parameters, as "
                "torch.optim.AdamW(model.parameters()), with DistributedDataParallel; or save its "
                "consolidate_state_dict() with torch.save"
            )


def _refuse_what_steps_elsewhere(optimizers: Sequence[torch.optim.Optimizer], model: object, names: Mapping[int, str]) -> None:
    """Raises SetupError for parameters that are no tensors of their own, or that are not stepped in ``opt.step()``."""
    for param in trained_by(optimizers):
        name = names.get(id(param), "a parameter")
        if is_flattened(param):
            raise SetupError(
                f"FullyShardedDataParallel (FSDP1) keeps {name!r} in a flat shard, which no checkpoint of fxckpt could give back "
                "its shape. Train with DistributedDataParallel, or save with "
                "torch.distributed.checkpoint in place of fxckpt"
            )
        if (kind := steps_in_backward(param)) is not None:
            raise SetupError(
                f"{name!r} is stepped by a {kind} inside the backward (_apply_optimizer_in_backward): there is no opt.step() "
                "whose layers could be copied. Call opt.step() behind the backward"
            )
    if steps_in_hooks(model):
        raise SetupError(
            "DistributedDataParallel steps these parameters itself, as their gradients are averaged (_register_fused_optim): "
            "there is no opt.step() whose layers could be copied. Call opt.step() behind the backward"
        )


def _with_scalers(optimizers: Sequence[object], extra: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """The extras, and the scalers that Accelerate or Fabric gave optimizers, unless they are among them."""
    if extra is not None and not isinstance(extra, Mapping):
        return extra
    found = dict(extra or {})
    for scaler in map(scaler_of, optimizers):
        if scaler is not None and not any(value is scaler for value in found.values()):
            if "scaler" in found:
                raise SetupError(
                    "extra['scaler'] is the name of the wrapper's GradScaler, which is kept with it: choose another one"
                )
            found["scaler"] = scaler
    return found


def _warn_of_what_is_not_compiled(model: object) -> None:
    """Say so if ``torch.compile`` compiles nothing of this model: its gradients' order is not known then."""
    if (kind := compiled_in_vain(model)) is not None:
        log.warning(
            f"fxckpt: torch.compile(DistributedDataParallel({kind}(...))) compiles nothing: Dynamo does not look at the "
            f"forward of torch's own classes behind that of DDP. Write "
            f"DistributedDataParallel(torch.compile({kind}(...), backend=fxckpt.backend)), or give the model a class of its own"
        )


def _check_model(module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """All that is trained is in it, and all that it keeps can be stored."""
    check_owned(module, optimizers, traces)
    check_storable(take(module, optimizers, traces))
    try:
        encode_state(state_of(module), Unkept(), "model")
    except StateError as error:
        raise SetupError(f"a module's own state dict holds what cannot be stored: {error}") from error
    except Exception as error:
        raise SetupError(f"a module's own state dict cannot be taken: {type(error).__name__}: {error}") from error


def _free_optimizer(given: object) -> torch.optim.Optimizer:
    """What was given, if it is an optimizer that steps itself and belongs to no run, nor one that it holds."""
    if not steps_like_one(given):
        what = f"compile_step takes torch.optim.Optimizer objects; this is a {type(given).__name__}"
        raise SetupError(
            f"{what}. If it wraps an optimizer, pass the inner one, and the wrapper in extra= if it counts anything."
        )
    opt = cast(torch.optim.Optimizer, given)
    if steps_elsewhere(opt):
        raise SetupError(
            f"this {type(opt).__name__} leaves its steps to DeepSpeed or Megatron, which fxckpt does not know: there is no "
            "opt.step() whose layers it could copy. Train without that plugin, or save with accelerator.save_state()"
        )
    if forwards(opt):
        inner = next((type(each).__name__ for each in held_by(opt)), "optimizer")
        raise SetupError(
            f"this {type(opt).__name__} (of {type(opt).__module__}) only wraps the {inner} that steps. Call compile_step on the "
            "inner optimizer, before it is wrapped or with wrapper.optimizer, and train with the wrapper as before."
        )
    for each in (opt, *held_by(opt)):
        if isinstance(each, Checkpointed) and "_fxckpt_run" in vars(each) and not each._fxckpt_run.status.stopped:
            held = "" if each is opt else f" (held by the {type(opt).__name__}, whose checkpoints hold both)"
            raise SetupError(f"this {type(each).__name__}{held} already belongs to {each.ckpt!r}; call opt.ckpt.shutdown() first")
    return opt


def _check_parameters(optimizers: Sequence[torch.optim.Optimizer], names: dict[int, str]) -> None:
    """Each parameter can be stored, and is in one optimizer only."""
    seen: set[int] = set()
    for opt in optimizers:
        refuse_repeated(opt, lambda param: names.get(id(param), "a parameter"))
    groups = [(i, j, group["params"]) for i, opt in enumerate(optimizers) for j, group in enumerate(opt.param_groups)]
    for i, j, k, param in ((i, j, k, p) for i, j, params in groups for k, p in enumerate(params)):
        name = names.get(id(param), f"parameter {k} of group {j} of optimizer {i}")
        if id(param) in seen:
            raise SetupError(f"{name} is in two optimizers of the run; its checkpoint could not say which step it is from")
        seen.add(id(param))
        if not disabled():
            storable(param, name)


def _warn_of_other_runs(names: dict[int, str]) -> None:
    """Say so if another run trains a parameter of this model."""
    for run in live_runs:
        if not run.status.stopped and (shared := [names[id(p)] for p in trained_by(run.optimizers) if id(p) in names]):
            log.warning(
                f"fxckpt: {shared[0]!r} of this model belongs to an optimizer of another run, in {run.directory!r}. Neither "
                "run's checkpoints are of one step of both: pass the optimizers of one model in one list to one "
                "compile_step, or shut the other run down with opt.ckpt.shutdown()"
            )
