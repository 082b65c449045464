"""An optimizer that is dropped takes its run with it, at once."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch import nn

import fxckpt

KINDS = {
    "traced": torch.optim.AdamW,
    "whole": torch.optim.LBFGS,
    "rehearsed": lambda params: Own(params, lr=0.1),
}


def nothing_is_left(life):
    """What a life returns is gone when it is over, without the garbage collector."""
    life()  # what torch imports at a first use keeps frames
    gc.collect()
    gc.disable()
    try:
        left = [ref() for ref in life()]
    finally:
        gc.enable()
    assert left == [None] * len(left)


class Own(torch.optim.Optimizer):
    """One that nobody knows."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(mean.lerp_(p.grad, 0.1), alpha=group["lr"])


@pytest.mark.parametrize("end", ["dropped", "shut down"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_nobody_refers_to_is_gone_at_once_with_all_that_it_held(kind, end, tmp_path):
    def life() -> list[weakref.ref]:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        opt = KINDS[kind](model.parameters())
        fxckpt.compile_step(opt, tmp_path, model=model, every=1, update="native", fresh=True)

        def loss() -> torch.Tensor:
            opt.zero_grad()
            (found := model(torch.ones(2, 3)).square().sum()).backward()
            return found

        for _ in fxckpt.steps(6):
            loss()
            opt.step(loss if kind == "whole" else None)
        if end == "shut down":
            opt.ckpt.shutdown()
        states = [v for state in opt.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        return [weakref.ref(each) for each in (opt, model, *model.parameters(), *states)]

    nothing_is_left(life)
    assert fxckpt.checkpoints(tmp_path)[-1].step == 6, "what was complete is durable"


@pytest.mark.parametrize("what", ["several", "a scheduler in extra"])
def test_a_run_that_was_shut_down_keeps_no_optimizer_by_another_or_by_a_scheduler(what, tmp_path):
    def life() -> list[weakref.ref]:
        models = [nn.Linear(3, 3), nn.Linear(3, 3)][: 2 if what == "several" else 1]
        opts = [torch.optim.AdamW(model.parameters()) for model in models]
        extra = {} if what == "several" else {"scheduler": torch.optim.lr_scheduler.StepLR(opts[0], 2)}
        model = {str(at): each for at, each in enumerate(models)}
        fxckpt.compile_step(opts, tmp_path, model=model, every=1, update="native", fresh=True, extra=extra)
        for _ in fxckpt.steps(2):
            for each, opt in zip(models, opts):
                each(torch.ones(2, 3)).sum().backward()
                opt.step()
            for each in extra.values():
                each.step()
        opts[0].ckpt.shutdown()
        states = [v for opt in opts for state in opt.state.values() for v in state.values()]
        return [weakref.ref(each) for each in (*opts, *models, *states)]

    nothing_is_left(life)
    assert fxckpt.checkpoints(tmp_path)[-1].step == 2


def test_whoever_has_the_handle_keeps_the_optimizer(tmp_path):
    model = nn.Linear(3, 3)
    handle = fxckpt.compile_step(torch.optim.AdamW(model.parameters()), tmp_path, model=model, every=1, update="native").ckpt
    gc.collect()
    handle.save("begun")
    assert [each.name for each in fxckpt.checkpoints(tmp_path)] == ["begun"]
    handle.shutdown()


def test_a_plain_loop_in_a_function_that_returns_has_committed_its_last_step(tmp_path):
    def train() -> None:
        model = nn.Linear(3, 3)
        opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters()), tmp_path, model=model, every=1, update="native")
        for _ in range(4):
            model(torch.ones(2, 3)).sum().backward()
            opt.step()
            opt.zero_grad()

    train()
    assert fxckpt.checkpoints(tmp_path)[-1].step == 4


def test_nothing_is_said_of_an_optimizer_that_the_end_of_the_process_takes(tmp_path):
    script = """
        import torch, fxckpt
        model = torch.nn.Linear(3, 3)
        opt = fxckpt.compile_step(torch.optim.AdamW(model.parameters()), "ckpt", model=model, every=1, update="native")
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert fxckpt.checkpoints(tmp_path / "ckpt")[-1].step == 1


def test_an_optimizer_of_several_that_is_dropped_goes_with_the_last_of_them(tmp_path):
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    opts = [torch.optim.AdamW(m.parameters()) for m in (a, b)]
    fxckpt.compile_step(opts, tmp_path, model={"a": a, "b": b}, every=1, update="native")
    first = weakref.ref(opts.pop(0))
    for _ in fxckpt.steps(2):
        b(torch.ones(2, 3)).sum().backward()
        opts[0].step()
    assert first() is not None, "its state is in the checkpoints"
    opts[0].ckpt.shutdown()
    opts.clear()
    gc.collect()
    assert first() is None
