"""Models as people have them: the order is the one in which gradients really become final, and compiling is Inductor's.

``make models`` runs every model through Inductor itself, and kills and resumes each; ``make test`` reads the graphs of all
of them, builds one joint graph, kills two, and compiles no C++.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import torch
from final_gradients import contradictions, finals
from graph_models import book, front_end
from model_cases import MODELS, WRITTEN_HERE
from process_runs import results
from resume_case import Case, kill_after_next_commit, same_bits
from torch import nn
from torch._dynamo.utils import counters
from waiting import committed, until

from fxckpt.graph.model.layers import gradient_order, group_layers, layer_edges
from fxckpt.torch_backend import backend

__all__ = ["book"]  # the fixture

FULL = os.environ.get("FXCKPT_MODELS") == "full"
"""Every model through Inductor, killed and resumed: minutes of compiling."""


@pytest.fixture(autouse=True)
def repeatable(one_thread, inductor_cache):
    """An embedding's gradient is summed by atomics otherwise; one cache of compiled code for all."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def built(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model, with its weights always the same, and a batch."""
    if name not in WRITTEN_HERE:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    return MODELS[name](), MODELS[name].batch()


def counted(compile_with: Callable[[nn.Module], Callable], name: str) -> tuple[dict, list[torch.Tensor]]:
    """Dynamo's counters and the bits, losses and gradients, of two training steps of batches of two sizes."""
    torch._dynamo.reset()
    counters.clear()
    model, batch = built(name)
    step = compile_with(model)
    out = []
    for size in (3, 3, 2):
        torch.manual_seed(size)
        loss = step(**{k: v[:size] for k, v in batch.items()})
        loss.backward()
        out.append(loss.detach().clone())
    out += [p.grad for p in model.parameters() if p.grad is not None] + [b.clone() for b in model.buffers()]
    return {key: dict(counters[key]) for key in ("stats", "frames", "graph_break", "recompiles", "recompile_limit")}, out


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_in_the_order_in_which_gradients_become_final_in_eager(book, name):
    model, batch = built(name)
    when = finals(model, lambda: model(**batch))
    torch.compile(model, backend=backend, options={"inner": "eager"})(**batch).backward()
    named = list(model.named_parameters())
    order = gradient_order(named, book)
    assert sorted(order) == sorted(n for n, _ in named)
    assert {n for n, p in named if book.lookup(p) is None} == {n for n, _ in named if n not in when}
    layers = group_layers(order)
    assert contradictions(layers, when) == []
    assert contradictions(layers[::-1], when), "the relation tells nothing apart"
    flow = layer_edges(layers, book)
    assert {n for edge in flow for n in edge} == {layer.name for layer in layers if set(layer.params) & set(when)}


def by_eager(model, **options):
    """The least that can compile, with us or (``ours=False``) without."""
    ours = options.pop("ours")
    return (
        torch.compile(model, backend=backend, options={"inner": "eager"}, **options)
        if ours
        else torch.compile(model, backend="eager", **options)
    )


def by_front_end(model, **options):
    """Inductor up to its code generation."""
    ours = options.pop("ours")
    return (
        torch.compile(model, backend=backend, options={"inner": front_end}, **options)
        if ours
        else torch.compile(model, backend=front_end, **options)
    )


def by_inductor(model, **options):
    return torch.compile(model, backend=backend, **options) if options.pop("ours") else torch.compile(model, **options)


def same_with_and_without_us(name, how, **options):
    plain, bits = counted(lambda m: how(m, ours=False, **options), name)
    ours, same = counted(lambda m: how(m, ours=True, **options), name)
    assert ours == plain
    assert len(bits) == len(same) > 3
    assert all(map(torch.equal, bits, same))
    return plain


@pytest.mark.parametrize("name", MODELS if FULL else ["odd", "gpt with graph breaks"])
def test_no_graph_break_and_no_recompile_is_added(book, name):
    plain = same_with_and_without_us(name, by_eager)
    assert plain["stats"]["unique_graphs"] > 1, "the second batch size was meant to be compiled anew"
    assert plain["graph_break"] or "breaks" not in name


@pytest.mark.parametrize("name", ["odd"])
def test_bits_and_counters_of_a_joint_graph_are_those_without_us(book, name):
    same_with_and_without_us(name, by_front_end)
    assert {p.origin for t in book.traces() for _, p in t.params} == {"joint"}


@pytest.mark.parametrize("given", [{"fullgraph": True}, {"dynamic": True}], ids=str)
def test_fullgraph_and_dynamic_shapes_work_as_without_us(book, given):
    same_with_and_without_us("gpt", by_eager, **given)


def test_fullgraph_refuses_what_it_refuses_without_us(book):
    model, batch = built("gpt with graph breaks")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        by_eager(model, ours=True, fullgraph=True)(**batch)


@pytest.mark.skipif(not FULL, reason="make models: minutes of compiling")
@pytest.mark.parametrize("name", MODELS)
def test_compiled_by_inductor_bits_breaks_and_recompiles_are_those_without_us(book, name):
    same_with_and_without_us(name, by_inductor)


@pytest.mark.skipif(not FULL, reason="make models: minutes of compiling")
@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"fullgraph": True}], ids=str)
def test_in_every_mode_the_bits_are_those_without_us(book, given):
    same_with_and_without_us("odd", by_inductor, **given)


# ---- killed and resumed ----------------------------------------------------------------------------------------------


def training(name: str) -> Case:
    """A script that trains one of the models; its batches come from torch's generator, which is restored."""
    compiled = "torch.compile(m, backend=fxckpt.backend)" if FULL else "eager(m)"
    return Case(
        model=f"model_cases.MODELS[{name!r}]()",
        compiled=compiled,
        optimizer="torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True)",
        scheduler="torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)",
        loader="None",
        length=10,
        compile_step='optimizer, "d", model=m, every=1, extra={"sched": s}',
        finish="optimizer, s",
        body=f"""
        loss = model(**model_cases.MODELS[{name!r}].batch())
        kill_window()
        loss.backward()
        opt.step()
        kill_window()
        opt.zero_grad()
        s.step()
    """,
    )


@pytest.mark.parametrize("name", MODELS if FULL else ["odd"])
def test_killed_and_run_again_ends_with_the_same_bits(name, fork_server, tmp_path):
    if name not in WRITTEN_HERE:
        pytest.importorskip("transformers")
    script = tmp_path / "train.py"
    script.write_text(training(name).script().replace("import *", "import *; import model_cases", 1))
    whole = fork_server.start(script, tmp_path / "whole").succeed()
    killed = fork_server.start(script, tmp_path / "killed", KILL_WINDOW="0.02")
    kill_after_next_commit(killed, tmp_path / "killed" / "d")
    same_bits(whole, results(killed.output), fork_server.start(script, tmp_path / "killed"))


RANKS = """
from script_prelude import *
import os, model_cases
import torch.distributed as dist
random.seed(0); np.random.seed(0)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + os.environ["MEET"], rank=rank, world_size=2)
torch.manual_seed(0)
m = nn.Sequential(nn.Linear(300, 300), *(model_cases.Residual(300) for _ in range(6)), nn.Linear(300, 1))
model = eager(nn.parallel.DistributedDataParallel(m, bucket_cap_mb=1))
opt = fxckpt.compile_step(torch.optim.SGD(m.parameters(), lr=1e-2, fused=True), f"rank{rank}", model=model, every=1, keep=4)
torch.manual_seed(rank)
mine = [c.step for c in fxckpt.checkpoints(f"rank{rank}")]
theirs = [None, None]
dist.all_gather_object(theirs, mine)
common = max(set(theirs[0]) & set(theirs[1]), default=None)
start = fxckpt.load(step=common).step
for step in range(start, 10):
    loss = model(torch.randn(4, 300)).square().mean()
    kill_window()
    loss.backward()
    opt.step()
    opt.zero_grad()
    report(step, loss)
opt.ckpt.flush()
from fxckpt.graph.model.book import traces
print("DIGEST splits", len(traces.traces()))
print("DIGEST layers", digest([layer.name for layer in opt.ckpt.graph.layers]))
finish(m, opt)
os._exit(0)  # gloo's threads may outlive a peer that left first
"""


def test_two_ranks_of_ddp_are_killed_and_resume_to_the_same_bits_each_with_its_own_store(fork_server, tmp_path):
    """They take the newest step that both have: one may have committed a step more when they were killed."""
    script = tmp_path / "train.py"
    script.write_text(RANKS)

    def start(cwd, meet, **variables):
        return [fork_server.start(script, tmp_path / cwd, RANK=str(r), MEET=str(tmp_path / meet), **variables) for r in range(2)]

    whole = [process.succeed() for process in start("whole", "a")]
    killed = start("killed", "b", KILL_WINDOW="0.03")
    stores = [tmp_path / "killed" / f"rank{r}" for r in range(2)]
    until(
        lambda: all(committed(s) for s in stores) or not all(process.alive() for process in killed), why=lambda: killed[0].output
    )
    first = [results(process.kill()) for process in killed]
    assert [process.returncode for process in killed] == [-signal.SIGKILL] * 2
    again = start("killed", "c")
    for rank in range(2):
        same_bits(whole[rank], first[rank], again[rank])
    assert int(whole[0]["DIGEST splits"]) > 1
    assert whole[0]["DIGEST layers"] == whole[1]["DIGEST layers"]
    assert whole[0]["LOSS 9"] != whole[1]["LOSS 9"], "both ranks trained on the same data"
