"""What fxckpt takes from torch's private parts is still there and still means the same."""

from __future__ import annotations

import inspect
import operator

import pytest
import torch
import torch._functorch._aot_autograd.descriptors as descriptors
import torch._inductor.config as inductor_config
from graph_models import GPT, D, batch, book, front_end
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxckpt.compat.dynamo import (
    called_modules,
    compile_under_way,
    compiling_scope,
    first_module,
    gradient_of,
    graph_input,
    input_index,
    is_view,
    source_name,
    untraced,
)
from fxckpt.compat.inductor import compile_with_backend, reset_cudagraphs
from fxckpt.compat.modules import _WRAPPERS, own_buffers, unwrap_model, wrapped_module
from fxckpt.compat.optimizers import inner_hooks, is_stock, unhooked_step
from fxckpt.compat.tensors import is_transformed, is_wrapper, set_grad_mode
from fxckpt.compat.threads import modes_active
from fxckpt.compat.tracing import branch_node, fake_mode, is_stand_in, stand_in, symbolic_numbers, trace_fake, watched

__all__ = ["book"]  # the fixture


# ---- the backend -------------------------------------------------------------------------------------------------


class Spy:
    """A backend that asks ``question(gm, example_inputs)`` inside the call and keeps the answers."""

    def __init__(self, question):
        self.question, self.answers = question, []

    def __call__(self, gm, example_inputs):
        self.answers.append(self.question(gm, example_inputs))
        return gm.forward


def test_wrappers_are_known_by_type():
    model = nn.Linear(2, 2)
    wrapped = torch.compile(nn.DataParallel(checkpoint_wrapper(model)))
    assert isinstance(wrapped_module(wrapped), nn.DataParallel)
    assert unwrap_model(wrapped) is model
    assert wrapped_module(model) is None


def test_every_wrapper_in_the_table_has_the_attribute():
    for where, name, attribute in _WRAPPERS:
        module = pytest.importorskip(where)
        assert issubclass(getattr(module, name), nn.Module)
        assert attribute in inspect.getsource(module)


def test_persistent_buffers_are_told_from_others():
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("dropped", torch.zeros(1), persistent=False)
    assert [name for name, _ in own_buffers(module, True)] == ["kept"] == list(module.state_dict())
    assert [name for name, _ in own_buffers(module, False)] == ["dropped"]


def test_modules_being_called_are_on_the_stack():
    spy = Spy(lambda gm, inputs: called_modules())
    model = GPT(breaks=True)
    wrapped = torch.compile(model, backend=spy)
    wrapped(batch())
    assert [found[0] for found in spy.answers] == [wrapped] * 3
    assert all(model in found for found in spy.answers)
    assert called_modules() == []


def test_graph_inputs_are_live_and_their_sources_lead_to_the_model():
    model = GPT()

    def question(gm, inputs):
        scope = compiling_scope()
        pairs = [graph_input(n, e) for n, e in zip(gm.graph.find_nodes(op="placeholder"), inputs)]
        return [(t, source_name(s), first_module(s, scope)) for t, s in pairs if isinstance(t, nn.Parameter)]

    spy = Spy(question)
    torch.compile(lambda holder: holder["model"](batch()), backend=spy)({"model": model})
    (found,) = spy.answers
    assert {id(t) for t, _, _ in found} == {id(p) for p in model.parameters()}
    assert all(root is model for _, _, root in found)
    assert all(name.startswith("L['holder']['model']._modules") for _, name, _ in found)
    assert compiling_scope() is None


def test_a_recompile_keeps_its_frame_and_has_another_token():
    spy = Spy(lambda gm, inputs: (compile_under_way()[0], compile_under_way()[1]()))
    step = torch.compile(lambda x: x + 1, backend=spy)
    step(torch.ones(2))
    step(torch.ones(3))
    (frame, context), (same, other) = spy.answers
    assert frame == same is not None
    assert context is not other is not None
    assert compile_under_way() == (None, None)


def test_descriptors_name_dynamos_inputs():
    third = descriptors.PlainAOTInput(idx=3)
    assert input_index(third) == 3
    assert input_index(descriptors.SubclassGetAttrAOTInput(base=third, attr="inner")) == 3
    assert input_index(descriptors.ViewBaseAOTInput(base_of=third)) == 3
    assert input_index(None) is None
    gradient = descriptors.GradAOTOutput(grad_of=third)
    assert gradient_of(gradient) == 3
    assert gradient_of(descriptors.SubclassGetAttrAOTOutput(base=gradient, attr="inner")) == 3
    assert gradient_of(descriptors.PlainAOTOutput(idx=3)) is None


def test_views_are_known_by_their_schema():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    aten = torch.ops.aten
    views = [aten.t.default, aten.view.default, aten.permute.default, aten.expand.default, aten.split.Tensor, operator.getitem]
    others = [aten.mm.default, aten._to_copy.default, aten.add_.Tensor, operator.add]
    assert all(is_view(graph.call_function(op, (x,))) for op in views)
    assert not any(is_view(graph.call_function(op, (x,))) for op in others)


def test_the_joint_pass_sees_gradients_with_descriptors_and_config_is_restored():
    seen = []

    def read(graph):
        (output,) = graph.find_nodes(op="output")
        seen.append([gradient_of(d) for d in output.meta.get("desc", ())])

    def compiler(gm, inputs):
        return compile_with_backend(front_end, gm, inputs, None, {}, read)

    linear = nn.Linear(D, D)
    torch.compile(linear, backend=compiler)(torch.randn(2, D)).sum().backward()
    assert [i for i in seen[0] if i is not None] == [0, 1]
    assert inductor_config.joint_custom_pre_pass is None


def test_the_inductor_wrapper_takes_mode_and_options():
    wrapper = torch._TorchCompileInductorWrapper("max-autotune-no-cudagraphs", {"epilogue_fusion": False}, None)
    assert wrapper.config["max_autotune"] is True
    assert wrapper.config["epilogue_fusion"] is False


def test_a_backend_can_be_named():
    gm = torch.fx.symbolic_trace(nn.Identity())
    assert compile_with_backend("eager", gm, [], None, {})(torch.ones(1)) == 1


def test_cuda_graphs_can_be_reset():
    reset_cudagraphs()
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    assert callable(reset_cudagraph_trees)


# ---- tensors -----------------------------------------------------------------------------------------------------


def test_tensors_of_transforms_and_wrappers_are_told_from_plain_ones():
    assert not is_transformed(torch.ones(2))
    seen = []
    torch.func.vmap(lambda x: seen.append(is_transformed(x)) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(is_transformed(x)) or x)(torch.tensor(1.0))
    assert seen == [True, True]
    assert not is_wrapper(nn.Parameter(torch.ones(2)))
    assert is_wrapper(torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged))


# ---- tracing optimizers ------------------------------------------------------------------------------------------


def test_a_trace_is_told_how_branches_go_and_keeps_them():
    def fn(x, count):
        x.mul_(2.0 if count.item() * 3 > 5 else 4.0)

    for script, factor in ((), 2.0), ((False,), 4.0):
        found = trace_fake(fn, [torch.ones(3), torch.tensor(1.0)], script)
        assert [outcome for _, outcome in found.branches] == [bool(factor == 2.0)]
        assert factor in [a for n in found.graph.nodes for a in n.args]
        node = branch_node(found.graph, found.branches[0][0], found.symbols)
        found.graph.output((node,))
        [found.graph.erase_node(n) for n in list(found.graph.nodes) if n.op == "output" and not n.args[0]]
        module = torch.fx.GraphModule(torch.nn.Module(), found.graph)
        assert [module(torch.ones(3), torch.tensor(c))[0] for c in (1.0, 2.0)] == [False, True]


def test_extremes_and_tensors_of_symbols_are_nodes_only_while_an_optimizer_is_traced():
    opt = torch.optim.ASGD([nn.Parameter(torch.ones(2))])
    names = unhooked_step(opt).__globals__

    def fn(x, count):
        with symbolic_numbers(opt):
            x.copy_(torch.as_tensor(names["max"](1, count.item() - 2)))

    found = trace_fake(fn, [torch.ones(()), torch.tensor(7.0)])
    assert found.branches == []
    assert torch.sym_max in [n.target for n in found.graph.nodes]
    assert "max" not in names and "min" not in names


def test_stand_ins_have_looks_and_no_memory():
    like = torch.empty_strided((2, 3), (1, 2), dtype=torch.bfloat16)
    made = stand_in(like)
    assert (made.shape, made.stride(), made.dtype, made.device) == (like.shape, like.stride(), like.dtype, like.device)
    assert is_stand_in(made) and not is_stand_in(like)
    assert is_stand_in(nn.Parameter(made))
    with fake_mode():
        assert is_stand_in(torch.ops.aten.mul.Tensor(made, 2.0))
        assert is_stand_in(torch.ops.aten.mul.Tensor(made, torch.ones(())))


def test_everything_that_is_done_with_a_stand_in_is_watched():
    made, calls, operators = stand_in(torch.ones(2)), [], []

    def called(func, args, kwargs):
        calls.append(func)
        return func(*args, **kwargs)

    def dispatched(func, args, kwargs):
        operators.append((func, args, kwargs))
        with fake_mode():
            return func(*args, **kwargs)

    with watched(called, dispatched):
        made.shape, made.dtype, made.numel(), len(made)
        kept = made.data
        made.add_(kept, alpha=0.5).mul_(3)
    functions = [torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.numel, torch.Tensor.__len__]
    assert calls == [*functions, torch.Tensor.data.__get__, torch.Tensor.add_, torch.Tensor.mul_]
    aten = torch.ops.aten
    assert [(func, args[1:], kwargs) for func, args, kwargs in operators if func.namespace == "aten"] == [
        (aten.detach.default, (), {}),
        (aten.add_.Tensor, (kept,), {"alpha": 0.5}),
        (aten.mul_.Tensor, (3,), {}),
    ]


def test_a_stock_class_is_known_from_one_that_has_its_name():
    class AdamW(torch.optim.AdamW):
        pass

    parameters = [nn.Parameter(torch.ones(1))]
    assert is_stock(torch.optim.AdamW(parameters))
    assert not is_stock(AdamW(parameters))


def test_compiled_functions_refuse_to_be_watched_and_compile_afterwards():
    graphs = []

    @torch.compile(backend=lambda gm, inputs: graphs.append(gm) or gm.forward, fullgraph=True)
    def twice(x):
        return x * 2

    run = lambda func, args, kwargs: func(*args, **kwargs)  # noqa: E731
    with pytest.raises(RuntimeError, match="dynamo-optimized function"), watched(run, run):
        twice(torch.ones(3))
    assert not torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0))
    assert len(graphs) == 1


def test_hooks_that_an_inner_step_would_call_are_known():
    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    parameters = [nn.Parameter(torch.ones(1))]
    stock, derived = torch.optim.SGD(parameters), Derived(parameters)
    assert not inner_hooks(derived)
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    assert inner_hooks(derived) and not inner_hooks(stock)
    handle.remove()
    assert not inner_hooks(derived)
    derived.register_step_post_hook(lambda *_: None)
    assert inner_hooks(derived)


def test_a_profiler_sets_its_flag():
    assert torch.autograd.profiler._is_profiler_enabled is False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch.autograd.profiler._is_profiler_enabled is True
    assert torch.autograd.profiler._is_profiler_enabled is False


def test_gradients_are_turned_off_as_no_grad_does_it():
    set_grad_mode(False)
    assert not torch.is_grad_enabled()
    set_grad_mode(True)
    assert torch.is_grad_enabled()


def test_active_modes_are_seen():
    from torch.utils._python_dispatch import TorchDispatchMode

    assert not modes_active()
    with TorchDispatchMode():
        assert modes_active()
    with torch.device("cpu"):
        assert modes_active()
    assert not modes_active()


def test_dynamo_is_asked_before_it_is_turned_off_with_this_torch():
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    seen = []
    function = untraced(lambda: seen.append(get_eval_frame_callback()))
    assert not hasattr(function, "_torchdynamo_orig_callable"), "it is torch.compiler.disable itself"
    function()
    torch.compile(lambda x: (torch._dynamo.graph_break(), function(), x + 1)[2], backend="eager")(torch.ones(1))
    assert seen == [None, None]
