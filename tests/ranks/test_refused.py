"""What spreads one training over ranks so that no rank's step is whole is refused by name, with the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
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


def test_an_optimizer_inside_the_backward_is_refused(root):
    whole = model()
    _apply_optimizer_in_backward(torch.optim.SGD, whole.parameters(), {"lr": 0.1})
    wrapped = DistributedDataParallel(whole)
    refused("'0.weight' is stepped by a SGD inside the backward", torch.optim.SGD(wrapped.parameters()), root, model=wrapped)


def test_an_optimizer_in_the_hook_of_ddp_is_refused(root):
    wrapped = DistributedDataParallel(model())
    wrapped._register_fused_optim(torch.optim.SGD, lr=0.1)
    refused("steps these parameters itself", torch.optim.SGD(wrapped.parameters()), root, model=wrapped)
