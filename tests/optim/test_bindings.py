"""Which changes of an optimizer need a new binding, and how they are named."""

from __future__ import annotations

import pytest
import torch

from fxckpt.optim.bindings import Bindings, BoundParam


def bind(bindings, flat=False):
    """Take the optimizer's parameters as they are now; ``flat``: as if compiled code updated them."""
    groups = bindings.opt.param_groups
    named = [(group, p) for group, each in enumerate(groups) for p in each["params"]]
    members = [BoundParam(f"p{i}", p, group, i, bindings.opt.state.get(p)) for i, (group, p) in enumerate(named)]
    for member in members:
        member.flat = flat
    bindings.take(members)


@pytest.fixture
def opt():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    opt = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], lr=0.1)
    for p in params:
        p.grad = torch.ones(3)
    opt.step()
    return opt


@pytest.fixture
def bindings(opt):
    found = Bindings(opt)
    assert found.stale(), "nothing was bound yet"
    bind(found)
    return found


def first(opt):
    return opt.param_groups[0]["params"][0]


def test_a_step_and_another_learning_rate_change_no_binding(opt, bindings):
    assert not bindings.stale()
    for group in opt.param_groups:
        group["lr"] *= 0.5
    opt.step()
    assert not bindings.stale() and bindings.replaced() == []


def renew_state(opt):
    opt.state[first(opt)]["exp_avg"] = torch.zeros(3)


def renew_parameter(opt):
    opt.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(3))


def move_parameter(opt):
    first(opt).data = torch.zeros(3)


@pytest.mark.parametrize("change", [renew_state, renew_parameter, move_parameter])
def test_what_was_replaced_or_moved_is_noticed_and_named(opt, bindings, change):
    change(opt)
    assert bindings.stale(copies=False)
    assert bindings.replaced() == ["p0"]
    bind(bindings)
    assert not bindings.stale() and bindings.replaced() == []


@pytest.mark.parametrize("flat", [False, True])
def test_where_a_state_lies_matters_to_copies_and_to_compiled_code_only(opt, bindings, flat):
    bind(bindings, flat)
    opt.state[first(opt)]["exp_avg"].data = torch.zeros(3)
    assert bindings.stale()
    assert bindings.stale(copies=False) == flat


@pytest.mark.parametrize("change", [{"weight_decay": 0.1}, {"amsgrad": True}, {"betas": (0.0, 0.9)}, {"lr": torch.tensor(0.1)}])
def test_what_decides_which_code_runs_is_noticed_and_other_numbers_are_not(opt, bindings, change):
    opt.param_groups[1].update(eps=1e-6, name="heads", notes=[1, 2])
    assert not bindings.stale()
    opt.param_groups[1].update(change)
    assert bindings.stale()


def test_more_parameters_and_fewer_are_noticed(opt, bindings):
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert bindings.stale() and bindings.replaced() == ["p2"]
    bind(bindings)
    del opt.param_groups[2]
    assert bindings.stale()
    bindings.invalidate()
    assert bindings.stale()


def test_another_class_may_keep_its_numbers_in_its_groups(opt):
    class Foreign(torch.optim.AdamW):
        pass

    foreign = Foreign(opt.param_groups[0]["params"])
    bindings = Bindings(foreign)
    bind(bindings)
    foreign.param_groups[0]["step"] = 3
    foreign.param_groups[0]["weight_decay"] = 0.0
    assert not bindings.stale()
