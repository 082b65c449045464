"""The optimizer keeps its identity: what worked with the stock one works with the stepped one."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

import fxckpt


def make(every=1, cls=torch.optim.AdamW, scheduler=None, **options):
    """A tiny model and its stepped optimizer; ``scheduler`` is made before compile_step when given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    opt = cls(model.parameters(), lr=0.1, **options)
    made = scheduler(opt) if scheduler is not None else None
    fxckpt.compile_step(opt, writer="mock", every=every, update="native", model=model)
    return model, opt, made


def backward(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 6, generator=g)).square().sum().backward()


def test_it_is_the_same_instance_of_the_same_class():
    model = nn.Linear(2, 2)
    opt = torch.optim.AdamW(model.parameters())
    assert fxckpt.compile_step(opt, writer="mock") is opt
    assert isinstance(opt, torch.optim.AdamW)
    assert type(opt).__name__ == "AdamW" and repr(opt).startswith("AdamW (")


@pytest.mark.parametrize("before", [True, False])
def test_a_scheduler_made_before_or_after_counts_the_steps_without_a_warning(before):
    factory = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.1)  # noqa: E731
    model, opt, scheduler = make(scheduler=factory if before else None)
    scheduler = scheduler or factory(opt)
    second = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            backward(model, step)
            opt.step()
            scheduler.step()
            second.step()
            opt.zero_grad()
    assert opt.ckpt.statistics()["checkpoints_started"] == 4, "steps went past us"
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2 * 0.5**4)


def test_a_step_that_something_else_replaced_is_refused():
    model = nn.Linear(2, 2)
    opt = torch.optim.AdamW(model.parameters())
    opt.step = lambda: None
    with pytest.raises(fxckpt.SetupError, match="was replaced"):
        fxckpt.compile_step(opt, writer="mock")


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RAdam])
def test_hooks_fire_once_on_every_path_also_after_load_state_dict(cls):
    model, opt, _ = make(cls=cls)
    fired = []
    opt.register_step_pre_hook(lambda *_: fired.append("pre"))
    opt.register_step_post_hook(lambda *_: fired.append("post"))

    def closure():
        opt.zero_grad()
        loss = model(torch.ones(1, 6)).sum()
        loss.backward()
        return loss

    for step in range(4):  # first step, StepGraph, after a reload, with a closure
        if step == 2:
            opt.load_state_dict(opt.state_dict())
        backward(model)
        opt.step(closure) if step == 3 else opt.step()
    assert fired == ["pre", "post"] * 4


@pytest.mark.parametrize("threads", ["this thread", "all threads"])
def test_a_profiler_shows_the_step_as_pytorchs_own(threads):
    model, opt, _ = make()
    backward(model)
    opt.step()
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=threads == "all threads")
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as seen:
        opt.step()
    opt.step()
    assert [e.name for e in seen.events() if e.name.startswith("Optimizer.step#")] == ["Optimizer.step#AdamW.step"]


def test_hooks_for_all_optimizers_fire_once():
    model, opt, _ = make()
    fired = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("post")),
    ]
    backward(model)
    opt.step()
    opt.step()
    for handle in handles:
        handle.remove()
    opt.step()
    assert fired == ["pre", "post"] * 2


def test_a_post_hook_that_a_closure_registers_fires_in_that_step():
    model, opt, _ = make()
    fired = []

    def closure():
        opt.register_step_post_hook(lambda *args: fired.append(args))
        backward(model)

    opt.step(closure)
    assert fired == [(opt, (opt, closure), {})]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_momentum_of_sparse_gradients_is_trained_and_stored(set_to_none, tmp_path):
    def train(directory, steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if directory is not None:
            fxckpt.compile_step(opt, directory, model=model, every=1, update="native")
            fxckpt.load()
        for step in range(0 if directory is None else opt.ckpt.statistics()["steps"], steps):
            opt.zero_grad(set_to_none=set_to_none)
            model(torch.tensor([step % 3, 5])).square().sum().backward()
            opt.step()
        if directory is not None:
            opt.ckpt.shutdown()
        return [*model.parameters(), opt.state[model[0].weight]["momentum_buffer"].to_dense()]

    train(tmp_path, 3)
    assert all(map(torch.equal, train(tmp_path, 6), train(None, 6)))


def test_a_closure_is_evaluated_once_with_gradients_and_its_loss_returned():
    model, opt, _ = make()
    twin_model = copy.deepcopy(model)
    twin = torch.optim.AdamW(twin_model.parameters(), lr=0.1)
    losses = []
    for this, o in ((model, opt), (twin_model, twin)):
        calls = []

        def closure(this=this, o=o, calls=calls):
            calls.append(torch.is_grad_enabled())
            o.zero_grad()
            loss = this(torch.ones(2, 6)).square().sum()
            loss.backward()
            return loss

        losses.append([float(o.step(closure).detach()) for _ in range(3)])
        assert calls == [True] * 3
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters()))


def test_pickles_and_copies_are_plain_optimizers():
    model, opt, _ = make()
    backward(model)
    opt.step()
    for other in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt), copy.copy(opt)):
        assert type(other) is torch.optim.AdamW
        assert not hasattr(other, "ckpt")


def test_state_dict_round_trip_gives_the_same_next_step():
    model, opt, _ = make()
    for step in range(3):
        backward(model, step)
        opt.step()
        opt.zero_grad()
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    backward(model, 9)
    opt.step()
    want = copy.deepcopy(model.state_dict())
    opt.zero_grad()
    opt.load_state_dict(saved)
    model.load_state_dict(weights)
    backward(model, 9)
    opt.step()
    assert all(torch.equal(want[k], v) for k, v in model.state_dict().items())


def test_a_state_dict_has_the_keys_of_the_stock_optimizer():
    model, opt, _ = make()
    backward(model)
    opt.step()
    twin = torch.optim.AdamW(copy.deepcopy(model).parameters(), lr=0.1)
    assert opt.state_dict()["param_groups"][0].keys() == twin.state_dict()["param_groups"][0].keys()
    assert opt.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_added_groups_and_unfrozen_parameters_join_the_graph():
    torch.manual_seed(0)
    model, head = nn.Linear(6, 6), nn.Linear(6, 2)
    head.bias.requires_grad_(False)
    twins = copy.deepcopy((model, head))

    def train(body, top, opt):
        for step in range(6):
            if step == 2:
                opt.add_param_group({"params": list(top.parameters()), "lr": 0.05})
            if step == 4:
                top.bias.requires_grad_(True)
            g = torch.Generator().manual_seed(step)
            top(body(torch.randn(3, 6, generator=g))).square().sum().backward()
            opt.step()
            opt.zero_grad()

    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    fxckpt.compile_step(opt, writer="mock", every=1, update="native", model=[model, head])
    train(model, head, opt)
    train(*twins, torch.optim.AdamW(twins[0].parameters(), lr=0.1))
    for ours, theirs in zip((model, head), twins):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert opt.ckpt.statistics()["checkpoints_failed"] == 0
    assert len(opt.ckpt.graph.order) == 4


def test_accumulation_clipping_and_zeroed_gradients_have_the_bits_of_the_stock_optimizer():
    model, opt, _ = make(every=2)
    twin_model = copy.deepcopy(model)
    twin = torch.optim.AdamW(twin_model.parameters(), lr=0.1)
    for this, o in ((model, opt), (twin_model, twin)):
        for step in range(6):
            backward(this, 2 * step)
            backward(this, 2 * step + 1)
            nn.utils.clip_grad_norm_(this.parameters(), 0.5)
            o.step()
            o.zero_grad(set_to_none=step % 2 == 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters()))


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_that_finds_an_inf_counts_an_attempt_and_changes_nothing(fused):
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    fxckpt.compile_step(opt, writer="mock", every=1, model=model, extra={"scaler": scaler})
    twin_model = copy.deepcopy(model)
    twin = torch.optim.AdamW(twin_model.parameters(), lr=0.1, fused=fused)
    twin_scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    for this, o, s in ((model, opt, scaler), (twin_model, twin, twin_scaler)):
        for step in range(5):
            x = torch.full((2, 6), float("inf") if step == 2 else 1.0 + step)
            s.scale(this(x).sum()).backward()
            s.step(o)
            s.update()
            o.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters()))
    assert opt.ckpt.statistics()["steps"] == 5
    assert opt.ckpt._run.clock.applied.promise()() == 4
    assert opt.ckpt.statistics()["checkpoints_started"] == 4


def test_a_watched_scaler_pickles_and_copies_as_a_plain_one():
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    fxckpt.compile_step(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), writer="mock", extra={"scaler": scaler})
    for twin in (copy.copy(scaler), copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert type(twin) is torch.amp.GradScaler and twin.state_dict() == scaler.state_dict()
    assert isinstance(scaler, torch.amp.GradScaler)


def test_one_optimizer_belongs_to_one_run_at_a_time():
    _, opt, _ = make()
    with pytest.raises(fxckpt.SetupError, match="already belongs"):
        fxckpt.compile_step(opt, writer="mock")
    opt.ckpt.shutdown()
    fxckpt.compile_step(opt, writer="mock")
