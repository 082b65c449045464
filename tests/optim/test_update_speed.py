"""What makes a step fast, told by what runs and not by how long it takes."""

from __future__ import annotations

import pytest
import torch

import fxckpt
from fxckpt.graph.update import foreach, inductor
from fxckpt.optim import calls as update_calls


def steps(params, opt, count=3):
    for _ in range(count):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.01 * (i + 1))
        opt.step()


def make(cls, params, update, **options):
    return fxckpt.compile_step(cls(params, lr=1e-2, **options), writer="mock", every=10**6, update=update)


def calls(opt):
    return opt.ckpt._run.steppers[0].executor.prepared.at_once


@pytest.mark.parametrize("count", [3, 30])
def test_a_compiled_step_is_one_call_however_many_parameters_there_are(count):
    params = [torch.nn.Parameter(torch.randn(3 + i, 5)) for i in range(count)]
    opt = make(torch.optim.AdamW, params, "inductor")
    steps(params, opt)
    assert len(calls(opt)) == 1


def test_a_process_compiles_an_update_once_for_all_runs_and_shapes(monkeypatch):
    compiled = []
    original = inductor._compile
    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(inductor, "_compile", lambda program: compiled.append(program) or original(program))
    for shape in ((3,), (4, 5), (2, 3, 4)):
        params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]
        opt = make(torch.optim.SGD, params, "inductor", momentum=0.9)
        steps(params, opt)
        opt.ckpt.shutdown()
    assert len(compiled) == 1


def test_a_later_process_finds_the_generated_code(monkeypatch, tmp_path):
    monkeypatch.setattr(inductor, "cache_folder", lambda: str(tmp_path))
    params = [torch.nn.Parameter(torch.randn(6))]
    monkeypatch.setattr(inductor, "_compiled", {})
    first = make(torch.optim.SGD, params, "inductor", momentum=0.9)
    steps(params, first)
    first.ckpt.shutdown()
    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(inductor, "_generate", lambda program: pytest.fail("it was generated again"))
    again = make(torch.optim.SGD, params, "inductor", momentum=0.9)
    steps(params, again)
    assert again.ckpt._run.steppers[0].bindings.members[0].flat


def test_code_that_is_not_whole_is_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(inductor, "cache_folder", lambda: str(tmp_path))
    params = [torch.nn.Parameter(torch.randn(6))]
    for _ in range(2):
        monkeypatch.setattr(inductor, "_compiled", {})
        opt = make(torch.optim.SGD, params, "inductor", momentum=0.9)
        steps(params, opt)
        opt.ckpt.shutdown()
        (library,) = (tmp_path / "fxckpt").iterdir()
        assert library.stat().st_size > 1000
        library.unlink()  # before another one gets its name: this process has it mapped
        library.write_bytes(b"")


def test_code_that_was_made_for_another_processor_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(inductor, "cache_folder", lambda: str(tmp_path))
    params, made, generate = [torch.nn.Parameter(torch.randn(6))], [], inductor._generate
    monkeypatch.setattr(inductor, "_generate", lambda program: made.append(program) or generate(program))
    for processor in ("this one", "this one", "another one"):
        monkeypatch.setattr(inductor, "_compiled", {})
        monkeypatch.setattr(inductor, "compiler_settings", lambda processor=processor: processor)
        opt = make(torch.optim.SGD, params, "inductor", momentum=0.9)
        steps(params, opt)
        opt.ckpt.shutdown()
    assert len(made) == 2


@pytest.mark.parametrize(("worth", "groups"), [(256, [4]), (1, [1, 3])], ids=["too few for two threads", "in two halves"])
def test_single_tensor_kernels_run_over_lists_with_the_same_bits(monkeypatch, worth, groups):
    monkeypatch.setattr(update_calls, "WORTH_SHARING", worth)
    ours = [torch.nn.Parameter(torch.randn(n, 7)) for n in (1, 5, 30000, 64, 64)]
    stock = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    opt, plain = make(torch.optim.AdamW, ours, "native", foreach=False), torch.optim.AdamW(stock, lr=1e-2, foreach=False)
    steps(ours, opt, 5)
    steps(stock, plain, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock))
    found = [part for call in calls(opt) for part in getattr(call, "calls", [call])]
    columns, each = ([c for c in found if type(c).__name__ == name] for name in ("_ColumnsCall", "_EachCall"))
    assert sorted(len(rows[0]) for call in columns for _, rows in call.groups) == groups
    assert [len(call.rows) for call in each] == [1], "large ones apart"


def test_groups_hold_what_fits_and_large_members_stand_alone():
    small, large = torch.empty(1024), torch.empty(foreach.GROUP_BYTES)
    assert foreach.groups([[small] * 3 + [large] + [small]]) == [slice(0, 3), slice(3, 4), slice(4, 5)]
    assert foreach.groups([[large, large]]) == [slice(0, 1), slice(1, 2)]
    assert foreach.groups([]) == []


def test_groups_for_two_threads_are_as_large_as_each_other():
    assert foreach.groups([[torch.empty(1024)] * 10], 2) == [slice(0, 5), slice(5, 10)]
    fitting = [torch.empty(foreach.GROUP_BYTES // 16)] * 10  # four to a group by bytes
    assert foreach.groups([fitting], 2) == [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)]
    sizes = [part.stop - part.start for part in foreach.groups([[torch.empty(64, 64)] * 200] * 3, 2)]
    assert max(sizes) - min(sizes) <= 1 and len(sizes) % 2 == 0
    assert foreach.groups([[torch.empty(8)]], 2) == [slice(0, 1)]


def test_a_driver_refuses_arguments_it_cannot_supply():
    column, scalar = torch.zeros(5), torch.zeros(())
    with pytest.raises(inductor.NotTraceable, match="temporary"):
        inductor.driver(["float*"], "", [torch.zeros(5)], [column], [scalar])
    with pytest.raises(inductor.NotTraceable, match="number 7"):
        inductor.driver(["const int64_t"], "", [7], [column], [scalar])
    text = inductor.driver(["float*", "const float*", "const int64_t"], "", [column, scalar, 5], [column], [scalar])
    assert "kernel((float*)row[0] + at, (const float*)scalars[0], n);" in text
