"""What is read from the compiler's graphs, and how the book merges it."""

from __future__ import annotations

import gc
import logging
import weakref

import expecttest
import pytest
import torch
from graph_models import GPT, MODELS, Block, ConvNet, D, Program, Shared, batch, book, checkpointed, compiled
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fxckpt.graph.model.joint as joint
from fxckpt.graph.model.book import TraceBook, traces
from fxckpt.graph.model.layers import gradient_order
from fxckpt.torch_backend import backend

__all__ = ["book"]  # the fixture


def disagreements(model):
    """Pairs of parameters whose order by first use is not that of the joint graph; ties agree with anything."""
    seen = [t for _, p in model.named_parameters() if (t := traces.lookup(p)) is not None]
    assert all(t.origin == "joint" for t in seen)
    return [(a, b) for a in seen for b in seen if a.first_use > b.first_use and a.grad_final > b.grad_final]


@pytest.mark.parametrize("kind", MODELS)
def test_the_forward_and_the_joint_graph_agree_on_the_order(kind):
    model = MODELS[kind]()
    compiled(model)(batch()).backward()
    assert disagreements(model) == []
    assert all(traces.lookup(p) is not None for p in model.parameters())


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(Program.OPS), min_size=2, max_size=9), st.integers(0, 999))
def test_the_forward_and_the_joint_graph_agree_for_any_program(steps, seed):
    torch._dynamo.reset()
    traces.__dict__.update(TraceBook().__dict__)
    model = Program(["linear", *steps], seed)
    loss = compiled(model)(torch.randn(3, D))
    assume(loss.requires_grad)  # a program that ends in detach has nothing to agree about
    loss.backward()
    assert disagreements(model) == []
    unseen = {n for n, p in model.named_parameters() if traces.lookup(p) is None}
    assert unseen == {n for n, p in model.named_parameters() if p.grad is None}


class Golden(expecttest.TestCase):
    def test_trace_of_a_two_layer_model(self):
        class TwoLayers(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

            def forward(self, x):
                return self.second(torch.relu(self.first(x))).sum()

        model = TwoLayers()
        compiled(model, inner="eager")(torch.randn(2, D)).backward()
        (trace,) = traces.traces()
        self.assertExpectedInline(
            str(trace),
            """\
region 0: 4 parameters, 0 buffers
  first use  first read  last read  gradient final  from    parameter
          2           2          5               5  dynamo  second.weight
          2           2          5               5  dynamo  second.bias
          0           0          7               7  dynamo  first.weight
          0           0          7               7  dynamo  first.bias""",
        )
        torch._dynamo.reset()
        compiled(model)(torch.randn(2, D)).backward()
        (trace,) = traces.traces()
        self.assertExpectedInline(
            str(trace),
            """\
region 0: 4 parameters, 0 buffers
  first use  first read  last read  gradient final  from    parameter
          2          11         11              20  joint   second.bias
          2          10         15              21  joint   second.weight
          0           7          7              30  joint   first.bias
          0           6          7              31  joint   first.weight""",
        )


# ---- merging ----------------------------------------------------------------------------------------------------


def test_after_a_graph_break_the_later_region_comes_first(book):
    model = GPT(breaks=True)
    compiled(model, inner="eager")(batch()).backward()
    assert len(book.traces()) == 3
    order = tuple(gradient_order(list(model.named_parameters()), book))
    whole = GPT()
    compiled(whole, inner="eager")(batch()).backward()
    assert order == tuple(gradient_order(list(whole.named_parameters()), book))
    assert order[-2:] == ("wpe.weight", "wte.weight")  # the tie is final in the first region, not in the last


def test_a_recompile_takes_the_place_of_its_frame(book):
    model = Shared()
    step = compiled(model, inner="eager")
    step(torch.randn(2, D)).backward()
    first = book.traces()
    step(torch.randn(3, D)).backward()  # another batch size: recompiled with dynamic shapes
    assert len(first) == len(book.traces()) == 1
    assert book.traces()[0] is not first[0]
    assert book.version == 2


def test_a_recompile_keeps_what_it_does_not_use(book):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x, both):
            return (self.b(self.a(x)) if both else self.a(x)).sum()

    model = Sometimes()
    step = compiled(model, inner="eager")
    step(torch.randn(2, D), True).backward()
    step(torch.randn(2, D), False).backward()
    assert len(book.traces()) == 1
    assert tuple(gradient_order(list(model.named_parameters()), book)) == ("b.bias", "b.weight", "a.bias", "a.weight")


def test_blocks_compiled_one_by_one_keep_names_of_the_whole_model(book):
    class Regional(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList([Block(), Block()])
            for block in self.h:
                block.compile(backend=backend, options={"inner": "eager"})

        def forward(self, x):
            for block in self.h:
                x = block(x)
            return x.sum()

    model = Regional()
    model(torch.randn(2, D)).backward()
    assert dict(book.models.names()) == dict(model.named_parameters())
    order = tuple(gradient_order(list(model.named_parameters()), book))
    assert sorted(order) == sorted(dict(model.named_parameters()))


def test_two_models_have_their_own_buffers(book):
    first, second = ConvNet(width=3), ConvNet(width=4)
    for model in (first, second):
        compiled(model, inner="eager")(batch()).backward()
    assert dict(book.models.buffers(of=second.parameters())) == dict(second.named_buffers())
    assert len(book.models.names()) == len(list(first.parameters())) + len(list(second.parameters()))


def test_ddp_splits_are_regions_of_one_compile(book, tmp_path):
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs a process group of its own")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(6)))
        wrapped = nn.parallel.DistributedDataParallel(_Called(model), bucket_cap_mb=1)
        compiled(wrapped, inner="eager")(torch.randn(2, 300)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(book.traces()) > 1
    order = tuple(gradient_order(list(model.named_parameters()), book))
    assert order == tuple(reversed(dict(model.named_parameters())))
    assert book.models.name_of(model[0].weight) == "inner.0.weight"


class _Called(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        for part in self.inner:
            x = part(x)
        return x


# ---- names, buffers, frozen parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("how", ["wrapped", "in place", "twice", "in a step function", "in a trainer"])
def test_names_are_those_of_the_model(book, how, breaks):
    model = GPT(breaks=breaks)
    x = batch()
    if how == "in place":
        model.compile(backend=backend, options={"inner": "eager"})
        model(x).backward()
    elif how == "in a step function":
        compiled(lambda m, x: m(x) * 1, inner="eager")(model, x).backward()
    elif how == "in a trainer":
        _Trainer(model).train(x)
    else:
        wrapped = compiled(model, inner="eager")
        (compiled(wrapped, inner="eager") if how == "twice" else wrapped)(x).backward()
    assert dict(book.models.names()) == dict(model.named_parameters())
    assert {book.lookup(p).name for p in model.parameters()} == set(dict(model.named_parameters()))


class _Trainer:
    """Keeps a compiled model and compiles its own step."""

    def __init__(self, model):
        self.model = compiled(model, inner="eager")
        self.step = compiled(self._step, inner="eager")

    def _step(self, x):
        return self.model(x) * 1

    def train(self, x):
        self.step(x).backward()


def test_a_users_own_module_attribute_keeps_its_name(book):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(D, D)
            self._orig_mod = nn.Linear(D, D)

        def forward(self, x):
            return self._orig_mod(self.module(x)).sum()

    compiled(Wrapper(), inner="eager")(torch.randn(2, D)).backward()
    names = {trace.name for t in book.traces() for _, trace in t.params}
    assert names == {"module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias"}


def test_a_submodule_without_graphs_still_has_its_name(book):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(D, D), nn.Linear(D, D)

        def forward(self, x):
            return self.head(self.recur(torch.relu(x))).sum()

        @torch.compiler.disable
        def recur(self, x):
            return self.lstm(x)[0]

    model = Partly()
    compiled(model, inner="eager")(torch.randn(3, 2, D)).backward()
    assert book.models.name_of(model.lstm.weight_hh_l0) == "lstm.weight_hh_l0"
    assert book.lookup(model.lstm.weight_hh_l0) is None


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("cache", torch.ones(D), persistent=False)

    def forward(self, x):
        self.count.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)  # another tensor at every step
        return (self.frozen(self.lin(x)) * self.cache + self.mean).sum()


def test_buffers_and_frozen_parameters_are_known_as_they_are_now(book):
    model = Buffers()
    step = compiled(model, inner="eager")
    for _ in range(2):
        step(torch.randn(2, D)).backward()
    found = dict(book.models.buffers())
    assert list(found) == ["count", "mean"]
    assert found["mean"] is model.mean
    assert found["count"].item() == 2
    assert list(dict(book.models.transient())) == ["cache"]
    assert [n for n, _ in book.models.frozen(of=model.parameters())] == ["frozen.weight", "frozen.bias"]
    assert book.lookup(model.frozen.weight) is None


def test_an_inference_graph_shows_buffers_and_gives_no_order(book):
    model = ConvNet()
    with torch.no_grad():
        compiled(model)(batch())
    assert book.traces() == ()
    assert book.lookup(model.conv.weight) is None
    assert dict(book.models.buffers()) == dict(model.named_buffers())


def test_nothing_is_kept_alive(book):
    model = checkpointed()
    step = compiled(model)
    step(batch()).backward()
    watched = [weakref.ref(p) for p in model.parameters()]
    del model, step
    torch._dynamo.reset()
    gc.collect()
    assert not any(ref() for ref in watched)
    assert book.models.names() == []
    compiled(Shared(), inner="eager")(torch.randn(2, D)).backward()
    assert len(book.traces()) == 1


# ---- listeners, failures -------------------------------------------------------------------------------------------


def test_a_listener_restores_buffers_before_the_forward_runs(book):
    model = Buffers()

    def restore(trace):
        dict(book.models.buffers())["count"].fill_(41)

    book.listeners.append(restore)
    compiled(model, inner="eager")(torch.randn(2, D))
    assert model.count.item() == 42


def test_a_listeners_refusal_goes_up_to_the_user(book):
    def refuse(trace):
        raise ValueError("this is another model")

    book.listeners.append(refuse)
    with pytest.raises(Exception, match="this is another model"):
        compiled(Shared(), inner="eager")(torch.randn(2, D))


def test_a_dead_listener_is_dropped(book):
    class Run:
        def seen(self, trace):
            raise AssertionError("dead")

    book.listeners.append(weakref.WeakMethod(Run().seen))
    compiled(Shared(), inner="eager")(torch.randn(2, D))
    assert book.listeners == []


@pytest.mark.parametrize("broken", ["read_dynamo", "read_joint"])
def test_a_failure_of_ours_is_logged_once_and_training_goes_on(book, monkeypatch, caplog, broken):
    def fail(*args):
        raise RuntimeError("cannot read this")

    monkeypatch.setattr(joint, broken, fail)
    model = GPT(breaks=True)
    with caplog.at_level(logging.WARNING, logger="fxckpt"):
        compiled(model)(batch()).backward()
    assert all(p.grad is not None for p in model.parameters())
    (record,) = caplog.records
    assert "cannot read this" in record.getMessage()
    order = tuple(gradient_order(list(model.named_parameters()), book))
    assert sorted(order) == sorted(dict(model.named_parameters()))
