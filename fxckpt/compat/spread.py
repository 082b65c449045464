"""What of torch spreads one training over ranks, or its steps into the backward: found by class names and marks.

Nobody who does not use it need import it. Each mark is private; without it what it marks is taken as any other."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxckpt.compat.alive import alive
from fxckpt.errors import SetupError

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def is_zero(opt: object) -> bool:
    """Is it a ``ZeroRedundancyOptimizer``, or the optimizer of one rank's share inside one? That does not know whose it is, so
    this looks at what the garbage collector knows, where the class is imported at all."""
    kind = getattr(sys.modules.get(_ZERO), "ZeroRedundancyOptimizer", None)
    if kind is None:
        return False
    return isinstance(opt, kind) or any(getattr(each, "optim", None) is opt for each in alive(kind))


def is_flattened(param: torch.Tensor) -> bool:
    """Does FSDP1 (``FullyShardedDataParallel``) hold it in flat shards? It marks its own parameters and, with
    ``use_orig_params``, those that are views of them."""
    return hasattr(param, "_fsdp_flattened")


def steps_in_backward(param: torch.Tensor) -> str | None:
    """The class of an optimizer that ``_apply_optimizer_in_backward`` has step this parameter as its gradient arrives."""
    found = getattr(param, "_in_backward_optimizers", None)
    return type(found[0]).__name__ if found else None


def steps_in_hooks(model: object) -> bool:
    """Does a ``DistributedDataParallel`` in this model step its parameters itself, in the hook that averages gradients
    (``_register_fused_optim``)?"""
    kind = getattr(sys.modules.get("torch.nn.parallel.distributed"), "DistributedDataParallel", None)
    wrapped = [each for each in _modules(model) if kind is not None and isinstance(each, kind)]
    hooks = [hook for each in wrapped for hook, *_ in getattr(each, "_comm_hooks", ())]
    return any(getattr(hook, "__qualname__", "").startswith("_hook_then_optimizer") for hook in hooks)


def _modules(model: object) -> Iterator[torch.nn.Module]:
    """All modules of what was given as ``model=``."""
    given = model.values() if isinstance(model, dict) else model if isinstance(model, (list, tuple)) else [model]
    for each in given:
        if isinstance(each, torch.nn.Module):
            yield from each.modules()


def sharded_as(tensor: Any) -> str | None:
    """How a DTensor is laid out over ranks, in words; None of any other tensor."""
    if not is_spread(tensor):
        return None
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [f"dimension {at}" for at in range(mesh.ndim)]
    each = [f"{how} over the {size} ranks of {name!r}" for how, size, name in zip(tensor.placements, mesh.shape, names)]
    return ", ".join(each)


@dataclass(frozen=True)
class Box:
    """What one rank holds of a tensor: ``shape`` elements from ``offset`` on, of one of the shape ``whole``. ``holders`` are the
    ranks that hold just this, itself included."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    holders: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Is it all of the tensor?"""
        return self.shape == self.whole


def is_spread(value: object) -> bool:
    """Is it a DTensor? Whoever has one has imported its class."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def local(value: Any) -> Any:
    """What of a DTensor lies in this process, the very tensor; anything else itself. ``to_local()`` makes another tensor at each
    call, which autograd follows."""
    return value._local_tensor if is_spread(value) else value


def is_replicated(tensor: Any) -> bool:
    """Is it a DTensor of which every rank has all?"""
    return is_spread(tensor) and all(each.is_replicate() for each in tensor.placements)


def box_of(tensor: Any) -> Box | None:
    """Which part of a DTensor this rank has; None of any other tensor. Raises SetupError for one that is no box of it: a partial
    sum, or rows that do not follow each other."""
    if not is_spread(tensor):
        return None
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise SetupError(f"a DTensor lies on the {mesh}, where this rank is not: each stores what it holds")
    if not all(p.is_replicate() or p.is_shard() or _is_strided(p) for p in placements) or not _is_a_row(mesh, placements):
        raise SetupError(f"a DTensor ({sharded_as(tensor)}) of which a rank holds no box: nobody could put it together")
    return _box(tuple(tensor.shape), mesh, tuple(coordinate), placements)


@functools.lru_cache(4096)
def _box(whole: tuple[int, ...], mesh: Any, here: tuple[int, ...], placements: tuple[Any, ...]) -> Box:
    """The part at these coordinates of the mesh, where this rank is. Each checkpoint asks for all of them, and torch takes some
    20 µs for one."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if 0 in whole:  # of what has no elements every rank has all, and one writes it
        return Box(whole, (0,) * len(whole), whole, _holders(mesh, here, (Replicate(),) * len(placements)))
    shape, offset = compute_local_shape_and_global_offset(whole, mesh, placements)
    return Box(whole, tuple(offset), tuple(shape), _holders(mesh, here, placements))


@functools.lru_cache(64)
def _holders(mesh: Any, here: tuple[int, ...], placements: tuple[Any, ...]) -> tuple[int, ...]:
    """The ranks that have the same part as this one: along dimensions of the mesh over which it is replicated, and along those of
    the mesh that this one was cut out of, which train alike."""
    same = tuple(slice(None) if p.is_replicate() else at for p, at in zip(placements, here))
    root = mesh._get_root_mesh().mesh if hasattr(mesh, "_get_root_mesh") else mesh.mesh
    where = {rank: at for at, rank in zip(np.ndindex(*root.shape), root.flatten().tolist())}
    members = [where[rank] for rank in mesh.mesh.flatten().tolist()]
    own = [dim for dim in range(root.dim()) if len({at[dim] for at in members}) > 1]
    held = {tuple(where[rank][dim] for dim in own) for rank in mesh.mesh[same].flatten().tolist()}
    return tuple(sorted(rank for rank, at in where.items() if tuple(at[dim] for dim in own) in held))


def like(part: torch.Tensor, tensor: Any, placements: Any = None) -> Any:
    """This rank's part of a tensor that is spread as ``tensor`` is, or over its mesh in this way."""
    from torch.distributed.tensor import DTensor

    shape, stride = tensor.shape, tensor.stride()
    placements = tensor.placements if placements is None else placements
    return DTensor.from_local(part, tensor.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def like_spec(part: torch.Tensor, spec: Any) -> Any:
    """This rank's part of a tensor that is spread as ``spec`` says."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride)


def lies_as(tensor: Any) -> str | None:
    """How a DTensor is laid out, and where on its mesh this rank is, in words; None of any other tensor."""
    return f"{sharded_as(tensor)}, here {tuple(tensor.device_mesh.get_coordinate())}" if is_spread(tensor) else None


def gradient_like(part: torch.Tensor, param: Any, lay: str | None) -> Any:
    """The gradient of a parameter of which this is what lies here, laid out as ``lies_as`` said. It may be a sum that is not made
    yet. None if it was of another layout than the parameter has now."""
    if not is_spread(param):
        return part if lay is None and part.shape == param.shape else None
    from torch.distributed.tensor import Partial

    for placements in itertools.product(*((p, Partial("sum"), Partial("avg")) for p in param.placements)):
        found = like(part, param, placements)
        if lies_as(found) == lay:
            return found
    return None


def spread_alike(tensor: Any, of: Any) -> bool:
    """Are both spread over the same ranks in one way, or is neither?"""
    if not (is_spread(tensor) and is_spread(of)):
        return not is_spread(tensor) and not is_spread(of)
    return bool(tensor.device_mesh == of.device_mesh and tensor.placements == of.placements and tensor.shape == of.shape)


def local_gradient(grad: Any, param: Any) -> Any:
    """The part of a gradient that belongs to this rank's part of its parameter. Where it is laid out otherwise (a sum that is not
    made yet), all ranks of its mesh make it so, as the optimizer's own step would have them."""
    if not is_spread(grad):
        return grad
    return arrived(grad if grad.placements == param.placements else grad.redistribute(placements=param.placements))


def arrived(grad: Any) -> Any:
    """``local``, once the collective that may make it is through."""
    found = local(grad)
    return found.wait() if is_spread(grad) and hasattr(found, "wait") else found


def _is_strided(placement: Any) -> bool:
    """A shard of shards that a later dimension of the mesh makes: FSDP2 over tensor parallelism."""
    return type(placement).__name__ == "_StridedShard"


def _is_a_row(mesh: Any, placements: Any) -> bool:
    """Are a rank's rows next to each other? A strided shard counts on as many shards as those later dimensions make."""
    for at, each in enumerate(placements):
        if _is_strided(each):
            later = (size for p, size in zip(placements[at + 1 :], mesh.shape[at + 1 :]) if p.is_shard() and p.dim == each.dim)
            if math.prod(later) != each.split_factor:
                return False
    return True


def sharded_parameters(model: torch.nn.Module) -> dict[tuple[int, str], torch.nn.Parameter]:
    """By the ``id`` of a module and an attribute, the parameters that FSDP2 shards. In their place a module has whole ones from
    the forward on until they are sharded again, which behind a forward alone may be late."""
    found: dict[tuple[int, str], torch.nn.Parameter] = {}
    for each in _params_of(model):
        info = each._module_info
        shared = zip((info.module, *info.shared_modules), (info.param_name, *info.shared_param_names))
        found.update({(id(module), name): each.sharded_param for module, name in shared})
    return found


def sharded_of(models: Iterable[torch.nn.Module]) -> dict[int, torch.nn.Parameter]:
    """By the ``id`` of a whole parameter, which forwards read and so the compiler sees, the one that FSDP2 shards."""
    found = (each for model in models for each in _params_of(model))
    return {id(whole): each.sharded_param for each in found if (whole := getattr(each, "_unsharded_param", None)) is not None}


def shard_again(model: torch.nn.Module) -> None:
    """Have FSDP2 drop whole parameters that a forward without a backward left: the next one would compute with them, whatever was
    written to the sharded ones. Its own ``load_state_dict`` does the same."""
    for group in param_groups_of(model):
        group.reshard()


def _params_of(model: torch.nn.Module) -> Iterator[Any]:
    """What FSDP2 keeps of each parameter."""
    for group in param_groups_of(model):
        yield from group.fsdp_params


def param_groups_of(model: torch.nn.Module) -> Iterator[Any]:
    """What FSDP2 gathers together, of this model."""
    get = getattr(sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state"), "_get_module_fsdp_state", None)
    known = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", True)
    if get is None or not known:  # it is imported in many a process that shards nothing
        return
    for module in model.modules():
        if (state := get(module)) is not None:
            yield from _groups_of(state)


def _groups_of(state: Any) -> list[Any]:
    """One until torch 2.12, then several."""
    if (groups := getattr(state, "_fsdp_param_groups", None)) is not None:
        return list(groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
