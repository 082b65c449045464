"""A run whose parameters are DTensors, in one rank: what steps them, what is noticed, what is refused."""

from __future__ import annotations

import pytest
import torch
from digests import differences
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fxckpt
from fxckpt.compat.spread import Box
from fxckpt.errors import LayoutMismatch, SetupError
from fxckpt.saving.guard import Changed
from fxckpt.store import names
from fxckpt.store.reader import Reader

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_rank", "one_thread")]


class Signed(torch.optim.Optimizer):
    """A class of the user's, in the style of Lion."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state.setdefault("m", torch.zeros_like(param)).lerp_(param.grad, 0.1)
                param.add_(state["m"].sign(), alpha=-group["lr"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.a = nn.Linear(5, 5), nn.Linear(5, 5)  # not in the order of the forward

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


OPTIMIZERS = {
    name: getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop")
} | {"Signed": Signed, "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)}


def sharded(layout="fsdp", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("ranks",))
    if layout == "fsdp":
        return fully_shard(model, mesh=mesh, **options)
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


class Life:
    """One process of a training."""

    def __init__(self, make, root=None, update="native", layout="fsdp", **options):
        self.model = sharded(layout, **options)
        self.opt = make(list(self.model.parameters()))
        if root is not None:
            fxckpt.compile_step(self.opt, root, model=self.model, every=1, update=update)
            self.start = fxckpt.load().step

    def train(self, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            self.model(torch.randn(3, 6)).square().mean().backward()
            self.opt.step()
            self.opt.zero_grad()

    def tensors(self):
        state = {f"{i}/{k}": v for i, p in enumerate(self.model.parameters()) for k, v in self.opt.state[p].items()}
        both = {**dict(self.model.named_parameters()), **{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}}
        return {name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for name, t in both.items()}

    def end(self):
        self.opt.ckpt.flush()
        self.opt.ckpt.shutdown()


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_dtensors_goes_on_with_the_bits_that_it_has_without_us(name, layout, root):
    plain = Life(OPTIMIZERS[name], layout=layout)
    plain.train(0, 4)
    for first, last in ((0, 2), (2, 4)):
        life = Life(OPTIMIZERS[name], root, layout=layout)
        assert life.start == first
        life.train(first, last)
        assert all(isinstance(t, DTensor) for p in life.model.parameters() for t in life.opt.state[p].values() if t.dim())
        life.end()
    assert differences(life.tensors(), plain.tensors()) == []
    whole = name in ("Muon", "Signed")
    assert (
        "its own step, whole" in str(life.opt.ckpt.graph.table() + life.opt.ckpt._run.arrangement.steppers[0].describe())
    ) == whole


@pytest.mark.parametrize("options", [{"reshard_after_forward": False}, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16)}])
def test_ways_to_shard_change_nothing(options, root):
    whole = Life(OPTIMIZERS["Adam"], root / "whole", **options)
    whole.train(0, 4)
    whole.end()
    for first, last in ((0, 2), (2, 4)):
        life = Life(OPTIMIZERS["Adam"], root / "two", **options)
        life.train(first, last)
        life.end()
    assert differences(life.tensors(), whole.tensors()) == []


def test_a_parameter_keeps_its_name_while_fsdp_has_a_whole_one_in_its_place(root):
    """A forward without a backward leaves the root's parameters whole."""
    life = Life(OPTIMIZERS["Adam"], root)
    life.train(0, 2)
    life.model(torch.randn(3, 6))
    assert not isinstance(next(life.model.parameters()), DTensor)
    life.opt.ckpt.save("whole")
    life.end()
    saved = Reader(fxckpt.checkpoints(root)[-1].path).record
    assert {tensor.key for tensor in saved.tensors(names.MODEL)} == {"0.weight", "2.weight"}


def test_blocks_that_are_compiled_one_by_one_are_in_the_order_of_their_graphs(root):
    """The compiler sees the whole parameters that FSDP2 gathers."""
    torch._dynamo.reset()
    model, mesh = nn.Sequential(*(Block() for _ in range(3))), init_device_mesh("cpu", (1,))
    for block in model:
        block.compile(backend=lambda gm, inputs: fxckpt.backend(gm, inputs, options={"inner": "aot_eager"}))
        fully_shard(block, mesh=mesh)
    opt = torch.optim.SGD(fully_shard(model, mesh=mesh).parameters(), lr=0.1, momentum=0.9)
    fxckpt.compile_step(opt, root, model=model, every=1, update="native")
    for _ in range(3):
        model(torch.randn(2, 5)).sum().backward()
        opt.step()
        opt.zero_grad()
    assert [layer.name for layer in opt.ckpt.graph.layers] == ["2.b", "2.a", "1.b", "1.a", "0.b", "0.a"]
    assert {place.origin for place in opt.ckpt.graph.why.values()} <= {"joint", "dynamo"}
    opt.ckpt.shutdown()
    torch._dynamo.reset()


def test_a_change_of_a_dtensor_behind_our_back_is_noticed(root):
    life = Life(OPTIMIZERS["Adam"], root)
    life.train(0, 2)
    with torch.no_grad():
        next(life.model.parameters()).mul_(2.0)  # moves the counter of the DTensor, not that of what lies here
    with pytest.raises(Changed, match=r"'0.weight' was changed in place outside"):
        life.train(2, 4)
        life.end()
    life.opt.ckpt.shutdown()


def test_a_second_backward_through_weights_that_were_updated_is_an_error(root):
    life = Life(OPTIMIZERS["SGD"], root, layout="tp")
    life.train(0, 2)
    loss = life.model(torch.randn(3, 6)).square().mean()
    loss.backward(retain_graph=True)
    life.opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    life.end()


def test_parameters_without_a_model_are_refused(root):
    with pytest.raises(SetupError, match="DTensors: pass model="):
        fxckpt.compile_step(torch.optim.Adam(sharded().parameters()), root)


def test_parts_whose_other_parts_would_be_in_no_store_are_refused(root, monkeypatch):
    monkeypatch.setattr(Box, "is_whole", False)
    model = sharded()
    with pytest.raises(SetupError, match=r"'0.weight' is a DTensor .S\(0\) over the 1 ranks of 'ranks'.*name one directory"):
        fxckpt.compile_step(torch.optim.Adam(model.parameters()), root, model=model)


def test_a_partial_sum_is_refused(root):
    model, mesh = nn.Linear(4, 4, bias=False), init_device_mesh("cpu", (1,), mesh_dim_names=("ranks",))
    model.weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh, [Partial()]))
    with pytest.raises(SetupError, match=r"'weight', a DTensor .P\(sum\) over the 1 ranks of 'ranks'.*holds no box"):
        fxckpt.compile_step(torch.optim.Adam(model.parameters()), root, model=model)


def test_state_of_another_shape_is_refused(root):
    with pytest.raises(SetupError, match=r"its state 'd' .80. is not laid out over ranks so"):
        life = Life(torch.optim.LBFGS, root)

        def closure():
            loss = life.model(torch.ones(3, 6)).square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            life.opt.step(closure)


def test_buffers_and_frozen_parameters_may_be_dtensors(root):
    model = sharded()
    model.register_buffer("table", distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (1,)), [Shard(0)]))
    model[0].weight.requires_grad_(False)
    opt = torch.optim.Adam([model[2].weight])
    fxckpt.compile_step(opt, root, model=model, every=1)
    model(torch.ones(3, 6)).sum().backward()
    opt.step()
    opt.ckpt.flush()
    with torch.no_grad():
        model.table.mul_(0.0)
    fxckpt.load()
    assert model.table.to_local().tolist() == [0.0, 1.0, 2.0, 3.0]
    opt.ckpt.shutdown()


def test_another_shape_than_was_stored_is_said(root):
    life = Life(OPTIMIZERS["SGD"], root)
    life.train(0, 1)
    life.end()
    other = fully_shard(nn.Sequential(nn.Linear(6, 10, bias=False)), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(LayoutMismatch, match=r"0.weight: checkpoint F32\[8, 6\], live F32\[10, 6\]"):
        fxckpt.load(root, model=other)
