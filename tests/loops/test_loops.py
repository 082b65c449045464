"""Training loops as people write them: through ``compile_step`` they have the bits that they have without it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable

import pytest
import torch
from small_models import eager
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fxckpt
from fxckpt.graph.update import inductor
from fxckpt.saving.guard import Guard


@pytest.fixture(autouse=True)
def no_old_graphs():
    torch._dynamo.reset()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def data(step: int, size: int = 6) -> torch.Tensor:
    return torch.randn(5, size, generator=torch.Generator().manual_seed(step))


def both(loop: Callable, make: Callable = net, optimizer: Callable = adamw, **how) -> list:
    """Run ``loop(model, forward, optimizer)`` with fxckpt and without, and compare all bits; returns the stepped optimizers."""
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = make()
        opt, forward = optimizer(model), model
        if ours:
            fxckpt.compile_step(opt, writer="mock", **{"every": 1, "update": "native", "model": model, **how})
            forward = eager(model)
        loop(model, forward, opt)
        opts = opt if isinstance(opt, list) else [opt]
        found.append((model, opts))
    (model, opts), (stock, theirs) = found
    for (name, a), b in zip(model.state_dict().items(), stock.state_dict().values()):
        assert torch.equal(a, b), name
    for mine, other in zip(opts, theirs):
        for p, q in zip(mine.state.values(), other.state.values()):
            assert all(torch.equal(p[k], q[k]) for k in q if isinstance(q[k], torch.Tensor))
    statistics = opts[-1].ckpt.statistics()
    assert statistics["checkpoints_failed"] == 0
    assert statistics["checkpoints_started"] > 0
    return opts


def plain(model, forward, opt, steps=6):
    for step in range(steps):
        forward(data(step)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def test_autocast():
    def loop(model, forward, opt):
        for step in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(data(step)).float().square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()

    both(loop)


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_in_bfloat16(fused):
    def loop(model, forward, opt):
        for step in range(6):
            forward(data(step).bfloat16()).square().mean().backward()
            opt.step()
            opt.zero_grad()

    both(loop, lambda: net().bfloat16(), lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, fused=fused))


def test_accumulation_with_gradients_clipped_by_value_and_kept_as_zeros():
    def loop(model, forward, opt):
        for step in range(12):
            (forward(data(step)).square().mean() / 2).backward()
            if step % 2:
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
                opt.step()
                opt.zero_grad(set_to_none=False)

    both(loop)


def test_a_model_called_several_times_in_one_step():
    def loop(model, forward, opt):
        for step in range(6):
            (forward(data(step)) - forward(data(step + 100))).square().mean().backward()
            forward(data(step + 200)).sum().mul(0.1).backward()
            opt.step()
            opt.zero_grad()

    both(loop)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_between_backward_and_step_and_after_it(grad_mode):
    def evaluate(model, forward):
        model.eval()
        with grad_mode():
            forward(data(999))
        model.train()

    def loop(model, forward, opt):
        for step in range(6):
            forward(data(step)).square().mean().backward()
            evaluate(model, forward)
            opt.step()
            evaluate(model, forward)
            opt.zero_grad()

    both(loop)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.blocks = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = checkpoint(lambda v, block=block: torch.tanh(block(v)), x, use_reentrant=reentrant)
            return x

    opt = both(plain, Blocks)[0]
    assert len(opt.ckpt.graph.order) == 8


class Experts(nn.Module):
    """Each step goes to two of six experts; the others have no gradient."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x, chosen):
        return sum(self.experts[i](x) for i in chosen)


def routed(model, forward, opt, steps=range(12)):
    for step in steps:
        model(data(step), (step % 6, (step * step + 1) % 6)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def test_a_mixture_of_experts_with_another_subset_at_each_step():
    opt = both(routed, Experts)[0]
    programs = [p for p in opt.ckpt._run.steppers[0].programs.traced.values() if isinstance(p, list)]
    assert [len(p) for p in programs] == [1]


@pytest.mark.skipif(os.environ.get("FXCKPT_MODELS") != "full", reason="make models: compiles updates with Inductor")
def test_another_subset_of_experts_compiles_nothing(inductor_cache):
    torch.manual_seed(0)
    model = Experts()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fxckpt.compile_step(opt, writer="mock", every=1, update="inductor", model=model)
    routed(model, model, opt, range(3))
    before = set(inductor._compiled)
    routed(model, model, opt, range(3, 15))
    assert set(inductor._compiled) == before


def test_layers_frozen_and_unfrozen_in_the_middle():
    def loop(model, forward, opt):
        for step in range(9):
            if step in (3, 6):
                model[0].requires_grad_(step == 6)
            plain(model, model, opt, 1)

    both(loop)


def test_weights_swapped_for_their_average_and_back():
    def loop(model, forward, opt):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for step in range(6):
            forward(data(step)).square().mean().backward()
            opt.step()
            average.update_parameters(model)
            for _ in range(2):
                for p, e in zip(model.parameters(), average.module.parameters()):
                    p.data, e.data = e.data, p.data
                with torch.no_grad():
                    model(data(step))
            opt.zero_grad()

    both(loop)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("copied", ["before the next step", "after it begins"])
def test_weights_overwritten_while_they_are_copied_drop_that_checkpoint_and_are_named(every, copied, tmp_path):
    """Also when the copies end before the next step looks, and when that step takes a checkpoint itself."""
    import instruments

    torch.manual_seed(0)
    model = net()
    opt = fxckpt.compile_step(adamw(model), tmp_path / "d", model=model, every=every, update="native", staging_mb=0, threads=1)
    plain(model, model, opt, 3)
    opt.ckpt.flush()
    plain(model, model, opt, 2)
    instruments.delay("copy", 400_000)
    plain(model, model, opt, 1)
    opt.ckpt.end_step()
    with torch.no_grad():
        model[3].weight.lerp_(torch.zeros(3, 8), 0.5)
    if copied == "before the next step":
        with pytest.raises(fxckpt.FxckptError, match=r"'3\.weight' was changed in place outside opt\.step\(\).*step 6"):
            opt.ckpt.flush()
    instruments.delay("copy", 0)
    plain(model, model, opt, 1)
    if copied == "after it begins":
        with pytest.raises(fxckpt.FxckptError, match=r"'3\.weight' was changed in place outside opt\.step\(\).*step 6"):
            opt.ckpt.flush()
    opt.ckpt.shutdown()
    assert 6 not in [found.step for found in fxckpt.checkpoints(tmp_path / "d")]


def test_a_change_seen_by_the_next_step_drops_the_checkpoint_though_it_is_durable_by_then(tmp_path, monkeypatch):
    """The thread that commits is held where it has seen all copies end and has not looked for changes yet."""
    check, durable, looked = Guard.check_unchanged, threading.Event(), threading.Event()

    def late(guard: Guard) -> None:
        (pending,) = opt.ckpt._run.saver.flights.under_way()
        assert pending.copy.durable(60)
        durable.set()
        assert looked.wait(60)
        check(guard)

    torch.manual_seed(0)
    model = net()
    opt = fxckpt.compile_step(adamw(model), tmp_path / "d", model=model, every=1, update="native")
    plain(model, model, opt, 3)
    opt.ckpt.flush()
    monkeypatch.setattr(Guard, "check_unchanged", late)
    plain(model, model, opt, 1)
    opt.ckpt.end_step()
    assert durable.wait(60)
    with torch.no_grad():
        model[3].weight.mul_(0.5)
    plain(model, model, opt, 1)
    looked.set()
    with pytest.raises(fxckpt.FxckptError, match=r"'3\.weight' was changed in place outside opt\.step\(\).*step 4"):
        opt.ckpt.flush()
    opt.ckpt.shutdown()
    assert 4 not in [found.step for found in fxckpt.checkpoints(tmp_path / "d")]


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.05, fused=True)]


def test_muon_and_adamw_on_one_model():
    def loop(model, forward, opts):
        for step in range(6):
            forward(data(step)).square().mean().backward()
            for opt in opts:
                opt.step()
            model.zero_grad()

    opts = both(loop, optimizer=muon_and_adamw)
    steppers = opts[0].ckpt._run.steppers
    assert [s.whole for s in steppers] == [None, None]
    assert sorted(n for s in steppers for n in s.executor.arranged.graph.order) == sorted(n for n, _ in net().named_parameters())


def test_two_runs_in_one_process_share_compiled_updates_and_nothing_else(tmp_path, inductor_cache):
    made = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        fxckpt.compile_step(opt, tmp_path / name, model=model, every=1, update="inductor")
        made.append((model, opt))
    (a, first), (b, second) = made
    plain(a, a, first, 3)
    bodies = set(inductor._compiled)
    plain(b, b, second, 3)
    assert set(inductor._compiled) == bodies
    for step in range(3, 6):  # in turns
        for model, opt in made:
            model(data(step)).square().mean().backward()
            opt.step()
            opt.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    for _, opt in made:
        opt.ckpt.shutdown()
    assert fxckpt.load(tmp_path / "a", model=net()).step == fxckpt.load(tmp_path / "b", model=net()).step == 6


def test_tensors_inside_a_transform_of_torch_func_are_refused_by_name():
    def inside(x):
        opt = torch.optim.SGD([x], lr=0.1)
        with pytest.raises(fxckpt.SetupError, match=r"torch\.func"):
            fxckpt.compile_step(opt, writer="mock")
        return x

    torch.func.vmap(inside)(torch.ones(2, 3))


class TwoMatrices(nn.Module):
    """``how`` says whose memory the two weights are."""

    def __init__(self, how: str):
        super().__init__()
        self.first, self.middle, self.last = nn.Module(), nn.Linear(6, 6), nn.Module()
        flat = torch.randn(72)
        if how == "views of one buffer":  # which count their changes together
            self.first.weight = nn.Parameter(flat[:36].view(6, 6))
            self.last.weight = nn.Parameter(flat[36:].view(6, 6))
        else:
            self.first.weight, self.last.weight = nn.Parameter(flat[:36].view(6, 6)), nn.Parameter(torch.empty(6, 6))
            self.last.weight.data = self.first.weight.data

    def forward(self, x):
        return F.linear(torch.tanh(self.middle(F.linear(x, self.first.weight))), self.last.weight)


class NotOfTorch(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params, lr=0.05),
        lambda params: torch.optim.AdamW(params, lr=0.05, foreach=True),
        lambda params: NotOfTorch(params, lr=0.05, momentum=0.9),
    ],
    ids=["single", "foreach", "not of torch.optim"],
)
@pytest.mark.parametrize("how", ["views of one buffer", "two parameters of one memory"])
def test_parameters_that_share_a_buffer(how, make):
    opt = both(plain, lambda: TwoMatrices(how), lambda m: make(m.parameters()))[0]
    whole = opt.ckpt._run.steppers[0].whole
    assert whole is None if how == "views of one buffer" else "first.weight" in whole and "last.weight" in whole


def test_a_parameter_that_takes_the_place_of_another_in_its_group_is_trained():
    def loop(model, forward, opt):
        plain(model, model, opt, 2)
        if hasattr(opt, "ckpt"):
            opt.ckpt.end_step()
        model[3].weight = opt.param_groups[0]["params"][4] = nn.Parameter(torch.full((3, 8), 0.1))
        plain(model, model, opt, 2)

    both(loop, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.05))


def test_groups_may_hold_what_no_optimizer_reads():
    def grouped(model):
        return torch.optim.AdamW(
            [
                {"params": model[0].parameters(), "name": "a", "milestones": [[0, 1], [2, 3]]},
                {"params": model[3].parameters(), "notes": {"a": 1}, "epoch": 0},
            ],
            lr=0.05,
        )

    opt = both(plain, optimizer=grouped)[0]
    assert opt.ckpt._run.steppers[0].whole is None


def test_frozen_parameters_made_in_inference_mode():
    def make():
        with torch.inference_mode():
            encoder = nn.Linear(6, 6).requires_grad_(False)
        return nn.ModuleDict({"encoder": encoder, "head": nn.Linear(6, 3)})

    def loop(model, forward, opt):
        for step in range(3):
            with torch.no_grad():
                features = model["encoder"](data(step)).clone()
            model["head"](features).square().mean().backward()
            opt.step()
            opt.zero_grad()

    both(loop, make, lambda m: torch.optim.AdamW(m["head"].parameters(), lr=0.05))


def test_layers_of_any_name():
    names = ["a_b", "counts", "run", "scalars", "self_", "torch", "class", "0", "print", "a_b__2", "update_a_b", "\u00fcn x/y"]

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})
            self.a = nn.ModuleDict({"b": nn.Linear(6, 6)})
            for name in names[:6]:
                setattr(self, name, nn.Linear(6, 6))

        def forward(self, x):
            for layer in (*self.layers.values(), self.a["b"], *(getattr(self, name) for name in names[:6])):
                x = x + torch.tanh(layer(x))
            return x

    both(plain, Named)


def test_what_an_exception_left_undone_is_no_reason_to_leave_out_parameters_in_the_next_step():
    """The first step is PyTorch's own, which makes the state; then the layers are handed over, and that is interrupted."""
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    def loop(model, forward, opt):
        for step in range(4):
            forward(data(step)).square().mean().backward()
            try:
                opt.step()
            except KeyboardInterrupt:
                with pytest.raises(fxckpt.SetupError, match=r"left by an exception in its middle.*fxckpt\.load\(\)"):
                    opt.ckpt.save("interrupted")
            opt.zero_grad()

    both(loop, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9), on_layer=interrupt)


def test_half_a_step_of_one_optimizer_is_not_saved_when_another_one_has_stepped(monkeypatch):
    model = net()
    opts = fxckpt.compile_step(muon_and_adamw(model), writer="mock", model=model, update="native")

    def backward():
        model(data(0)).square().mean().backward()

    backward()
    opts[0].step()
    opts[1].step()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(opts[0].ckpt._run.steppers[0].executor, "run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        opts[0].step()
    opts[1].step()
    with pytest.raises(fxckpt.SetupError, match="left by an exception in its middle"):
        opts[0].ckpt.save()
    opts[0].step()
    opts[0].ckpt.save()


def test_a_target_network_is_stored_as_the_turn_left_it(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"online": nn.Linear(6, 3), "target": nn.Linear(6, 3).requires_grad_(False)})
    opt = torch.optim.SGD(model["online"].parameters(), lr=0.05)
    fxckpt.compile_step(opt, tmp_path / "d", every=1, model=model, update="native")
    for step in fxckpt.steps(3, optimizer=opt):
        plain(None, model["online"], opt, 1)
        with torch.no_grad():
            for t, p in zip(model["target"].parameters(), model["online"].parameters()):
                t.lerp_(p, 0.5)
        opt.ckpt.note(step=step)
    opt.ckpt.shutdown()
    assert opt.ckpt.statistics()["checkpoints_failed"] == 0
    other = nn.ModuleDict({"online": nn.Linear(6, 3), "target": nn.Linear(6, 3)})
    assert fxckpt.load(tmp_path / "d", model=other).step == 3
    assert torch.equal(other["target"].weight, model["target"].weight)


def test_weights_clamped_after_every_step_are_stored_as_the_turn_left_them(tmp_path):
    torch.manual_seed(0)
    model = net()
    opt = fxckpt.compile_step(adamw(model), tmp_path / "d", every=1, model=model, update="native")
    for step in fxckpt.steps(4, optimizer=opt):
        model(data(step)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            model[3].weight.clamp_(-0.1, 0.1)
    opt.ckpt.shutdown()
    found = opt.ckpt.statistics()
    assert (found["checkpoints_failed"], found["checkpoints_skipped"], found["checkpoints_committed"]) == (0, 0, 4)
    other = net()
    fxckpt.load(tmp_path / "d", model=other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_an_embedding_that_bounds_its_rows_in_the_forward_is_stored_as_the_turn_left_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 3))
    opt = fxckpt.compile_step(torch.optim.SGD(model.parameters(), lr=0.5), tmp_path / "d", every=1, model=model, update="native")
    for step in fxckpt.steps(5, optimizer=opt):
        model(torch.tensor([step, 8])).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.ckpt.shutdown()
    assert opt.ckpt.statistics()["checkpoints_failed"] == 0
    other = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    assert fxckpt.load(tmp_path / "d", model=other).step == 5
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_second_run_on_the_same_model_is_told_to_join_the_first(caplog):
    model = net()
    opts = [torch.optim.SGD(model[i].parameters(), lr=0.05) for i in (0, 3)]
    fxckpt.compile_step(opts[0], "first", writer="mock", model=model)
    assert "another run" not in caplog.text
    fxckpt.compile_step(opts[1], "second", writer="mock", model=model)
    assert re.search(r"'0\.weight' of this model belongs to an optimizer of another run, in '.*first'", caplog.text)


def test_functional_calls_of_the_model_train_the_same():
    """``functional_call`` and ``grad`` read the parameters; the gradients come to the optimizer by hand."""

    def loop(model, forward, opt):
        def loss(params, x):
            return torch.func.functional_call(model, params, (x,)).square().mean()

        for step in range(6):
            params = {name: p.detach() for name, p in model.named_parameters()}
            for name, grad in torch.func.grad(loss)(params, data(step)).items():
                model.get_parameter(name).grad = grad
            opt.step()
            opt.zero_grad()

    both(loop, lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


def test_a_closure_that_runs_the_model_several_times():
    def loop(model, forward, opt):
        for step in range(4):

            def closure(step=step):
                opt.zero_grad()
                loss = F.mse_loss(forward(data(step)), torch.zeros(5, 3))
                loss.backward()
                return loss

            opt.step(closure)

    both(
        loop,
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda m: torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=4),
    )


def test_a_loop_that_is_compiled_with_its_step_breaks_there_and_none_of_our_code_is_traced(tmp_path):
    """Stepping inside what the user compiles: one graph break, ``torch.compiler.disable``'s, and the bits of eager."""
    from torch._dynamo.utils import counters

    def train(model, opt, x):
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        return loss.detach() * 2

    def trained(run, where):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        opt = torch.optim.AdamW(model.parameters(), lr=0.1)
        fxckpt.compile_step(opt, where, model=model, every=2, update="native")
        for _ in range(4):
            run(model, opt, torch.ones(2, 4))
            opt.zero_grad()
        opt.ckpt.flush()
        done = opt.ckpt.statistics()["checkpoints_committed"]
        opt.ckpt.shutdown()
        return done, [p.detach().clone() for p in model.parameters()]

    torch._dynamo.reset()
    counters.clear()
    graphs = []
    compiled = torch.compile(train, backend=lambda module, _: graphs.append(module) or module.forward)
    (committed, weights), (_, eager) = trained(compiled, tmp_path / "compiled"), trained(train, tmp_path / "eager")
    assert committed == 2 and all(torch.equal(a, b) for a, b in zip(weights, eager))
    breaks = [text.split("\n")[0] for text in counters["graph_break"]]
    assert {text for text in breaks if "torch.compiler.disable" not in text} == {"Unsupported Tensor.backward() call"}
    assert len([g for g in graphs if any(n.op.startswith("call") for n in g.graph.nodes)]) == 2
