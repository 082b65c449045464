"""The passes of fxckpt.graph, each alone on graphs built by hand."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

from fxckpt.graph import step_graph
from fxckpt.graph.model.forward import EARLIER, Use, walk
from fxckpt.graph.model.joint import JointRead, read_joint
from fxckpt.graph.model.layers import Layer
from fxckpt.graph.update import inductor
from fxckpt.graph.update.foreach import call_methods_pass, widen_to_lists_pass
from fxckpt.graph.update.hoist import mark_host_pass, native_calls_pass, snapshot_counts_pass
from fxckpt.graph.update.specialize import hoist
from fxckpt.graph.update.tensor_scalars import tensor_scalars_pass
from fxckpt.graph.update.trace import NotTraceable, Role

aten = torch.ops.aten


# ---- walk: a forward graph ---------------------------------------------------------------------------------------------


def graph_module(graph: fx.Graph, **attributes) -> fx.GraphModule:
    root = nn.Module()
    for name, value in attributes.items():
        root.add_module(name, value)
    return fx.GraphModule(root, graph)


def placed(graph: fx.Graph, name: str, grad: bool) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = torch.zeros(2, 2, requires_grad=grad)
    return node


def test_walk_positions_are_first_and_last_readers():
    graph = fx.Graph()
    x, w, v = placed(graph, "x", False), placed(graph, "w", True), placed(graph, "v", True)
    a = graph.call_function(torch.mm, (x, w))
    b = graph.call_function(torch.mm, (a, v))
    c = graph.call_function(torch.mm, (b, w))
    graph.output((c,))
    found = walk(graph_module(graph), [1, 2])
    assert found.length == 3
    assert found.reads == {1: (0, 2), 2: (1, 1)}
    assert found.first_use == {1: 0, 2: 1}
    assert found.uses == (Use((1,), ()), Use((2,), (0,)), Use((1,), (1,)))
    assert found.outputs == (2,)


def test_walk_gives_no_use_to_dead_code_and_to_what_is_detached():
    graph = fx.Graph()
    x, w, dead, cut = placed(graph, "x", False), *(placed(graph, n, True) for n in ("w", "dead", "cut"))
    graph.call_function(torch.mm, (x, dead))
    detached = graph.call_function(torch.Tensor.detach, (cut,))
    detached.meta["example_value"] = torch.zeros(2, 2)
    y = graph.call_function(torch.mm, (x, w))
    graph.output((graph.call_function(torch.add, (y, detached)),))
    assert walk(graph_module(graph), [1, 2, 3]).first_use == {1: 2}


def test_walk_takes_what_is_made_of_parameters_alone_for_those_parameters():
    graph = fx.Graph()
    x, w, v = placed(graph, "x", False), placed(graph, "w", True), placed(graph, "v", True)
    tied = graph.call_function(torch.add, (graph.call_function(torch.t, (w,)), v))
    graph.output((graph.call_function(torch.mm, (x, tied)),))
    found = walk(graph_module(graph), [1, 2])
    assert found.uses == (Use((1, 2), ()),)
    assert found.first_use == {1: 0, 2: 1}


def test_walk_knows_activations_of_earlier_regions():
    graph = fx.Graph()
    h, w = placed(graph, "h", True), placed(graph, "w", True)
    graph.output((graph.call_function(torch.mm, (h, w)),))
    assert walk(graph_module(graph), [1]).uses == (Use((1,), (EARLIER,)),)


def test_walk_lays_bodies_out_flat_and_picks_their_outputs():
    body = fx.Graph()
    x, w, v = body.placeholder("x"), body.placeholder("w"), body.placeholder("v")
    body.output((body.call_function(torch.mm, (x, w)), body.call_function(torch.mm, (x, v))))

    def wrap(*args):
        raise AssertionError("never run")

    graph = fx.Graph()
    x, w, v, u = placed(graph, "x", False), *(placed(graph, n, True) for n in "wvu")
    called = graph.call_function(wrap, (graph.get_attr("body"), x, w, v))
    second = graph.call_function(operator.getitem, (called, 1))
    graph.output((graph.call_function(torch.mm, (second, u)),))
    found = walk(graph_module(graph, body=graph_module(body)), [1, 2, 3])
    assert found.first_use == {2: 1, 3: 2}  # of the two in the body only the second reaches the output
    assert found.uses[-1] == Use((3,), (1,))


def test_walk_sees_a_change_in_place():
    graph = fx.Graph()
    x, w, v = placed(graph, "x", False), placed(graph, "w", True), placed(graph, "v", True)
    total = graph.call_function(torch.zeros_like, (x,))
    graph.call_method("add_", (total, graph.call_function(torch.mm, (x, w))))
    graph.output((graph.call_function(torch.mm, (total, v)),))
    assert walk(graph_module(graph), [1, 2]).uses == (Use((1,), ()), Use((2,), (0,)))


# ---- read_joint: a joint graph -----------------------------------------------------------------------------------------


class PlainAOTInput(SimpleNamespace):
    """Stands for AOTAutograd's descriptor, which is told by its class's name."""


class GradAOTOutput(SimpleNamespace):
    """As above."""


def test_read_joint_positions_views_included():
    graph = fx.Graph()
    w, tangent = graph.placeholder("w"), graph.placeholder("tangent")
    w.meta["desc"], tangent.meta["desc"] = PlainAOTInput(idx=3), None
    t = graph.call_function(aten.t.default, (w,))
    forward = graph.call_function(aten.mm.default, (tangent, t))
    both = graph.call_function(aten.split.Tensor, (forward, 1))
    gradient = graph.call_function(operator.getitem, (both, 0))
    out = graph.output(((forward, gradient),))
    out.meta["desc"] = (None, GradAOTOutput(grad_of=PlainAOTInput(idx=3)))
    order = list(graph.nodes)
    assert read_joint(graph) == {3: JointRead(order.index(t), order.index(forward), order.index(both))}


def test_read_joint_says_nothing_of_a_graph_without_gradients():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["desc"] = PlainAOTInput(idx=0)
    out = graph.output((graph.call_function(aten.relu.default, (x,)),))
    out.meta["desc"] = (None,)
    assert read_joint(graph) == {}


# ---- hoist: a traced update ---------------------------------------------------------------------------------------------


def hoisted(build):
    """Hoist a graph over (param, grad, step, lr); ``build(graph, p, g, step, lr)`` adds the update."""
    graph = fx.Graph()
    kinds = (("param", None), ("grad", None), ("state", "step"), ("hyper", ("lr", None)))
    values = (torch.zeros(4), torch.zeros(4), torch.zeros(()), 0.1)
    nodes = []
    for (kind, key), value in zip(kinds, values):
        node = graph.placeholder(kind)
        node.meta["val"] = value
        node.meta["role"] = Role(kind, 0, key)
        nodes.append(node)
    build(graph, *nodes)
    graph.output(())
    signature = SimpleNamespace(state=(("step", True),), hyperparameters=(("lr", None),))
    gm = graph_module(graph)
    gm.meta["outcomes"] = ()
    return hoist(gm, signature)


def call(graph, target, *args, val):
    node = graph.call_function(target, args)
    node.meta["val"] = val
    return node


def test_hoist_moves_the_counts_and_what_is_computed_of_them_to_the_host():
    def build(graph, p, g, step, lr):
        advanced = call(graph, aten.add_.Tensor, step, 1, val=torch.zeros(()))
        rate = call(graph, aten.div.Tensor, advanced, lr, val=torch.zeros(()))
        item = call(graph, aten._local_scalar_dense.default, rate, val=1.0)
        call(graph, aten.sub_.Tensor, p, call(graph, aten.mul.Tensor, g, item, val=torch.zeros(4)), val=torch.zeros(4))

    program = hoisted(build)
    assert program.counts == ("step",)
    assert program.inputs == (("param", None), ("grad", None))
    assert program.scalars == 1
    step, param = torch.tensor(3.0), torch.ones(4)
    (scalar,) = program.host(step, 0.5)
    assert (step.item(), scalar) == (4.0, 8.0)
    program.body(param, torch.full((4,), 0.25), scalar)
    assert param.tolist() == [-1.0] * 4
    assert {n.target for n in program.body.graph.nodes if n.op == "call_function"} == {aten.mul.Tensor, aten.sub_.Tensor}


def test_hoist_keeps_a_write_to_a_count_that_nobody_reads():
    program = hoisted(
        lambda graph, p, g, step, lr: (
            call(graph, aten.add_.Tensor, step, 1, val=torch.zeros(())),
            call(graph, aten.sub_.Tensor, p, g, val=torch.zeros(4)),
        )
    )
    step = torch.tensor(3.0)
    assert program.host(step, 0.5) == ()
    assert step.item() == 4.0


# ---- rewrite, and layouts -----------------------------------------------------------------------------------------------


def test_build_calls_every_update_once_in_order_with_the_tensors_and_scalars_it_is_shown():
    seen = []
    layers = [Layer("b", ("b.w",)), Layer("a", ("a.w",))]
    module = step_graph.build(
        layers, [1, 2], 0, lambda i: lambda tensors, values: seen.append((i, tensors, values)), lambda counts: ["s", *counts]
    )
    for node in [n for n in module.graph.nodes if n.op == "call_function"]:
        module.graph.erase_node(node)  # no run stands behind the ops
    module.recompile()
    module(7, ["count"], ["tensor b"], ["tensor a"])
    assert seen == [(0, ["tensor b"], ["s", "count"]), (1, ["tensor a"], ["s", "count"])]


@pytest.mark.parametrize(
    "tensor, other, same",
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), True),
        (torch.zeros(2, 3), torch.zeros(3, 2).t(), False),
        (torch.zeros(4, 1, 1, 1), torch.zeros(4, 1, 1, 1).to(memory_format=torch.channels_last), True),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), False),
    ],
)
def test_layouts_are_compared_by_the_strides_that_mean_something(tensor, other, same):
    assert inductor.same_layout(tensor, other) is same


# ---- the passes over an update's body, each alone ------------------------------------------------------------------------


def body(build) -> fx.GraphModule:
    """A body over (param, grad, scalar); ``build(graph, p, g, s)`` adds the operators."""
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("param", "grad", "scalar")]
    for node in nodes[:2]:
        node.meta["val"] = torch.zeros(4)
    build(graph, *nodes)
    graph.output(())
    return graph_module(graph)


def sgd(graph, p, g, s):
    """``p -= s * g``, as operators."""
    step = call(graph, aten.mul.Tensor, g, s, val=torch.zeros(4))
    call(graph, aten.sub_.Tensor, p, step, val=torch.zeros(4))


def test_marks_say_what_runs_on_the_host():
    graph = fx.Graph()
    p, step, lr = (graph.placeholder(name) for name in ("param", "step", "lr"))
    for node, role in ((p, Role("param")), (step, Role("state", 0, "step")), (lr, Role("hyper", 0, ("lr", None)))):
        node.meta["role"] = role
    advanced = call(graph, aten.add_.Tensor, step, 1, val=torch.zeros(()))
    rate = call(graph, operator.mul, lr, 2.0, val=0.2)
    moved = call(graph, aten.mul_.Tensor, p, rate, val=torch.zeros(4))
    graph.output(())
    mark_host_pass(graph_module(graph), ["step"])
    assert [n.meta["host"] for n in (p, step, lr, advanced, rate, moved)] == [False, True, True, True, True, False]


def test_a_branch_on_tensors_is_no_host_work():
    graph = fx.Graph()
    p = graph.placeholder("param")
    p.meta["role"] = Role("param")
    graph.output((call(graph, operator.gt, p, 0, val=True),))
    with pytest.raises(NotTraceable, match="branches on the values of a tensor"):
        mark_host_pass(graph_module(graph), [])


def test_a_count_that_is_read_before_it_advances_is_read_from_a_copy():
    graph = fx.Graph()
    p, step = graph.placeholder("param"), graph.placeholder("step")
    p.meta["role"], step.meta["role"] = Role("param"), Role("state", 0, "step")
    call(graph, aten.mul_.Tensor, p, step, val=torch.zeros(4))
    call(graph, aten.add_.Tensor, step, 1, val=torch.zeros(()))
    call(graph, aten.add_.Tensor, p, step, val=torch.zeros(4))
    graph.output(())
    gm = snapshot_counts_pass(mark_host_pass(graph_module(graph), ["step"]))
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [
        aten.clone.default, aten.mul_.Tensor, aten.add_.Tensor, aten.add_.Tensor,
    ]  # fmt: skip
    param, count = torch.ones(2), torch.tensor(3.0)
    gm(param, count)
    assert (param.tolist(), count.item()) == ([7.0, 7.0], 4.0)


def test_operators_become_the_functions_that_pytorch_calls():
    graph = fx.Graph()
    counts = graph.placeholder("counts")
    graph.call_function(aten._foreach_add_.Scalar, (counts, 1))
    graph.output(())
    gm = native_calls_pass(graph_module(graph))
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [torch._foreach_add_]
    column = [torch.tensor(1.0), torch.tensor(2.0)]
    gm(column)
    assert [t.item() for t in column] == [2.0, 3.0]


def test_a_body_over_lists_has_the_bits_of_the_body_for_each():
    single, wide = body(sgd), widen_to_lists_pass(body(sgd), 2, [torch.float32] * 3)
    grads = [torch.randn(3), torch.randn(2, 5)]
    ones, lists = [torch.ones_like(g) for g in grads], [torch.ones_like(g) for g in grads]
    for p, g in zip(ones, grads):
        single(p, g, 0.1)
    wide(lists, [g.clone() for g in grads], 0.1)
    assert all(map(torch.equal, ones, lists))


def test_an_operator_without_a_list_form_is_refused_by_its_name():
    gm = body(lambda graph, p, g, s: call(graph, aten.cumsum.default, g, 0, val=torch.zeros(4)))
    with pytest.raises(NotTraceable, match=r"aten.cumsum.default has no list form"):
        widen_to_lists_pass(gm, 2, [torch.float32])


def test_a_body_by_methods_has_the_bits_of_the_operators():
    operators, methods = body(sgd), call_methods_pass(body(sgd))
    assert {n.target for n in methods.graph.nodes if n.op == "call_function"} == {torch.Tensor.mul, torch.Tensor.sub_}
    one, other, grad = torch.ones(4), torch.ones(4), torch.randn(4)
    operators(one, grad, 0.1)
    methods(other, grad, 0.1)
    assert torch.equal(one, other)


def test_a_scalar_becomes_a_tensor_where_inductor_would_bake_it_in():
    def build(graph, p, g, s):
        call(graph, aten.add_.Tensor, p, call(graph, aten.addcdiv.default, p, g, g, val=torch.zeros(4)), val=torch.zeros(4))
        graph.call_function(aten.lerp_.Scalar, (p, g, s))

    gm = tensor_scalars_pass(body(build), 1)
    assert aten.lerp_.Scalar not in {n.target for n in gm.graph.nodes}
    assert aten.addcdiv.default in {n.target for n in gm.graph.nodes}, "it reads no scalar"
    one, other, grad = torch.ones(4), torch.ones(4), torch.rand(4) + 1
    body(build)(one, grad, 0.25)
    gm(other, grad, torch.tensor(0.25))
    torch.testing.assert_close(one, other)


def test_an_operator_without_a_form_for_a_tensor_scalar_is_refused_by_its_name():
    gm = body(lambda graph, p, g, s: graph.call_function(aten.fill_.Scalar, (p, s)))
    with pytest.raises(NotTraceable, match=r"no tensor form of aten.fill_.Scalar"):
        tensor_scalars_pass(gm, 1)
