"""A run whose parameters are DTensors, in one rank: what steps them, what is noticed, what is refused."""

from __future__ import annotations

import pytest
import torch
from digests import differences
from small_models import eager
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import fxckpt
from fxckpt.compat.spread import Box, gradient_like
from fxckpt.errors import LayoutMismatch, SetupError
from fxckpt.loading.apply import strides_for
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

    def __init__(self, make, root=None, update="native", layout="fsdp", journal=1, **options):
        self.model = sharded(layout, **options)
        self.opt = make(list(self.model.parameters()))
        if root is not None:
            fxckpt.compile_step(self.opt, root, model=self.model, every=1, keep=4, update=update, journal=journal)
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


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
def test_a_load_is_what_the_next_forward_computes_with_when_fsdp_has_whole_parameters(options, root):
    """An evaluation leaves them whole, and FSDP2 gathers them no second time."""
    life, x = Life(OPTIMIZERS["Adam"], root, **options), torch.ones(2, 6)
    life.train(0, 1)
    with torch.no_grad():
        early = life.model(x)
    life.train(1, 2)
    life.opt.ckpt.flush()
    end = life.tensors()
    with torch.no_grad():
        late = life.model(x)
        fxckpt.load(step=1)
        assert torch.equal(life.model(x), early) and not torch.equal(early, late)
        fxckpt.load(step=1)
    life.train(1, 2)
    assert differences(life.tensors(), end) == []
    life.end()


@pytest.mark.parametrize("name", ["Adam", "SGD", "ASGD"])
def test_state_of_a_dtensor_that_is_one_number_is_one_again(name, root):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(distribute_tensor(torch.tensor(2.0), init_device_mesh("cpu", (1,)), [Replicate()]))

    def lives(root, *turns):
        for first, last in turns:
            model = Scaled()
            opt = OPTIMIZERS[name](model.parameters())
            if root is not None:
                fxckpt.compile_step(opt, root, model=model, every=1, update="native")
                assert fxckpt.load().step == first
            for _ in range(first, last):
                model.scale.square().backward()
                opt.step()
                opt.zero_grad()
            if root is not None:
                opt.ckpt.flush()
                opt.ckpt.shutdown()
        return model.scale.item(), {key: type(value) for key, value in opt.state[model.scale].items()}

    assert lives(root, (0, 2), (2, 4)) == lives(None, (0, 4))


def test_state_takes_the_strides_of_a_part_only_where_no_two_elements_share_memory():
    assert strides_for((2, 3, 2), (6, 1, 3)) == (6, 1, 3)
    assert strides_for((2, 6, 2), (6, 1, 3)) == (12, 2, 1)
    assert strides_for((4, 3), (1, 2)) == (3, 1)  # of a part of two rows


def waits_for_a_step(root, turns):
    """An optimizer whose gradients are sums over ranks that are not made yet, and which steps at every other turn."""
    torch.manual_seed(0)
    model, mesh = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)), init_device_mesh("cpu", (1,))
    parallelize_module(model, mesh, {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1))})
    always, seldom = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[1], model[0]))
    fxckpt.compile_step([always, seldom], root, model=model, every=1, update="native")
    fxckpt.load()
    grad = model[0].weight.grad
    for at in fxckpt.batches(torch.utils.data.DataLoader(range(4))):
        if at == turns:
            break
        model(torch.randn(3, 2, 6)).square().sum().backward()
        always.step()
        always.zero_grad()
    always.ckpt.flush()
    always.ckpt.shutdown()
    return grad, model[0].weight.grad


def test_a_gradient_that_waits_for_a_step_is_still_the_partial_sum_that_it_was(root):
    none, left = waits_for_a_step(root, 1)
    found, _ = waits_for_a_step(root, 1)
    assert none is None and isinstance(found, DTensor) and found.placements == left.placements == (Partial(),)
    assert torch.equal(found.to_local(), left.to_local())


def test_a_gradient_that_lay_otherwise_is_left_out_and_it_is_said(root, monkeypatch, caplog):
    waits_for_a_step(root, 1)
    monkeypatch.setattr("fxckpt.loading.apply.gradient_like", lambda part, param, lay: gradient_like(part, param, "otherwise"))
    found, _ = waits_for_a_step(root, 1)
    assert not found.to_local().any()
    assert "the gradient of 0.weight that waited for a step is left out" in caplog.text


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_a_journal_of_gradients_of_dtensors_is_replayed(layout, root):
    plain = Life(OPTIMIZERS["SGD"], layout=layout)
    plain.train(0, 6)
    for first, last in ((0, 3), (3, 6)):
        life = Life(OPTIMIZERS["SGD"], root, layout=layout, journal=5)
        assert life.start == first
        life.train(first, last)
        life.end()
        assert life.opt.ckpt.statistics()["records_committed"]
    assert differences(life.tensors(), plain.tensors()) == []


def test_blocks_that_are_compiled_one_by_one_are_in_the_order_of_their_graphs(root):
    """The compiler sees the whole parameters that FSDP2 gathers."""
    torch._dynamo.reset()
    model, mesh = nn.Sequential(*(Block() for _ in range(3))), init_device_mesh("cpu", (1,))
    for block in model:
        block.compile(backend=fxckpt.backend, options={"inner": "eager"})
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


def test_a_tensor_parallel_model_that_is_compiled_whole_is_traced_and_keeps_its_bits(root):
    found = []
    for ours in (False, True):
        torch._dynamo.reset()
        model = sharded("tp")
        compiled = eager(model) if ours else torch.compile(model, backend="eager")
        opt = OPTIMIZERS["SGD"](model.parameters())
        if ours:
            fxckpt.compile_step(opt, root, model=compiled, every=1, update="native")
        for step in range(3):
            torch.manual_seed(step)
            compiled(torch.randn(3, 6)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        found.append([param.to_local().detach().clone() for param in model.parameters()])
    assert all(map(torch.equal, *found))
    assert [layer.name for layer in opt.ckpt.graph.layers] == ["2", "0"]
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
    fxckpt.compile_step(opt, root, model=model, every=1, update="native")
    model(torch.ones(3, 6)).sum().backward()
    opt.step()
    opt.ckpt.flush()
    with torch.no_grad():
        model.table.mul_(0.0)
    fxckpt.load()
    assert model.table.to_local().tolist() == [0.0, 1.0, 2.0, 3.0]
    opt.ckpt.shutdown()


def test_a_dtensor_that_no_state_dict_has_is_kept_where_every_rank_has_all_of_it(root):
    model, mesh = sharded(), init_device_mesh("cpu", (1,))
    model.register_buffer("cache", distribute_tensor(torch.arange(4.0), mesh, [Replicate()]), persistent=False)
    opt = torch.optim.Adam(model.parameters())
    fxckpt.compile_step(opt, root, model=model, every=1, update="native")
    model(torch.ones(3, 6)).sum().backward()
    opt.step()
    opt.ckpt.flush()
    with torch.no_grad():
        model.cache.mul_(0.0)
    fxckpt.load()
    assert type(model.cache) is DTensor and model.cache.to_local().tolist() == [0.0, 1.0, 2.0, 3.0]
    opt.ckpt.shutdown()
    model.register_buffer("own", distribute_tensor(torch.arange(4.0), mesh, [Shard(0)]), persistent=False)
    with pytest.raises(SetupError, match=r"buffer own: a .*DTensor"):
        fxckpt.compile_step(opt, root, model=model, every=1, update="native")


def test_another_shape_than_was_stored_is_said(root):
    life = Life(OPTIMIZERS["SGD"], root)
    life.train(0, 1)
    life.end()
    other = fully_shard(nn.Sequential(nn.Linear(6, 10, bias=False)), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(LayoutMismatch, match=r"0.weight: checkpoint F32\[8, 6\], live F32\[10, 6\]"):
        fxckpt.load(root, model=other)
