"""What spreads one training over ranks so that no rank's step is whole is refused by name, with the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fxckpt
from fxckpt.errors import SetupError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_rank")]


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def refused(match, opt, root, **options):
    with pytest.raises(SetupError, match=match):
        fxckpt.compile_step(opt, root, every=1, **options)


@pytest.mark.parametrize("inner", [False, True])
def test_zero_and_the_optimizer_in_it_are_refused(inner, root):
    zero = ZeroRedundancyOptimizer(model().parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3)
    refused("ZeroRedundancyOptimizer.*mix two steps.*all parameters", zero.optim if inner else zero, root)


def test_an_optimizer_beside_zero_is_not(root):
    ZeroRedundancyOptimizer(model().parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3)
    fxckpt.compile_step(torch.optim.AdamW(model().parameters()), root, every=1).ckpt.shutdown()


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_fsdp1_is_refused(original, given, root):
    wrapped = FullyShardedDataParallel(model(), use_orig_params=original, device_id=torch.device("cpu"))
    refused("FSDP1.*flat shard.*DistributedDataParallel", torch.optim.AdamW(wrapped.parameters()), root,
            **({"model": wrapped} if given else {}))  # fmt: skip


def test_fsdp2_is_refused_with_its_placement(root):
    wrapped = fully_shard(model(), mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))
    refused(r"'0.weight', a DTensor .S\(0\) over the 1 ranks of 'dp'.*not supported yet.*torch.distributed.checkpoint",
            torch.optim.AdamW(wrapped.parameters()), root, model=wrapped)  # fmt: skip


def test_tensor_and_expert_parallel_layouts_are_refused_with_their_placement(root):
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    wrapped = parallelize_module(model(), mesh, {"0": ColwiseParallel()})
    refused(r"a DTensor .S\(0\) over the 1 ranks of 'tp'", torch.optim.AdamW(wrapped.parameters()), root, model=wrapped)
    experts = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    weight = nn.Parameter(distribute_tensor(torch.zeros(4, 4, 4), experts, [Replicate(), Shard(0)]))
    refused(r"R over the 1 ranks of 'dp', S\(0\) over the 1 ranks of 'ep'.*expert parallelism", torch.optim.SGD([weight]), root)


def test_a_frozen_or_buffered_dtensor_is_refused_too(root):
    whole = model()
    whole.register_buffer("table", distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (1,)), [Shard(0)]))
    refused("'table', a DTensor", torch.optim.AdamW(whole.parameters()), root, model=whole)


def test_an_optimizer_inside_the_backward_is_refused(root):
    whole = model()
    _apply_optimizer_in_backward(torch.optim.SGD, whole.parameters(), {"lr": 0.1})
    wrapped = DistributedDataParallel(whole)
    refused("'0.weight' is stepped by a SGD inside the backward", torch.optim.SGD(wrapped.parameters()), root, model=wrapped)


def test_an_optimizer_in_the_hook_of_ddp_is_refused(root):
    wrapped = DistributedDataParallel(model())
    wrapped._register_fused_optim(torch.optim.SGD, lr=0.1)
    refused("steps these parameters itself", torch.optim.SGD(wrapped.parameters()), root, model=wrapped)
