"""The list of passes: each has a contract that is checked before it runs, and can be switched off as far as nobody needs it."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT
from torch import fx, nn

import fxckpt
from fxckpt.errors import SetupError
from fxckpt.graph import ops, step_graph
from fxckpt.graph.contract import SWITCH, ContractError, Pass, checked, finished, run_passes
from fxckpt.graph.model.layers import Layer
from fxckpt.graph.passes import PASSES, run
from fxckpt.graph.schedule import place_emits_pass, place_fences_pass, verify_schedule_pass
from fxckpt.graph.update import specialize
from fxckpt.optim import programs


def note_pass(gm: fx.GraphModule, seen: list[str], what: str) -> fx.GraphModule:
    seen.append(what)
    return finished(gm)


def empty() -> fx.GraphModule:
    return fx.GraphModule(nn.Module(), fx.Graph())


def test_a_missing_requirement_is_named_with_who_provides_it_before_any_pass_runs(monkeypatch):
    seen: list[str] = []
    first = Pass(note_pass, provides=("notes",), arguments={"seen": seen, "what": "first"})
    second = Pass(finished, requires=("notes",))
    run_passes(empty(), [first, second], wanted=("notes",))
    assert seen == ["first"]
    with pytest.raises(ContractError, match="the pass finished requires 'notes', and note, which provides it, comes later"):
        run_passes(empty(), [second, first])
    with pytest.raises(ContractError, match="the pass finished requires 'notes', and no pass of the list provides it"):
        run_passes(empty(), [second])
    with pytest.raises(ContractError, match="whoever runs the result requires 'ink', and no pass"):
        run_passes(empty(), [first], wanted=("ink",))
    monkeypatch.setenv(SWITCH, "note")
    with pytest.raises(ContractError, match=f"note, which provides it, is switched off by {SWITCH}"):
        run_passes(empty(), [first, second])
    assert seen == ["first"]
    assert checked([second], given=("notes",)) == [second]


def test_every_pass_is_a_public_function_that_the_docs_name():
    page = (ROOT / "docs" / "graph.md").read_text()
    for each in PASSES:
        assert each.function.__name__ == f"{each.name}_pass"
        assert not each.name.startswith("_")
    listed = re.findall(r"^\| `(\w+)` \| ", page.split("## Passes")[1], re.MULTILINE)
    assert listed == [each.name for each in PASSES], "in their order"


def test_a_name_that_is_no_pass_is_refused(monkeypatch):
    monkeypatch.setenv(SWITCH, "place_fence")
    with pytest.raises(SetupError, match=r"names place_fence; the passes are .*place_fences"):
        run(empty(), {})


# ---- the StepGraph's ---------------------------------------------------------------------------------------------------

LAYERS = [Layer("b", ("b.w",)), Layer("a", ("a.w",))]
EXPECTED = [(4, "counts"), (5, "b"), (9, "a")]


def built(*names: str) -> fx.GraphModule:
    """The StepGraph of two layers as these passes leave it."""
    chosen = step_graph.step_passes(LAYERS, [5, 9], 4, lambda i: lambda *_: None, list)
    return run(empty(), {each.function: chosen[each.function] for each in PASSES if each.name in names})


def steps(gm: fx.GraphModule) -> list[object]:
    """What runs, in order: the names of updates, and ops with the numbers of their layers."""
    found = [node for node in gm.graph.nodes if node.op in ("call_function", "call_module")]
    return [node.target if node.op == "call_module" else (node.target, node.args[2]) for node in found]


def test_updates_then_fences_then_emits_are_placed_by_a_pass_each():
    gm = built("write_updates")
    assert steps(gm) == ["scalars", "update_b", "update_a"]
    fence, emit = ops.ckpt_fence, ops.ckpt_emit
    place_fences_pass(gm)
    assert steps(gm) == [(fence, 4), "scalars", (fence, 5), "update_b", (fence, 9), "update_a"]
    place_emits_pass(gm)
    expected = [(fence, 4), "scalars", (emit, 4), (fence, 5), "update_b", (emit, 5), (fence, 9), "update_a", (emit, 9)]
    assert steps(gm) == expected
    assert steps(verify_schedule_pass(gm, EXPECTED)) == expected


def break_nothing(gm, fence, update, emit):
    pass


def drop_a_fence(gm, fence, update, emit):
    gm.graph.erase_node(fence)


def emit_twice(gm, fence, update, emit):
    with gm.graph.inserting_after(emit):
        gm.graph.node_copy(emit, lambda node: node)


def emit_first(gm, fence, update, emit):
    fence.prepend(emit)


def emit_other_tensors(gm, fence, update, emit):
    emit.args = (gm.graph.find_nodes(op="placeholder")[1], *emit.args[1:])


def emit_another_layer(gm, fence, update, emit):
    emit.args = (*emit.args[:2], 7, "c")


def drop_a_layer(gm, fence, update, emit):
    for node in (fence, update, emit):
        gm.graph.erase_node(node)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (break_nothing, None),
        (drop_a_fence, "layer 'a' .number 9. has .'update', 'emit'."),
        (emit_twice, "layer 'a' .number 9. has .'fence', 'update', 'emit', 'emit'."),
        (emit_first, "layer 'a' .number 9. has .'emit', 'fence', 'update'."),
        (emit_other_tensors, "not fenced and emitted with the tensors that are updated"),
        (emit_another_layer, r"should have \[\(4, 'counts'\), \(5, 'b'\), \(9, 'a'\)\]"),
        (drop_a_layer, r"has the layers \[\(4, 'counts'\), \(5, 'b'\)\]"),
    ],
)
def test_a_schedule_in_which_anything_is_missing_doubled_or_out_of_order_is_refused(broken, message):
    gm = built("write_updates", "place_fences", "place_emits")
    broken(gm, *list(gm.graph.nodes)[-4:-1])
    if message is None:
        verify_schedule_pass(gm, EXPECTED)
        return
    with pytest.raises(ContractError, match=message):
        verify_schedule_pass(gm, EXPECTED)


def test_layers_in_another_order_are_refused():
    gm = built("write_updates", "place_fences", "place_emits")
    with pytest.raises(ContractError, match="in this order"):
        verify_schedule_pass(gm, [EXPECTED[0], EXPECTED[2], EXPECTED[1]])


@pytest.mark.parametrize("name", ["write_updates", "place_fences", "place_emits"])
def test_what_a_checkpoint_needs_cannot_be_switched_off(monkeypatch, name):
    monkeypatch.setenv(SWITCH, f"{name}, verify_schedule")
    with pytest.raises(ContractError, match=f"{name}, which provides it, is switched off"):
        step_graph.build(LAYERS, [5, 9], 4, lambda i: lambda *_: None, list)


def test_the_verification_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(SWITCH, "verify_schedule")
    assert steps(step_graph.build(LAYERS, [5, 9], 4, lambda i: lambda *_: None, list)) == steps(
        built("write_updates", "place_fences", "place_emits")
    )


# ---- the update's ------------------------------------------------------------------------------------------------------


def trained(options: dict[str, object]) -> tuple[list[torch.Tensor], set[str]]:
    """The parameters after four steps of AdamW, and the classes of the calls that updated them."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n, 7)) for n in (3, 5, 80000)]
    opt = fxckpt.compile_step(torch.optim.AdamW(params, lr=0.1, **options), writer="mock", every=100)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    calls = {type(call).__name__ for call in opt.ckpt._run.steppers[0].executor.prepared.at_once}
    opt.ckpt.shutdown()
    return [p.detach() for p in params], calls


@pytest.mark.parametrize("off", ["native_calls", "widen_to_lists", "call_methods", "native_calls,widen_to_lists,call_methods"])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_pass_that_only_saves_time_changes_no_bit_when_it_is_switched_off(monkeypatch, off, options):
    bits, calls = trained(options)
    monkeypatch.setenv(SWITCH, off)
    monkeypatch.setattr(programs, "_shared_programs", {})
    for cached in (specialize.over_lists, specialize.by_methods):
        cached.cache_clear()
    without, others = trained(options)
    assert all(map(torch.equal, bits, without))
    if "widen" in off and options == {"foreach": False}:
        assert calls != others == {"_EachCall"}
    for cached in (specialize.over_lists, specialize.by_methods):
        cached.cache_clear()


def test_a_pass_that_compiling_needs_cannot_be_switched_off(monkeypatch):
    from fxckpt.graph.update import inductor

    monkeypatch.setenv(SWITCH, "tensor_scalars")
    body = fx.GraphModule(nn.Module(), fx.Graph())
    signature = SimpleNamespace(shape=None, dtype=torch.float32)
    program = SimpleNamespace(signature=signature, body=body, scalars=0, dtypes=())
    with pytest.raises(ContractError, match="tensor_scalars, which provides it, is switched off"):
        inductor._generate(program)


def test_each_pass_is_logged_with_its_graph_before_and_after(caplog):
    with caplog.at_level(logging.DEBUG, logger="fxckpt"):
        built("write_updates", "place_fences", "verify_schedule", "place_emits")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("pass ")]
    assert [line.split(":")[0] for line in told] == [
        "pass write_updates", "pass place_fences", "pass place_emits", "pass verify_schedule",
    ]  # fmt: skip
    before, after = told[1].split("and after")
    assert "ckpt_fence" not in before and "update_b" in before
    assert after.count("torch.ops.fxckpt.ckpt_fence") == 3
    assert told[3] == "pass verify_schedule: no change"
