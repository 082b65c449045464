"""Regional compilation: blocks that are alike share one compiled graph, and what is not compiled shows none at all."""

from __future__ import annotations

import weakref

import pytest
import torch
from final_gradients import contradictions, finals
from graph_models import book
from model_cases import Gpt, language
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.weak import TensorWeakRef

import fxckpt
from fxckpt.graph.model.book import TraceBook
from fxckpt.graph.model.joint import JointTrace, ParamTrace
from fxckpt.graph.model.layers import gradient_order
from fxckpt.graph.model.names import named_parameters
from fxckpt.torch_backend import backend

__all__ = ["book"]  # the fixture

EAGER = {"backend": backend, "options": {"inner": "eager"}}


def blocks_in_place(model):
    for block in model.h:
        block.compile(**EAGER)


def blocks_wrapped(model):
    for at, block in enumerate(model.h):
        model.h[at] = torch.compile(block, **EAGER)


def every_second_block(model):
    for block in model.h[::2]:
        block.compile(**EAGER)


def nothing(model):
    """Eager all over."""


def stepped(trained, batch, steps=2, **options):
    opt = fxckpt.compile_step(torch.optim.AdamW(trained.parameters(), fused=True), writer="mock", every=1, **options)
    for _ in range(steps):
        trained(**batch).backward()
        opt.step()
        opt.zero_grad()
    return opt


WAYS = [blocks_in_place, blocks_wrapped, every_second_block, nothing]


@pytest.mark.parametrize("compile_blocks", WAYS, ids=lambda f: f.__name__.replace("_", " "))
def test_the_order_is_that_of_the_eager_backward_for_every_block(book, compile_blocks):
    torch.manual_seed(0)
    model, batch = Gpt(depth=4), language()
    when = finals(model, lambda: model(**batch))
    compile_blocks(model)
    graph = stepped(model, batch, model=model).ckpt.graph
    assert sorted(graph.order) == sorted(n for n, _ in named_parameters(model))
    assert contradictions(graph.layers, when) == []


@pytest.mark.parametrize("compile_blocks", [blocks_in_place, blocks_wrapped], ids=["in place", "wrapped"])
def test_one_compile_serves_all_blocks_and_each_has_its_data_flow(book, compile_blocks):
    torch.manual_seed(0)
    model, batch = Gpt(depth=4), language()
    counters.clear()
    compile_blocks(model)
    graph = stepped(model, batch, model=model).ckpt.graph
    assert counters["stats"]["unique_graphs"] == 1
    edges = set(graph.edges)
    for at in range(4):
        inside = {(a, b) for a, b in edges if a.startswith(f"h.{at}.") and b.startswith(f"h.{at}.")}
        assert {(a[4:], b[4:]) for a, b in inside} == {
            ("ln_1", "attn"),
            ("attn", "proj"),
            ("proj", "ln_2"),
            ("ln_2", "up"),
            ("up", "down"),
        }
        assert at == 0 or (f"h.{at - 1}.down", f"h.{at}.ln_1") in edges


def test_the_order_does_not_depend_on_the_model_being_given(book):
    torch.manual_seed(0)
    model, batch = Gpt(depth=4), language()
    blocks_in_place(model)
    named = [(n, p) for n, p in model.named_parameters()]
    opt = fxckpt.compile_step(torch.optim.AdamW(named, fused=True), writer="mock", every=1)
    model(**batch).backward()
    opt.step()
    assert [layer.name for layer in opt.ckpt.graph.layers][:8] == [
        "head",
        "ln_f",
        "h.3.down",
        "h.3.up",
        "h.3.ln_2",
        "h.3.proj",
        "h.3.attn",
        "h.3.ln_1",
    ]


def test_the_backend_adds_no_graph_and_no_break_to_regional_compilation(book):
    seen = []
    for backend_options in ({"backend": "eager"}, EAGER):
        torch._dynamo.reset()
        torch.manual_seed(0)
        counters.clear()
        model, batch = Gpt(depth=3), language()
        for block in model.h:
            block.compile(**backend_options)
        for _ in range(2):
            torch.manual_seed(1)
            model(**batch).backward()
        seen.append({k: dict(counters[k]) for k in ("stats", "frames", "graph_break")})
    assert seen[0] == seen[1]


def test_listening_ends_with_the_first_step_and_leaves_no_hook(book):
    model, batch = Gpt(depth=1), language()
    opt = stepped(model, batch, steps=1, model=model)
    run = opt.ckpt._run
    assert run.arrangement._first_backward is None
    version = book.version
    model(**batch).backward()
    opt.step()
    assert book.version == version


# ---- the book alone, on traces made by hand ---------------------------------------------------------------------------


def recorded(book, owner, params, first_uses):
    entries = tuple((TensorWeakRef(p), ParamTrace("?", -1, at, at, at, at)) for p, at in zip(params, first_uses))
    return book.record(JointTrace(-1, (None, None), entries, tuple(range(len(entries))), (), (), (), (), (), weakref.ref(owner)))


def linears(count):
    return nn.ModuleList([nn.Linear(2, 2) for _ in range(count)])


def test_a_block_whose_gradients_arrived_with_others_between_is_not_taken_for_a_reuse():
    """It ran in eager, beside another: its own arrivals say more than its sibling's graph."""
    model, book = linears(3), TraceBook()
    recorded(book, model[0], list(model[0].parameters()), (0, 0))
    book.arrived([model[2].bias, model[1].bias, model[2].weight, model[1].weight, *model[0].parameters()], model)
    assert [book.lookup(p) for m in model[1:] for p in m.parameters()] == [None] * 4
    named = list(model.named_parameters())
    assert tuple(gradient_order(named, book)) == ("2.bias", "1.bias", "2.weight", "1.weight", "0.bias", "0.weight")


def test_a_block_of_another_shape_or_that_never_ran_gets_no_trace():
    model, book = linears(2), TraceBook()
    model.append(nn.Linear(2, 3))
    recorded(book, model[0], list(model[0].parameters()), (0, 0))
    book.arrived([*model[2].parameters(), *model[0].parameters()], model)
    assert len(book.traces()) == 1


def test_regions_come_in_the_order_of_their_backwards_whatever_the_order_of_their_compiles():
    model, book = linears(3), TraceBook()
    for block in (model[1], model[0], model[2]):
        recorded(book, block, list(block.parameters()), (0, 0))
    named = list(model.named_parameters())
    assert tuple(gradient_order(named, book))[::2] == ("2.bias", "0.bias", "1.bias")  # as compiled
    book.arrived([*model[2].parameters(), *model[1].parameters(), *model[0].parameters()])
    assert tuple(gradient_order(named, book))[::2] == ("2.bias", "1.bias", "0.bias")
    assert [t.params[0][0]() is b.weight for t, b in zip(book.traces(), model)] == [True] * 3
