"""The backend compiles as Inductor does, caches included, and only reads."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch
import torch._inductor.config as inductor_config
from graph_models import GPT, MLP, D, Shared, batch, book, compiled, front_end
from process_runs import fresh_process
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import fxckpt
from fxckpt.compat import inductor
from fxckpt.torch_backend import backend

__all__ = ["book"]  # the fixture

CHILD = """
import json, os
import torch
from torch import nn
from torch._dynamo.utils import counters

counters.clear()

class Net(nn.Module):
    # Without biases and reductions Inductor has no C++ to compile: a cold process takes seconds.
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.h = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
        self.b.weight = self.a.weight
    def forward(self, x):
        x = self.a(x)
        for linear in self.h:
            x = linear(x)
        return self.b(x)

torch.manual_seed(0)
net, x = Net(), torch.randn(4, 8)
kind = os.environ["KIND"]
if kind == "plain":
    step = torch.compile(net)
else:
    import fxckpt
    from fxckpt.graph.model.book import traces
    from fxckpt.graph.model.layers import gradient_order
    step = torch.compile(net, backend=kind if kind == "fxckpt" else fxckpt.backend)
reports = []
for again in range(2 if kind == "plain" else 1):
    y = step(x)
    y.backward(torch.ones_like(y))
    report = {"cache": {k: v for k, v in counters["aot_autograd"].items() if "cache" in k},
              "fx": {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph")},
              "graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values()),
              "bits": [y.tolist()] + [p.grad.tolist() for p in net.parameters()]}
    if kind != "plain":
        report["order"] = tuple(gradient_order(list(net.named_parameters()), traces))
        report["origin"] = sorted({t.origin for trace in traces.traces() for _, t in trace.params})
    reports.append(report)
    torch._dynamo.reset()
    counters.clear()
    net.zero_grad()
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def processes(_fork_server, tmp_path_factory):
    """The same training step with plain Inductor and, in two processes, with ours; each cold and then warm."""
    folder = tmp_path_factory.mktemp("backend")
    script = folder / "script.py"
    script.write_text(CHILD)

    def reports(process):
        output = process.wait()
        assert process.returncode == 0, output
        return json.loads(output.splitlines()[-1])

    def ours():
        where = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "ours")}
        [report] = reports(_fork_server.start(script, folder / "run", KIND="ours", **where))
        return report

    (folder / "plain").mkdir()  # in a process that has not imported fxckpt
    plain_cold, plain_warm = reports(fresh_process(script, folder / "plain", folder / "theirs", KIND="plain"))
    return {"plain cold": plain_cold, "plain warm": plain_warm, "cold": ours(), "warm": ours()}


def test_numerics_are_inductors(processes):
    assert len({json.dumps(p["bits"]) for p in processes.values()}) == 1


def test_there_is_no_extra_graph_break_and_no_extra_graph(processes):
    assert {(p["graphs"], p["breaks"]) for p in processes.values()} == {(1, 0)}


def test_the_caches_work_as_without_us(processes):
    assert processes["cold"]["cache"] == processes["plain cold"]["cache"]
    assert processes["cold"]["fx"] == processes["plain cold"]["fx"]
    assert processes["warm"]["cache"] == processes["plain warm"]["cache"]
    assert processes["warm"]["fx"] == processes["plain warm"]["fx"]
    assert processes["warm"]["cache"] == {"autograd_cache_hit": 1}


def test_the_order_is_the_same_in_a_cold_and_a_warm_process(processes):
    assert processes["cold"]["origin"] == ["joint"]
    assert processes["warm"]["origin"] == ["dynamo"]
    assert processes["cold"]["order"] == processes["warm"]["order"] == ["h.1.weight", "h.0.weight", "a.weight"]


# ---- what Inductor is asked --------------------------------------------------------------------------------------


class _Asked(Exception):
    def __init__(self, patches):
        super().__init__("asked")
        self.patches = patches


@pytest.fixture
def asked(monkeypatch):
    """Compile a graph and return the config patches with which Inductor is called, without the reader's."""

    def stop(gm, inputs, config_patches=None, **kwargs):
        raise _Asked(dict(config_patches))

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", stop)
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))

    def ask(compile_with):
        with pytest.raises(_Asked) as caught:
            compile_with(gm, [])
        return caught.value.patches

    return ask


@pytest.mark.parametrize("given", [
    {}, {"mode": "default"}, {"mode": "max-autotune-no-cudagraphs"},
    {"options": {"max-autotune": True, "epilogue_fusion": False}},
])  # fmt: skip
def test_mode_and_options_become_the_patches_that_inductor_gets(asked, given):
    plain = asked(torch._TorchCompileInductorWrapper(given.get("mode"), given.get("options"), None))
    ours = asked(lambda gm, inputs: backend(gm, inputs, **given))
    assert isinstance(ours.pop("joint_custom_pre_pass"), CustomGraphPass)
    assert ours == plain


def test_an_unknown_option_is_refused_as_by_inductor():
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        backend(gm, [], options={"no_such_option": 1})


class _UsersPass(CustomGraphPass):
    def __init__(self, name):
        self.name, self.graphs = name, []

    def __call__(self, graph):
        self.graphs.append(graph)

    def uuid(self):
        return self.name


def test_a_users_own_joint_pass_still_runs_and_counts_for_the_cache(asked):
    mine, other = _UsersPass("mine"), _UsersPass("other")

    def given(patches):
        return patches["joint_custom_pre_pass"]

    alone = given(asked(backend))
    with inductor_config.patch(joint_custom_pre_pass=mine):
        chained = given(asked(backend))
    by_option = given(asked(lambda gm, inputs: backend(gm, inputs, options={"joint_custom_pre_pass": other})))
    assert len({alone.uuid(), chained.uuid(), by_option.uuid()}) == 3
    assert given(asked(backend)).uuid() == alone.uuid()
    with inductor_config.patch(joint_custom_pre_pass=lambda graph: None):
        assert given(asked(backend)).uuid() is None  # no uuid, no cache: as without us
    chained(torch.fx.Graph())
    assert len(mine.graphs) == 1
    assert other.graphs == []


def test_a_users_joint_pass_sees_the_graph_after_us_and_config_is_left_alone(book):
    mine = _UsersPass("mine")
    with inductor_config.patch(joint_custom_pre_pass=mine):
        compiled(MLP())(batch()).backward()
        assert inductor_config.joint_custom_pre_pass is mine
    assert inductor_config.joint_custom_pre_pass is None
    assert len(mine.graphs) == 1
    assert {t.origin for trace in book.traces() for _, t in trace.params} == {"joint"}


# ---- ways to ask for it ------------------------------------------------------------------------------------------


def test_inner_is_a_name_or_a_callable_and_gets_the_other_options(book):
    seen = []

    def inner(gm, example_inputs, **kwargs):
        seen.append(kwargs)
        return gm.forward

    by_name, by_callable = Shared(), GPT()
    compiled(by_name, inner="aot_eager")(torch.randn(2, D)).backward()
    options = {"inner": inner, "theirs": 1}
    torch.compile(by_callable, backend=fxckpt.backend, options=options)(batch()).backward()
    assert seen == [{"options": {"theirs": 1}}]
    assert options == {"inner": inner, "theirs": 1}
    assert len(book.traces()) == 2


def test_disable_leaves_plain_inductor(book, asked, monkeypatch):
    monkeypatch.setenv("FXCKPT_DISABLE", "1")
    assert "joint_custom_pre_pass" not in asked(backend)
    model = Shared()
    compiled(model, inner="eager")(torch.randn(2, D)).backward()
    assert book.traces() == ()
    assert book.version == 0


def test_results_are_those_of_the_inner_compiler():
    x = batch()
    grads = []
    for with_us in (False, True):
        torch.manual_seed(1)
        torch._dynamo.reset()
        model = GPT(breaks=True)
        step = compiled(model) if with_us else torch.compile(model, backend=front_end)
        step(x).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_it_is_an_entry_point():
    point = EntryPoint("fxckpt", "fxckpt.torch_backend:backend", "torch_dynamo_backends")
    assert point.load() is fxckpt.backend is backend
    installed = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "fxckpt"]
    if not installed:
        pytest.skip("fxckpt is not installed, so its entry point cannot be found by name")
    assert installed[0].value == point.value
    assert "fxckpt" in torch._dynamo.list_backends()
    torch._dynamo.reset()
    torch.compile(nn.Identity(), backend="fxckpt", options={"inner": "eager"})(torch.ones(1))


def test_dynamo_reset_reaches_us(monkeypatch):
    called = []
    monkeypatch.setattr(inductor, "reset_cudagraphs", lambda: called.append(1))
    compiled(Shared(), inner="eager")(torch.randn(2, D))
    torch._dynamo.reset()
    assert called


@pytest.mark.parametrize("wrong", [{"mode": "nonsense"}, {"options": {"no_such": 1}}], ids=["mode", "option"])
@pytest.mark.parametrize("name", [backend, "fxckpt"], ids=["function", "name"])
def test_what_inductor_does_not_know_is_an_error_of_inductor_s_kind_and_words(wrong, name):
    with pytest.raises(RuntimeError) as ours:  # at the first call: until then torch.compile shows a backend nothing of it
        torch.compile(lambda x: x + 1, backend=name, **wrong)(torch.ones(2))
    with pytest.raises(RuntimeError) as theirs:
        torch.compile(lambda x: x + 1, **wrong)
    assert str(theirs.value) in str(ours.value)
    assert isinstance(ours.value, fxckpt.SetupError) and not isinstance(ours.value, torch._dynamo.exc.BackendCompilerFailed)
