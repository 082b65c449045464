"""What fxckpt takes from torch's private parts is still there and still means the same."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch._functorch._aot_autograd.descriptors as descriptors
import torch._inductor.config as inductor_config
import torch.distributed as dist
from graph_models import GPT, D, batch, book, front_end
from repository import ROOT
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxckpt.compat.dynamo import (
    called_modules,
    compile_under_way,
    compiled_module,
    compiling_scope,
    copied_graph_module,
    first_module,
    gradient_of,
    graph_input,
    input_index,
    is_view,
    limits_reached,
    only_inlined,
    output_index,
    source_name,
    untraced,
)
from fxckpt.compat.inductor import (
    cache_folder,
    compile_with,
    compile_with_backend,
    compile_with_inductor,
    compiler_settings,
    inductor_kernel,
    joint_pass,
    load_cpp,
    refused,
    reset_cudagraphs,
)
from fxckpt.compat.loaders import (
    DataEnded,
    Start,
    WorkersIterator,
    copied,
    holds_workers,
    iterates_as_torch,
    loaders_alive,
    reading_ended,
    skip_order,
    tell_end,
    watch_order,
    watch_samples,
)
from fxckpt.compat.module_attributes import OWN_NAMES, plain_attributes
from fxckpt.compat.module_state import (
    added_entries,
    fill,
    give_back,
    keeps_more,
    mixed_modes,
    own_contracts,
    set_modes,
    state_of,
    takes_shapes,
)
from fxckpt.compat.modules import (
    _WRAPPERS,
    compiled_in_vain,
    every_module,
    extra_state_modules,
    has_extra_state,
    named_buffers,
    named_parameters,
    one_model,
    own_buffers,
    owners_of,
    places,
    tensors_of,
    unwrap_model,
    wrapped_module,
)
from fxckpt.compat.optimizers import (
    callers,
    comes_by_itself,
    complete,
    count_skipped_attempts,
    default_implementation,
    forwards,
    has_own_contract,
    has_pre_hooks,
    hooked,
    inner_hooks,
    is_stock,
    mark_stepped,
    marked_for_schedulers,
    plain_class,
    rebind_scheduler_wrapper,
    sets_up_state,
    settings_of,
    steps_like_one,
    stock_step,
    takes,
    unhooked_step,
    watch_steps,
)
from fxckpt.compat.placing import (
    accumulates,
    autograd_is_compiled,
    call_at_end_of_backward,
    called_op,
    placing_options,
    region_nodes,
    scheduled,
)
from fxckpt.compat.tensors import (
    backward_under_way,
    gradient_accumulator,
    gradient_node,
    hooks_of,
    is_transformed,
    is_wrapper,
    leaves_of,
    no_torch_function,
    on_gradient,
    set_grad_mode,
    shape_only,
    version_of,
)
from fxckpt.compat.threads import can_use_one_core, modes_active, one_core
from fxckpt.compat.tracing import (
    branch_node,
    fake_mode,
    is_stand_in,
    stand_in,
    symbolic_float,
    symbolic_numbers,
    trace_fake,
    watched,
)
from fxckpt.compat.tracing_step import compiled_by_itself, constant, forget_source_of_none, innermost, traced_so_far
from fxckpt.compat.unreduced import held_back, hold_back, holding
from fxckpt.errors import SetupError

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


def test_a_model_of_which_torch_compiles_nothing_is_known_by_its_wrappers():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)  # one would need a process group
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Sequential(nn.Linear(2, 2))
    assert compiled_in_vain(torch.compile(wrapped)) == "Sequential"  # tests/ranks/test_ddp.py sees that it is so
    assert compiled_in_vain(wrapped) is None and compiled_in_vain(torch.compile(wrapped.module)) is None
    wrapped.module = GPT()
    assert compiled_in_vain(torch.compile(wrapped)) is None


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
    assert tensors_of(module) == {id(module.kept), id(module.dropped)}


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
    assert output_index(descriptors.PlainAOTOutput(idx=3)) == 3 and output_index(gradient) is None


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


# ---- module_state, and several modules ---------------------------------------------------------------------------------


class Resized(nn.Module):
    """Takes a table of any size, and adds a number to its state dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1))
        self.number = 1

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "number"] = self.number
        destination[prefix + "again"] = self.table

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.table = torch.empty_like(state_dict[prefix + "table"])
        self.number = state_dict.pop(prefix + "number", 0)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_what_a_module_adds_to_its_own_state_dict_is_told_apart_and_given_back():
    model = nn.Sequential(nn.Linear(1, 1), Resized())
    assert [name for name, _ in own_contracts(model)] == ["1"]
    assert [keeps_more(each) for each in (model[0], model[1])] == [False, True]
    assert added_entries(model[1]) == {"number": 1}
    assert state_of(model) == {"modules": {}, "eval": [], "contracts": {"1": {"number": 1}}}
    give_back(model[1], {"number": 5})
    assert model[1].number == 5
    for hook in ("_register_state_dict_hook", "register_state_dict_post_hook", "register_state_dict_pre_hook"):
        hooked = nn.Linear(1, 1)
        getattr(hooked, hook)(lambda *_: None)
        assert [module for _, module in own_contracts(nn.Sequential(hooked))] == [hooked]


def test_a_module_says_which_shapes_it_takes_without_being_changed():
    module = Resized()
    assert takes_shapes(module, {"table": torch.ones(3)}) and module.number == 1 and module.table.shape == (1,)
    assert not takes_shapes(nn.BatchNorm1d(2), {"running_mean": torch.ones(3)})
    assert not takes_shapes(nn.Linear(1, 1), {"weight": torch.ones(3)})
    fill(module, {"table": torch.ones(3)})
    assert module.table.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        fill(nn.BatchNorm1d(2), {"running_mean": torch.ones(3)})


def test_modes_are_set_one_by_one():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    assert mixed_modes([model, nn.Linear(1, 1).eval()]) == []
    assert set_modes(model, {"1"}) == {True: [], False: ["1"]} and mixed_modes([model]) == ["1"]
    assert set_modes(model, {""}) == {True: ["1"], False: ["Sequential"]}


def test_several_modules_are_one_and_a_parameter_s_owner_is_found():
    a, b, loose = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)), nn.Parameter(torch.ones(1))
    assert [name for name, _ in named_parameters(one_model([a, b]))] == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert one_model(torch.compile(a)) is a and one_model(None) is None
    compiled = torch.compile(b)
    assert owners_of([a.weight, b[0].bias, loose]) == {id(a.weight): a, id(b[0].bias): b}
    del compiled


def test_a_reached_recompile_limit_is_counted():
    class Scheduled(nn.Module):
        k = 0

        def forward(self, x):
            return x * (self.k + 0.5)

    model, before = Scheduled(), limits_reached()
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for model.k in range(2):
            compiled(torch.ones(1))
        assert limits_reached() == before
        for model.k in range(2, 4):
            compiled(torch.ones(1))
    assert limits_reached() > before


# ---- updates inside the backward -----------------------------------------------------------------------------------------


def test_a_schedule_and_the_graph_before_it_are_shown_and_nodes_can_be_left_out(inductor_cache):
    from fxckpt.graph import ops

    changed, schedules = [], []

    def change(graph):
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            changed.append(node)
            with graph.inserting_after(node):
                graph.call_function(ops.pin_reader, (node,))

    def check(nodes):
        schedules.append([(*scheduled(node), called_op(node, ops.pin_reader)) for node in nodes])
        return [node for node in nodes if called_op(node, ops.pin_reader)]

    config = placing_options(change, check, "key", {})
    assert all(option.uuid() for option in config.values())
    assert config["_post_fusion_custom_pass"].__reduce__()[0] is str
    x = torch.ones(3, 3)
    with inductor_config.patch({**config, "force_disable_caches": True}):
        assert torch.equal(torch.compile(lambda x: (x @ x) @ x, backend="inductor")(x), x @ x @ x)
    [nodes] = schedules
    assert len(changed) == 2 and sum(op is not None for *_, op in nodes) == 2
    (names, before, reads, _), *_ = nodes
    assert names and not before and reads == {"arg0_1"}
    assert all(op[0] and op[1] == [] and names for names, _, _, op in nodes if op is not None)


def test_a_region_has_one_node_and_its_backward_can_be_asked():
    model, asked = nn.Linear(2, 2), []
    out = torch.compile(model, backend="aot_eager")(torch.ones(2, 2))
    [node] = region_nodes({"out": out.view(4)}, "mark")
    accumulators = [gradient_accumulator(p) for p in model.parameters()]
    node.register_prehook(lambda _: asked.append([accumulates(each) for each in accumulators]))
    node.register_prehook(lambda _: call_at_end_of_backward(lambda: asked.append("end")))
    out.sum().backward(retain_graph=True)
    out.sum().backward(inputs=[model.weight])
    assert asked == [[True, True], "end", [True, False], "end"]
    first = torch.compile(model, backend="aot_eager")(torch.ones(2, 2))
    [other] = region_nodes(first, "mark")
    other.register_prehook(lambda _: asked.append([accumulates(each) for each in accumulators]))
    torch.autograd.grad(first.sum(), [model.weight])
    assert asked[-1] == [False, False]
    node.metadata["mark"] = True
    assert list(region_nodes(out, "mark")) == [] and not autograd_is_compiled()


def test_a_tensor_of_a_shape_without_memory_hands_each_op_to_its_class():
    seen = []

    class Empty(torch.Tensor):
        __torch_function__ = no_torch_function

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append((func, leaves_of({"args": [args], "kwargs": kwargs})))
            return torch.zeros(1)

    empty = shape_only(Empty, torch.zeros(2, 3).t())
    assert type(empty) is Empty and empty.shape == (3, 2) and empty.stride() == (1, 3)
    torch.neg(empty)
    [(func, leaves)] = seen
    assert func is torch.ops.aten.neg.default and leaves[0] is empty


def test_hooks_on_parameters_and_before_steps_are_seen():
    param = nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD([param])
    assert not hooks_of(param) and not has_pre_hooks(opt)
    param.register_hook(lambda gradient: None)
    opt.register_step_pre_hook(lambda *_: None)
    assert hooks_of(param) and has_pre_hooks(opt)
    other = nn.Parameter(torch.ones(1))
    other.register_post_accumulate_grad_hook(lambda _: None)
    assert hooks_of(other)


# ---- a step that Dynamo traces -----------------------------------------------------------------------------------------


def compiled_step(step, **options):
    """``step(opt, x)`` compiled, with an optimizer; what the ``traced_so_far`` inside of it saw comes back."""
    weight = nn.Parameter(torch.ones(3))
    opt, seen = torch.optim.SGD([weight], lr=0.1), []

    @constant
    def look():
        seen.append(traced_so_far(opt))
        return False

    def backend(gm, inputs):
        return gm

    torch.compile(lambda x: step(opt, weight, look, x), backend=backend, **options)(torch.ones(3))
    return seen[-1], backend


def test_what_dynamo_has_traced_before_a_step_is_seen():
    def plain(opt, weight, look, x):
        y = x * weight
        return y.detach(), look()

    def with_backward(opt, weight, look, x):
        (weight * x).sum().backward()
        return look()

    def with_a_rate(opt, weight, look, x):
        opt.param_groups[0]["lr"] = 0.2
        return (x * 2, look())

    def without_gradients(opt, weight, look, x):
        with torch.no_grad():
            return (x * 2, look())

    assert traced_so_far(torch.optim.SGD([nn.Parameter(torch.ones(1))])) is None
    found, backend = compiled_step(plain)
    assert found.backend is backend and found.begins and operator.mul in found.targets
    assert not (found.backward or found.context or found.state or found.waits)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert compiled_step(with_backward)[0].backward
    assert "setting" in compiled_step(with_a_rate)[0].waits and compiled_step(without_gradients)[0].context


def test_the_backend_that_a_user_named_is_found_behind_wrappers():
    def mine(gm, inputs):
        return gm

    @functools.wraps(mine)
    def wrapped(gm, inputs, mode):
        return mine(gm, inputs)

    assert innermost(mine) is mine and innermost(functools.partial(wrapped, mode=None)) is mine


def test_dynamos_one_none_forgets_where_a_gradient_was():
    from torch._dynamo.variables import constant as constants

    constants.CONSTANT_VARIABLE_NONE.source = "p.grad"
    forget_source_of_none()
    assert constants.CONSTANT_VARIABLE_NONE.source is None


def test_who_calls_a_compiled_function_is_known():
    def ask():
        return compiled_by_itself(__name__)

    assert not ask()


def test_a_function_that_is_only_inlined_is_in_its_callers_graph_and_has_none_of_its_own():
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm

    double = only_inlined(lambda x: x * 2)
    assert torch.equal(torch.compile(double, backend=backend)(torch.ones(1)), torch.full((1,), 2.0)) and not graphs
    torch.compile(lambda x: double(x) + 1, backend=backend)(torch.ones(1))
    assert [n.target for n in graphs[0].graph.nodes if n.op == "call_function"] == [operator.mul, operator.add]


def test_a_copy_of_dynamos_graph_compiles_as_one_of_its_own():
    made = []

    def backend(gm, inputs):
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        copied = copied_graph_module(gm, graph)
        made.append((gm, copied))
        return compile_with(copied, inputs, None, {"inner": "aot_eager"})

    assert torch.equal(torch.compile(lambda x: x * 2, backend=backend)(torch.ones(1)), torch.full((1,), 2.0))
    [(gm, copied)] = made
    sources = [[n._dynamo_source for n in each.graph.find_nodes(op="placeholder")] for each in (gm, copied)]
    assert sources[0] == sources[1] and None not in sources[0] and copied.meta["dynamo_compile_id"]


def test_what_a_backend_refuses_comes_up_as_it_is():
    def backend(gm, inputs):
        raise refused("not this one")

    with pytest.raises(SetupError, match="not this one"):
        torch.compile(lambda x: x * 2, backend=backend)(torch.ones(1))


# ---- what the sections above do not reach ------------------------------------------------------------------------------

SUBJECTS = (
    "dynamo", "inductor", "module_state", "modules", "optimizers", "placing", "tensors", "threads", "tracing", "tracing_step",
    "unreduced",
)  # fmt: skip
"""Files of fxckpt/compat that touch private parts; ``cuda`` is tested with devices, the others touch none."""


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_private_part_that_is_touched_has_a_test_here(subject):
    tree = ast.parse((ROOT / "fxckpt" / "compat" / f"{subject}.py").read_text())
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    assert {name for name in functions if not re.search(rf"\b{name}\(", Path(__file__).read_text())} == set()
    assert all(ast.get_docstring(n) for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in functions)


def test_the_module_whose_method_is_compiled_is_known():
    spy = Spy(lambda gm, inputs: compiled_module()())
    model = nn.Sequential(GPT())
    model[0].compile(backend=spy)
    model(batch())
    assert spy.answers == [model[0]]
    assert compiled_module() is None


def test_inductors_kernel_is_taken_out_with_its_call_and_compiles_alone():
    x, y = torch.rand(1027), torch.rand(1027)
    before = x.clone()

    def fn(a, b):
        a.mul_(b)
        return ()

    types, source, call = inductor_kernel(fn, [x, y])
    assert torch.equal(x, before), "the example is not changed"
    assert len(types) == len(call) and " kernel(" in source
    assert {t.data_ptr() for t in call if isinstance(t, torch.Tensor)} <= {x.data_ptr(), y.data_ptr()}
    assert [v for v in call if not isinstance(v, torch.Tensor)] == [1027]
    assert load_cpp(source).kernel
    with pytest.raises(ValueError, match="made 0 kernels"):
        inductor_kernel(lambda a: (), [x])


def test_inductor_says_where_its_cache_lies_and_how_it_compiles(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert cache_folder() == str(tmp_path)
    chosen, variables, processor = compiler_settings()
    assert "cpp.simdlen" in dict(chosen) and "CXX" in dict(variables) and processor
    with inductor_config.patch({"cpp.simdlen": 1}):
        assert compiler_settings()[0] != chosen


def test_a_users_joint_pass_still_runs_and_decides_whether_caches_are_used():
    told = []
    graph = torch.fx.Graph()
    joint_pass(lambda g: told.append("ours"), [lambda g: told.append("theirs")])(graph)
    assert told == ["ours", "theirs"]
    assert joint_pass(print, None).uuid() and joint_pass(print, lambda g: None).uuid() is None


def test_the_inductor_backend_compiles_with_its_options_checked():
    gm = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(RuntimeError, match="no_such_option"):
        compile_with_inductor(gm, [torch.ones(1)], None, {"no_such_option": 1})


def test_modules_stand_under_all_their_names_and_wrappers_under_none():
    shared = nn.BatchNorm1d(2)
    model = nn.ModuleDict({"a": shared, "b": torch.compile(nn.Sequential(shared))})
    assert [name for name, _ in every_module(model)] == ["", "a", "b", "b.0"]
    assert [name for name, _ in named_parameters(model)] == ["a.weight", "a.bias", "b.0.weight", "b.0.bias"]
    assert [name for name, _, kept in named_buffers(model) if kept and name.startswith("b")] == [
        "b.0.running_mean", "b.0.running_var", "b.0.num_batches_tracked",
    ]  # fmt: skip


def test_a_module_inside_of_itself_is_an_error_here_as_in_torch():
    model = nn.Sequential(nn.Linear(1, 1))
    model._modules["again"] = model
    for walk in (every_module, nn.Module.train):
        with pytest.raises(RecursionError):
            walk(model)


def test_what_a_module_keeps_its_tensors_in_shows_what_replaces_them():
    model = nn.Sequential(nn.Linear(1, 1), torch.jit.script(nn.BatchNorm1d(1)))
    kept = places(every_module(model))
    assert list(kept) == ["", "0", "1"]
    model[0].weight, model[1].running_mean = nn.Parameter(torch.ones(1, 1)), torch.ones(1)
    assert kept["0"][0]["weight"] is model[0].weight and torch.equal(kept["1"][1]["running_mean"], torch.ones(1))


def test_modules_with_extra_state_are_found():
    class Counting(nn.Module):
        def get_extra_state(self):
            return 3

    assert has_extra_state(Counting()) and not has_extra_state(nn.Linear(1, 1))
    assert [name for name, _ in extra_state_modules(nn.Sequential(nn.Linear(1, 1), Counting()))] == ["1"]


def test_versions_count_changes_of_the_memory():
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor[:1].add_(1)
    assert version_of(tensor) == before + 1
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0


def test_the_accumulator_of_a_gradient_is_one_node_that_takes_hooks():
    weight, seen = nn.Parameter(torch.ones(2)), []
    node = gradient_accumulator(weight)
    node.register_prehook(lambda grads: seen.append(grads[0].tolist()))
    (weight * 3).sum().backward()
    assert seen == [[3.0, 3.0]]
    assert gradient_accumulator(weight) is node


def test_a_gradient_is_heard_of_until_the_hook_is_taken_off():
    weight, seen = nn.Parameter(torch.ones(2)), []
    node = gradient_node(weight)
    handle = on_gradient(node, lambda *_: seen.append(1))
    for _ in range(2):
        (weight * 3).sum().backward()
        handle.remove()
    assert seen == [1]


def test_one_core_holds_for_this_thread_alone_and_ends():
    if not can_use_one_core():
        pytest.skip("ATen does not run on OpenMP")
    before = torch.get_num_threads()
    with one_core():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_step_is_found_under_its_wrappers_and_wrapped_again_with_its_mark():
    opt = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    assert plain_class(opt) is torch.optim.AdamW
    assert type(opt).step.hooked, "Optimizer.__init__ marks it"
    assert not getattr(stock_step(opt), "hooked", False) and not hasattr(unhooked_step(opt), "__wrapped__")
    called = []
    wrapped = hooked(lambda self, *args: called.append("step"))
    assert wrapped.hooked
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.register_step_post_hook(lambda *_: called.append("after"))
    wrapped(opt)
    assert called == ["before", "step", "after"]
    assert {"lr", "betas", "fused"} <= settings_of(opt) and "params" not in settings_of(opt)


def test_our_hooks_are_called_beside_others_and_know_which_step_calls_them():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)

    opt, seen = Twice([nn.Parameter(torch.ones(1))], lr=0.1), []
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # so that its step has PyTorch's wrapper, too
    watch_steps(opt, lambda opt, *_: seen.append(comes_by_itself(opt)), lambda opt, *_: seen.append(comes_by_itself(opt)))
    opt.step()
    assert seen == [True, False, False, True], "the outer step, and the one inside it"
    wrapped = hooked(torch.optim.SGD.step)
    seen.clear()
    wrapped(opt)
    assert seen == [False, False], "inside a step of ours"


def test_an_optimizer_that_was_never_initialised_is_completed_and_steps():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

        state = property(lambda self: self.inner.state)
        param_groups = property(lambda self: self.inner.param_groups)

        @torch.optim.Optimizer.profile_hook_step
        def step(self, closure=None):
            return list(callers(self.inner))

    wrapper = Wrapper(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(AttributeError, match="_optimizer_step_pre_hooks"):
        wrapper.step()
    complete(wrapper)
    assert wrapper.step()[0] is wrapper, "whose method calls"
    assert steps_like_one(wrapper) and not steps_like_one(Wrapper) and not steps_like_one(nn.Linear(1, 1))
    assert takes(Wrapper) == ("closure",) and not forwards(wrapper)
    assert forwards(type("AcceleratedOptimizer", (Wrapper,), {})(wrapper))


def test_whoever_has_a_say_in_a_state_dict_is_known():
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert not has_own_contract(opt)
    handle = opt.register_state_dict_post_hook(lambda *_: None)
    assert has_own_contract(opt)
    handle.remove()
    assert not has_own_contract(opt)
    assert has_own_contract(type("Own", (torch.optim.SGD,), {"state_dict": lambda self: {}})(opt.param_groups))


def test_a_step_that_dcp_makes_to_have_state_is_known():
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append(sets_up_state(self))
            super().step(closure)

    opt = Spy([nn.Parameter(torch.ones(1))], lr=0.1)
    _init_optim_state(opt)
    opt.param_groups[0]["params"][0].grad = torch.zeros(1)
    opt.step()
    assert seen == [True, False]


def test_a_schedulers_wrapper_of_the_step_is_known_and_replaced_with_its_marks():
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert not rebind_scheduler_wrapper(opt)
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt)
    marked = marked_for_schedulers(lambda: setattr(opt, "_opt_called", True))
    assert rebind_scheduler_wrapper(opt) and "step" not in vars(opt)
    opt.step = marked
    torch.optim.lr_scheduler.ConstantLR(opt)
    assert opt.step is marked, "a scheduler put its wrapper around a step that has its mark"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would warn of a step that was not seen
        opt.step()
        scheduler.step()
    opt.step = torch.optim.SGD.step.__get__(opt)
    assert not rebind_scheduler_wrapper(opt) and "step" not in vars(opt), "the class's own"
    opt.step = lambda: None
    with pytest.raises(SetupError, match="was replaced by"):
        rebind_scheduler_wrapper(opt)


def test_a_scaler_tells_which_attempts_it_skips():
    weight, skipped = nn.Parameter(torch.ones(1)), []
    opt, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    count_skipped_attempts(scaler, opt, lambda _opt: skipped.append(weight.grad.item()))
    for factor in (1.0, float("inf"), 1.0):
        opt.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(opt)
        scaler.update()
    assert skipped == [float("inf")]


def test_the_default_implementation_is_what_an_optimizer_takes():
    from torch.optim.optimizer import _default_to_fused_or_foreach

    weight = nn.Parameter(torch.ones(1))
    _, foreach = _default_to_fused_or_foreach([weight], differentiable=False, use_fused=False)
    assert default_implementation(weight) == ("foreach" if foreach else "single")


def test_a_symbols_sign_decides_branches():
    def fn(x, momentum):
        x.mul_(2.0 if symbolic_float(momentum, True) != 0 else 3.0)

    found = trace_fake(fn, [torch.ones(2), torch.tensor(0.9)])
    assert found.branches == [] and 2.0 in [a for n in found.graph.nodes for a in n.args]


# ---- data loaders ------------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.IterableDataset):
    """Five numbers; each worker adds a hundred times its own."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        return iter(range(100 * (info.id if info else 0), 100 * (info.id if info else 0) + 5))


class Told:
    """In a worker: told at its end, and who makes a batch."""

    def __call__(self, worker):
        tell_end(lambda: f"worker {worker} ended")

    def collate(self, samples):
        return torch.utils.data.get_worker_info().id, samples


def test_the_order_behind_an_iterator_is_seen_and_skipped():
    seen = []

    def watch(indices):
        for each in indices:
            seen.append(each)
            yield each

    iterator = iter(torch.utils.data.DataLoader(range(10), 3))
    watch_order(iterator, watch)
    skip_order(iterator, 2)
    assert [batch.tolist() for batch in iterator] == [[6, 7, 8], [9]]
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_samples_of_an_iterable_data_set_are_seen_and_its_end_within_a_batch():
    iterator = iter(torch.utils.data.DataLoader(Numbers(), 3))
    watch_samples(iterator, lambda samples: (each + 1 for each in samples))
    assert next(iterator).tolist() == [1, 2, 3] and not reading_ended(iterator)
    assert next(iterator).tolist() == [4, 5] and reading_ended(iterator)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_workers_begin_in_the_middle_of_a_pass_and_tell_their_end():
    told, received = Told(), []
    loader = torch.utils.data.DataLoader(range(12), 2, num_workers=2, collate_fn=told.collate)
    made = WorkersIterator(copied(loader, type(loader)), lambda indices: indices, received.append, Start(3, 1, 77))
    assert list(made) == [(1, [6, 7]), (0, [8, 9]), (1, [10, 11])] and len(received) == 3
    assert made.base_seed == 77
    loader = torch.utils.data.DataLoader(Numbers(), 3, num_workers=2, worker_init_fn=told)
    made = WorkersIterator(copied(loader, type(loader)), lambda indices: indices, received.append)
    assert [batch.tolist() for batch in made] == [[0, 1, 2], [100, 101, 102], [3, 4], [103, 104]]
    assert sorted(each.state for each in received if type(each) is DataEnded) == ["worker 0 ended", "worker 1 ended"]


def test_loaders_with_iterators_of_their_own_are_known():
    class Named(torch.utils.data.DataLoader):
        pass

    class Other(torch.utils.data.DataLoader):
        def __iter__(self):
            return iter(())

    assert iterates_as_torch(Named(range(3))) and not iterates_as_torch(Other(range(3)))
    assert iterates_as_torch(Other(range(3)), (Other,))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_torch_keeps_among_the_attributes_of_a_module_is_told_from_what_its_author_does():
    layer = nn.Linear(2, 2)
    assert {"training", "_parameters", "_buffers", "_modules", "_forward_pre_hooks"} <= OWN_NAMES
    assert [name for name, _ in plain_attributes(layer)] == ["in_features", "out_features"]
    layer.mine = 3
    torch.nn.utils.spectral_norm(torch.nn.utils.weight_norm(layer, "bias"), "weight")
    prune.l1_unstructured(other := nn.Linear(2, 2), "weight", 1)
    assert [name for name, _ in plain_attributes(layer)] == ["in_features", "out_features", "mine"]
    assert [name for name, _ in plain_attributes(other)] == ["in_features", "out_features"]


def test_loaders_that_exist_and_iterators_that_they_keep_are_found():
    loader = torch.utils.data.DataLoader(range(3), num_workers=1)
    assert loaders_alive()[id(loader)]() is loader and not holds_workers(loader)
    loader.kept = iter(loader)
    assert holds_workers(loader)


def test_a_scheduler_does_not_warn_of_an_optimizer_that_stepped_in_an_earlier_process(recwarn):
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    mark_stepped(opt)
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_the_backward_under_way_has_a_number_of_its_own():
    seen, weight = [], nn.Parameter(torch.ones(1))
    weight.register_hook(lambda grad: seen.append(backward_under_way()))
    for _ in range(2):
        (weight * 2).sum().backward()
    assert backward_under_way() is None and None not in seen and seen[0] != seen[1]


def test_the_metadata_of_dcp_is_made_of_the_classes_that_may_be_unpickled(tmp_path):
    import torch.distributed.checkpoint as dcp

    from fxckpt.compat.dcp import read_metadata

    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": [torch.zeros(2, dtype=kind) for kind in kinds], "b": {"lr": 0.1}}, checkpoint_id=tmp_path, no_dist=True)
    found = read_metadata(str(tmp_path))
    assert {each.properties.dtype for key, each in found.state_dict_metadata.items() if key.startswith("a")} == set(kinds)


def test_a_ddp_tells_how_it_sums_and_its_reducer_can_be_asked_for_a_backward():
    """tests/ranks/test_three_ranks.py sees what they do."""
    from torch._C._distributed_c10d import Reducer

    assert hasattr(Reducer, "prepare_for_backward")
    source = inspect.getsource(nn.parallel.DistributedDataParallel.__init__)
    for name in (
        "static_graph",
        "mixed_precision",
        "find_unused_parameters",
        "_comm_hooks",
        "_use_python_reducer",
        "process_group",
    ):
        assert f"self.{name}" in source


@pytest.fixture
def one_rank():
    """This process is a job of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_that_fsdp2_holds_back_are_seen_and_given_back(one_rank):
    mesh = init_device_mesh("cpu", (1,))
    model, again = (fully_shard(nn.Linear(3, 2), mesh=mesh) for _ in range(2))
    assert holding(None) == holding(model) == () and list(held_back(model)) == []
    model.set_requires_gradient_sync(False)
    model(torch.ones(1, 3)).sum().backward()
    seen = holding(model)
    found = {name: (grad.clone(), lay) for name, (_, grad, lay) in zip(("weight", "bias"), held_back(model))}
    assert len(seen) == 2 and found["weight"][0].tolist() == [[1.0] * 3] * 2 and "over the 1 ranks" in found["weight"][1]
    model(torch.ones(1, 3)).sum().backward()
    assert holding(model) != seen

    params = dict(again.named_parameters())
    other = {id(params["weight"]): (found["weight"][0], "laid out otherwise")}
    assert hold_back(again, other) == set() and holding(again) == ()
    wanted = {id(params[name]): value for name, value in found.items()}
    assert hold_back(again, wanted) == wanted.keys()
    again(torch.ones(1, 3)).sum().backward()
    assert params["weight"].grad.to_local().tolist() == [[2.0] * 3] * 2, "added to, and reduced"
    assert holding(again) == ()


def test_sums_over_shards_that_are_none_over_replicas_are_known(one_rank):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    model = fully_shard(nn.Linear(3, 2), mesh=mesh)
    model.set_requires_all_reduce(False)
    model(torch.ones(1, 3)).sum().backward()
    assert len(holding(model)) == 1
    with pytest.raises(SetupError, match="at optimizer steps only"):
        list(held_back(model))
    hold_back(model, {})
    assert holding(model) == ()
