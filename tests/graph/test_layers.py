"""Layers and their order: each parameter exactly once, whatever the compiler showed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from graph_models import GPT, Block, ConvNet, D, Shared, batch, book, checkpointed, compiled, front_end, nested
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.weak import TensorWeakRef

from fxckpt.errors import SetupError
from fxckpt.graph.model.book import TraceBook
from fxckpt.graph.model.forward import EARLIER, Use
from fxckpt.graph.model.joint import JointTrace, ParamTrace
from fxckpt.graph.model.layers import Layer, gradient_order, group_layers, layer_edges

__all__ = ["book"]  # the fixture

PARTS = st.sampled_from(["h", "0", "1", "attn", "w", "b"])
FQNS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


def named_tensors(names):
    return [(name, nn.Parameter(torch.zeros(1))) for name in names]


def recorded(book, tensors, first_uses, uses=(), outputs=()):
    """Record a made-up region that uses ``tensors`` first at ``first_uses``."""
    params = tuple((TensorWeakRef(t), ParamTrace("?", -1, at, at, at, at)) for t, at in zip(tensors, first_uses))
    return book.record(JointTrace(-1, (None, None), params, tuple(range(len(params))), (), (), (), uses, outputs))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_parameter_is_in_exactly_one_layer_whatever_was_seen(data):
    named = named_tensors(data.draw(st.lists(FQNS, unique=True, max_size=8)))
    foreign = named_tensors(["x", "y"])
    book = TraceBook()
    for _ in range(data.draw(st.integers(0, 3))):
        seen = data.draw(st.lists(st.sampled_from([*named, *foreign]), unique_by=lambda n: id(n[1]), max_size=8))
        where = data.draw(st.lists(st.integers(0, 5), min_size=len(seen), max_size=len(seen)))
        recorded(book, [t for _, t in seen], where)
    order = tuple(gradient_order(named, book))
    assert sorted(order) == sorted(name for name, _ in named)
    for kind in ("module", "block", lambda name: name[:1]):
        layers = group_layers(order, kind)
        assert sorted(p for layer in layers for p in layer.params) == sorted(order)
        assert len({layer.name for layer in layers}) == len(layers)
        lasts = [max(order.index(p) for p in layer.params) for layer in layers]
        assert lasts == sorted(lasts)
        assert all(list(layer.params) == sorted(layer.params, key=order.index) for layer in layers)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_edges_go_forward_and_none_is_implied_by_others(data):
    named = named_tensors([f"{i}.w" for i in range(data.draw(st.integers(1, 7)))])
    book = TraceBook()
    ids = st.integers(0, len(named) - 1)
    for region in range(data.draw(st.integers(1, 2))):
        uses = []
        for at in range(data.draw(st.integers(1, 8))):
            first = EARLIER if region else 0
            feeders = st.sets(st.integers(first, at - 1), max_size=3) if at > first else st.just(())
            users = data.draw(st.sets(ids, max_size=2))
            uses.append(Use(tuple(sorted(users)), tuple(sorted(data.draw(feeders)))))
        recorded(book, [t for _, t in named], range(len(named)), tuple(uses), (len(uses) - 1,))
    layers = group_layers([name for name, _ in named])
    edges = set(layer_edges(layers, book, named))
    reach = {layer.name: {b for a, b in edges if a == layer.name} for layer in layers}
    for _ in layers:
        reach = {a: bs.union(*(reach[b] for b in bs)) for a, bs in reach.items()}
    assert all(a not in reach[a] for a in reach)
    assert all(not any(b in reach[c] for x, c in edges if x == a and c != b) for a, b in edges)


def test_never_seen_parameters_come_last_in_reverse_registration_order(book):
    named = named_tensors("abcd")
    recorded(book, [named[1][1]], [0])
    assert tuple(gradient_order(named, book)) == ("b", "d", "c", "a")
    assert tuple(gradient_order(named, TraceBook())) == ("d", "c", "b", "a")


def test_a_tensor_with_two_names_counts_once(book):
    (a, tensor), (b, other) = named_tensors("ab")
    assert tuple(gradient_order([(a, tensor), (b, other), ("tied", tensor)], book)) == ("b", "a")


def test_ways_to_group():
    order = ("head.weight", "h.1.attn.bias", "h.1.attn.weight", "h.1.ln.weight", "h.0.ln.weight", "scale")
    assert [layer.name for layer in group_layers(order)] == ["head", "h.1.attn", "h.1.ln", "h.0.ln", "(root)"]
    assert group_layers(order, "block") == (
        Layer("head", ("head.weight",)),
        Layer("h.1", ("h.1.attn.bias", "h.1.attn.weight", "h.1.ln.weight")),
        Layer("h.0", ("h.0.ln.weight",)),
        Layer("(root)", ("scale",)),
    )
    assert [layer.name for layer in group_layers(order, lambda name: "all")] == ["all"]
    with pytest.raises(SetupError, match="'module', 'block' or a function"):
        group_layers(order, "blocks")


def test_a_layer_comes_when_its_last_gradient_is_final():
    assert [layer.name for layer in group_layers(("a.w", "b.w", "b.b", "a.b"))] == ["b", "a"]


@pytest.mark.parametrize(
    "build", [GPT, checkpointed, nested, lambda: GPT(breaks=True)], ids=["plain", "checkpointed", "nested", "graph breaks"]
)
def test_edges_of_a_transformer_are_its_data_flow(book, build):
    model = build()
    compiled(model, inner="eager" if build is not nested else front_end)(batch()).backward()
    layers = group_layers(gradient_order(list(model.named_parameters()), book))
    chain = ["h.0.ln", "h.0.up", "h.0.down", "h.1.ln", "h.1.up", "h.1.down", "ln_f"]
    assert layer_edges(layers, book) == (("wte", "h.0.ln"), ("wpe", "h.0.ln"), *pairwise(chain))
    blocks = group_layers(gradient_order(list(model.named_parameters()), book), "block")
    assert layer_edges(blocks, book) == (("wte", "h.0"), ("wpe", "h.0"), ("h.0", "h.1"), ("h.1", "ln_f"))


def test_edges_of_a_shared_module_make_no_circle(book):
    model = Shared()
    compiled(model, inner="eager")(torch.randn(2, D)).backward()
    layers = group_layers(gradient_order(list(model.named_parameters()), book))
    assert layer_edges(layers, book) == (("a", "b"),)


def test_edges_follow_tensors_where_names_differ(book):
    model = ConvNet()
    compiled(model, inner="eager")(batch()).backward()
    named = [(f"net.{name}", p) for name, p in model.named_parameters()]
    layers = group_layers(gradient_order(named, book))
    assert layer_edges(layers, book, named) == (("net.conv", "net.bn"), ("net.bn", "net.head"))
    assert layer_edges(layers, book) == ()


def test_branches_meet(book):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right, self.out = (nn.Linear(D, D) for _ in range(4))
            self.block = Block()

        def forward(self, x):
            x = self.stem(x)
            parts = [torch.relu(self.left(x)), self.block(self.right(x))]
            y = torch.zeros_like(x)
            y.add_(parts[0])
            y[:, :2] = parts[1][:, :2]
            return self.out(y).sum()

    model = Branches()
    compiled(model, inner="eager")(torch.randn(2, D)).backward()
    layers = group_layers(gradient_order(list(model.named_parameters()), book), lambda n: n.split(".")[0])
    assert set(layer_edges(layers, book)) == {
        ("stem", "left"),
        ("stem", "right"),
        ("right", "block"),
        ("left", "out"),
        ("block", "out"),
    }
