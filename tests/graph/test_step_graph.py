"""The StepGraph: what it prints, and that its passes keep their contracts."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.fx as fx
from expecttest import TestCase
from torch import nn

import fxckpt
from fxckpt.graph import ops, step_graph
from fxckpt.graph.model.layers import Layer
from fxckpt.graph.schedule import identifier
from fxckpt.graph.update.specialize import hoist
from fxckpt.graph.update.trace import NotTraceable, replace_sentinels, signature_of, trace


def stepped(every=1, journal=1, **options):
    """A two-layer model after two steps, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.fc1, model.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)
    opt = torch.optim.AdamW(model.parameters(), **options)
    fxckpt.compile_step(opt, writer="mock", every=every, journal=journal, model=model)
    for _ in range(2):
        model(torch.ones(3, 4)).sum().backward()
        opt.step()
    return model, opt


def traced(cls=torch.optim.AdamW, implementation="single", **options):
    """The traced update of one parameter, with its signature."""
    param = nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    opt = cls([param], lr=0.1, **options)
    opt.step()
    group = opt.param_groups[0]
    signature = signature_of(opt, group, param, opt.state[param], implementation)
    return trace(opt, group, param, opt.state[param], signature), signature


class Printed(TestCase):
    def test_step_graph_of_a_two_layer_model(self):
        self.assertExpectedInline(
            str(stepped(fused=True)[1].ckpt.graph),
            """\
def forward(self, run : int, counts, fc2, fc1):
    torch.ops.fxckpt.ckpt_fence(counts, run, 0, 'counts')
    scalars = self.scalars(counts)
    torch.ops.fxckpt.ckpt_emit(counts, run, 0, 'counts')
    torch.ops.fxckpt.ckpt_fence(fc2, run, 1, 'fc2')
    update_fc2 = self.update_fc2(fc2, scalars)
    torch.ops.fxckpt.ckpt_emit(fc2, run, 1, 'fc2')
    torch.ops.fxckpt.ckpt_fence(fc1, run, 2, 'fc1')
    update_fc1 = self.update_fc1(fc1, scalars)
    torch.ops.fxckpt.ckpt_emit(fc1, run, 2, 'fc1')
    return None""",
        )

    def test_step_graph_with_a_journal_hands_gradients_over_before_their_update(self):
        self.assertExpectedInline(
            str(stepped(journal=4, fused=True)[1].ckpt.graph),
            """\
def forward(self, run : int, counts, fc2, fc1):
    torch.ops.fxckpt.ckpt_fence(counts, run, 0, 'counts')
    scalars = self.scalars(counts)
    torch.ops.fxckpt.ckpt_emit(counts, run, 0, 'counts')
    torch.ops.fxckpt.ckpt_fence(fc2, run, 1, 'fc2')
    gradients_fc2 = self.gradients_fc2(scalars)
    torch.ops.fxckpt.ckpt_log(gradients_fc2, run, 1, 'fc2')
    update_fc2 = self.update_fc2(fc2, scalars)
    torch.ops.fxckpt.ckpt_emit(fc2, run, 1, 'fc2')
    torch.ops.fxckpt.ckpt_fence(fc1, run, 2, 'fc1')
    gradients_fc1 = self.gradients_fc1(scalars)
    torch.ops.fxckpt.ckpt_log(gradients_fc1, run, 2, 'fc1')
    update_fc1 = self.update_fc1(fc1, scalars)
    torch.ops.fxckpt.ckpt_emit(fc1, run, 2, 'fc1')
    return None""",
        )

    def test_hoisted_scalars_and_body_of_sgd_with_momentum(self):
        program = hoist(*traced(torch.optim.SGD, momentum=0.9))
        self.assertExpectedInline(
            str(program.host.graph).strip(),
            """\
graph():
    %lr : [num_users=1] = placeholder[target=lr]
    %momentum : [num_users=1] = placeholder[target=momentum]
    %neg : [num_users=1] = call_function[target=operator.neg](args = (%lr,), kwargs = {})
    return (momentum, neg)""",
        )
        self.assertExpectedInline(
            str(program.body.graph).strip(),
            """\
graph():
    %param : [num_users=1] = placeholder[target=param]
    %grad : [num_users=1] = placeholder[target=grad]
    %momentum_buffer : [num_users=1] = placeholder[target=momentum_buffer]
    %scalar0 : [num_users=1] = placeholder[target=scalar0]
    %scalar1 : [num_users=1] = placeholder[target=scalar1]
    %mul__tensor : [num_users=1] = call_function[target=torch.ops.aten.mul_.Tensor](args = (%momentum_buffer, %scalar0), kwargs = {})
    %add__tensor : [num_users=1] = call_function[target=torch.ops.aten.add_.Tensor](args = (%mul__tensor, %grad), kwargs = {})
    %add__tensor_1 : [num_users=0] = call_function[target=torch.ops.aten.add_.Tensor](args = (%param, %add__tensor), kwargs = {alpha: %scalar1})
    return ()""",
        )

    def test_fused_kernel_is_kept_with_hyperparameters_as_inputs(self):
        program = hoist(*traced(implementation="fused", fused=True))
        self.assertExpectedInline(
            str(program.body.graph).strip(),
            """\
graph():
    %param : [num_users=1] = placeholder[target=param]
    %grad : [num_users=1] = placeholder[target=grad]
    %exp_avg : [num_users=1] = placeholder[target=exp_avg]
    %exp_avg_sq : [num_users=1] = placeholder[target=exp_avg_sq]
    %step : [num_users=1] = placeholder[target=step]
    %scalar0 : [num_users=1] = placeholder[target=scalar0]
    %scalar1 : [num_users=1] = placeholder[target=scalar1]
    %scalar2 : [num_users=1] = placeholder[target=scalar2]
    %scalar3 : [num_users=1] = placeholder[target=scalar3]
    %scalar4 : [num_users=1] = placeholder[target=scalar4]
    %_fused_adamw__default : [num_users=0] = call_function[target=torch._fused_adamw_](args = (%param, %grad, %exp_avg, %exp_avg_sq, [], %step), kwargs = {lr: %scalar0, beta1: %scalar1, beta2: %scalar2, weight_decay: %scalar3, eps: %scalar4, amsgrad: False, maximize: False})
    return ()""",
        )


def test_ops_survive_dead_code_elimination():
    graph = stepped()[1].ckpt.graph
    before = len(graph.graph.nodes)
    graph.graph.eliminate_dead_code()
    assert len(graph.graph.nodes) == before


def test_every_fence_stands_before_its_update_and_every_emit_after():
    layers = [Layer(f"h.{i}", (f"h.{i}.w",)) for i in range(3)]
    module = step_graph.build(step_graph.step_passes(layers, [1, 2, 3], 0, lambda i: lambda *_: None, list))
    targets = [n.target for n in module.graph.nodes if n.op in ("call_function", "call_module")]
    assert targets[:3] == [ops.ckpt_fence, "scalars", ops.ckpt_emit]
    for i, layer in enumerate(layers):
        name = f"update_{identifier(layer.name)}"
        assert targets[3 + 3 * i : 6 + 3 * i] == [ops.ckpt_fence, name, ops.ckpt_emit]


def test_layers_whose_names_become_one_identifier_stay_apart():
    layers = [Layer("a.b", ("a.b.w",)), Layer("a_b", ("a_b.w",)), Layer("class", ("class.w",)), Layer("", ("w",))]
    module = step_graph.build(step_graph.step_passes(layers, range(4), None, lambda i: lambda *_: None, list))
    assert len([n for n in module.graph.nodes if n.op == "placeholder"]) == 5


def test_order_holds_every_parameter_once_and_layers_their_sizes():
    model, opt = stepped()
    graph = opt.ckpt.graph
    assert sorted(graph.order) == sorted(n for n, _ in model.named_parameters())
    assert graph.sizes["fc2"] == 3 * 4 * (8 * 2 + 2)


def test_a_kept_graph_of_a_dead_run_says_so():
    graph = step_graph.build(step_graph.step_passes([Layer("a", ("a",))], [0], None, lambda i: lambda *_: None, list))
    try:
        graph(987654, [torch.ones(1)])
    except RuntimeError as error:
        assert "that run is gone" in str(error)
    else:
        raise AssertionError("it ran")


def test_a_dropped_emit_fails_the_checkpoint_loudly():
    model, opt = stepped(every=1)
    module = opt.ckpt.graph.module
    for node in [n for n in module.graph.nodes if n.target is ops.ckpt_emit][1:2]:
        module.graph.erase_node(node)
    module.recompile()
    model(torch.ones(3, 4)).sum().backward()
    opt.step()
    try:
        opt.ckpt.flush()
    except fxckpt.FxckptError as error:
        assert "2 of 3 layers were emitted" in str(error)
    else:
        raise AssertionError("a checkpoint with a missing layer went through")


def test_numeric_hyperparameters_are_inputs_and_zero_is_structure():
    _, plain = traced(weight_decay=0.0)
    _, decayed = traced(weight_decay=0.1)
    assert ("weight_decay", None) not in plain.hyperparameters
    assert ("weight_decay", None) in decayed.hyperparameters
    assert traced(weight_decay=0.3, betas=(0.5, 0.6))[1] == decayed


def test_two_sentinel_traces_that_disagree_are_refused():
    graph = fx.Graph()
    a = graph.placeholder("a")
    graph.call_function(torch.ops.aten.mul_.Tensor, (a, 0.25))
    other = fx.Graph()
    other.call_function(torch.ops.aten.mul_.Tensor, (other.placeholder("a"), 0.5))
    try:
        replace_sentinels(graph, other, {("lr", None): 0.1}, {("lr", None): 0.2})
    except NotTraceable as reason:
        assert "computed from hyperparameters" in str(reason)
    else:
        raise AssertionError("a constant that depends on hyperparameters was baked in")


def test_a_list_that_is_no_column_is_refused():
    found, signature = traced(implementation="foreach", foreach=True)
    node = next(n for n in found.graph.nodes if n.target is torch.ops.aten._foreach_sqrt.default)
    node.args = (list(reversed(node.args[0])),)
    try:
        hoist(found, signature)
    except NotTraceable as reason:
        assert "not a whole column" in str(reason)
    else:
        raise AssertionError("columns were mixed up silently")


def test_no_two_runs_have_one_number_whichever_threads_begin_them_and_whatever_has_ended():
    """A graph that was kept would else hand its tensors to another run."""

    class Run:
        """One that is gone at once."""

    def begun(_: int) -> list[int]:
        return [ops.register_port(Run()) for _ in range(500)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            numbers = [number for each in pool.map(begun, range(8)) for number in each]
    finally:
        sys.setswitchinterval(before)
    assert len(set(numbers)) == len(numbers) == 4000
