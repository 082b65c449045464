"""Steps that do not come the usual way: with arguments of their own, past the run, or only to set up state. Each is known for
what it is: counted once and checkpointed, or no step of the training."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fxckpt
from fxckpt.compat.optimizers import _has_hooks
from fxckpt.store.reader import candidates

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def made(cls=AdamW, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    return model, cls(model.parameters(), **{"lr": 0.1, **options})


def ours(opt, model, directory, **options):
    return fxckpt.compile_step(opt, directory, model=model, every=1, keep=20, update="native", **options)


def train(model, step, steps):
    for number in steps:
        model(torch.full((2, 4), 1.0 + number)).square().sum().backward()
        step()
        model.zero_grad()


def counts(opt):
    opt.ckpt.flush()
    found = opt.ckpt.statistics()
    return found["steps"], found["checkpoints_committed"], found["checkpoints_failed"]


class OfBase(AdamW):
    """Its step calls the step of its base, which has hooks too."""

    def step(self, closure=None):
        return super().step(closure)


WAYS = {
    "a bound method that was taken before": lambda opt: opt.step,
    "a partial of it": lambda opt: functools.partial(opt.step, None),
    "the step of the class": lambda opt: functools.partial(type(opt).step, opt),
    "the step that a scheduler wrapped": lambda opt: torch.optim.lr_scheduler.ConstantLR(opt, 1.0) and opt.step,
    "a compiled step": lambda opt: torch.compile(opt.step, backend="eager"),
}


@pytest.mark.parametrize("cls", [AdamW, OfBase])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_past_the_run_counts_once_and_is_in_a_checkpoint(way, cls, tmp_path):
    plain, stock = made(cls)
    train(plain, WAYS[way](stock), range(6))
    model, opt = made(cls)
    step = WAYS[way](opt)
    ours(opt, model, tmp_path)
    train(model, step, range(3))
    assert counts(opt) == (3, 3, 0)
    opt.ckpt.shutdown()
    model, opt = made(cls)
    step = WAYS[way](opt)
    ours(opt, model, tmp_path)
    assert fxckpt.load(optimizer=opt).step == 3
    train(model, step, range(3, 6))
    assert counts(opt) == (6, 3, 0)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    opt.ckpt.shutdown()


def test_steps_of_both_kinds_count_in_turns_and_have_the_bits_of_plain_pytorch(tmp_path):
    plain, stock = made()
    train(plain, stock.step, range(8))
    model, opt = made()
    before = opt.step
    ours(opt, model, tmp_path)
    for number in range(8):
        train(model, before if number % 3 else opt.step, [number])
    assert counts(opt) == (8, 8, 0)
    assert sorted(c.record.step for c in candidates(tmp_path)) == list(range(1, 9))
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    opt.ckpt.shutdown()


def test_the_usual_step_of_a_run_still_finds_no_hook(tmp_path):
    model, opt = made()
    ours(opt, model, tmp_path)
    assert not _has_hooks(opt)
    opt.register_step_pre_hook(lambda *_: None)
    assert _has_hooks(opt)
    train(model, opt.step, range(2))
    assert counts(opt) == (2, 2, 0)
    opt.ckpt.shutdown()


def test_hooks_of_the_user_are_called_once_whichever_way_the_step_comes(tmp_path):
    model, opt = made(OfBase)
    before, called = opt.step, []
    opt.register_step_pre_hook(lambda *_: called.append("before"))
    opt.register_step_post_hook(lambda *_: called.append("after"))
    train(*made(OfBase)[:1], lambda: None, [])
    plain = len(called)
    ours(opt, model, tmp_path)
    train(model, before, [0])
    assert plain == 0 and called == ["before", "before", "after", "after"]  # the base's step calls them, too, in PyTorch
    train(model, opt.step, [1])
    assert called[4:] == called[:4]
    assert counts(opt) == (2, 2, 0)
    opt.ckpt.shutdown()


def test_a_step_past_the_run_that_raises_is_no_step(tmp_path):
    class Raises(SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise ValueError("not now")
            return super().step(closure)

    model, opt = made(Raises)
    before = opt.step
    ours(opt, model, tmp_path)
    train(model, before, [0])
    opt.fails = True
    with pytest.raises(ValueError, match="not now"):
        train(model, before, [1])
    with pytest.raises(fxckpt.SetupError, match="left by an exception"):
        opt.ckpt.save("half")
    opt.fails = False
    train(model, before, [2])
    assert counts(opt)[0] == 2
    opt.ckpt.shutdown()


def test_of_several_optimizers_a_step_past_the_run_of_one_is_one_of_it(tmp_path):
    models, opts = zip(*(made(SGD, momentum=0.9) for _ in range(2)))
    before = [opt.step for opt in opts]
    fxckpt.compile_step(list(opts), tmp_path, model=nn.ModuleList(models), every=1, update="native")
    for number in range(3):
        for model, step in zip(models, before):
            train(model, step, [number])
    assert counts(opts[0]) == (3, 3, 0)
    opts[0].ckpt.shutdown()


def test_steps_past_a_run_that_was_shut_down_train_on(tmp_path):
    model, opt = made()
    before = opt.step
    ours(opt, model, tmp_path).ckpt.shutdown()
    train(model, before, range(2))
    assert opt.ckpt.statistics()["steps"] == 0


def test_copies_of_an_optimizer_belong_to_no_run(tmp_path):
    model, opt = made()
    ours(opt, model, tmp_path)
    train(model, opt.step, [0])
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert type(copied) is AdamW
        copied.step()
    assert counts(opt) == (1, 1, 0)
    opt.ckpt.shutdown()


def test_a_deep_copy_of_model_and_optimizer_together_can_have_a_run_of_its_own(tmp_path):
    model, opt = made()
    ours(opt, model, tmp_path / "a")
    train(model, opt.step, range(2))
    other, copied = copy.deepcopy((model, opt))
    ours(copied, other, tmp_path / "b")
    train(other, copied.step, range(2, 4))
    train(model, opt.step, range(2, 4))
    assert counts(opt)[0] == 4 and counts(copied)[0] == 2
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    opt.ckpt.shutdown()
    copied.ckpt.shutdown()


def test_compiling_the_step_of_a_run_is_as_good_as_calling_it(tmp_path):
    model, opt = made()
    ours(opt, model, tmp_path)
    train(model, torch.compile(opt.step, backend="eager"), range(3))
    assert counts(opt) == (3, 3, 0)
    opt.ckpt.shutdown()


# -- with arguments ----------------------------------------------------------------------------------------------------------


class Scaled(SGD):
    """As apex's and Adafactor-like classes have it."""

    def step(self, closure=None, *, scale=1.0):
        for group in self.param_groups:
            group["lr"] = 0.1 * scale
        return super().step(closure)


class OfLoss(SGD):
    def step(self, loss):
        for group in self.param_groups:
            group["lr"] = 0.01 / (1 + float(loss))
        super().step()


class Anything(SGD):
    def step(self, *args, **kwargs):
        for group in self.param_groups:
            group["lr"] = sum(args) + sum(kwargs.values())
        return super().step()


ARGUMENTS = [
    (Scaled, (), {"scale": 0.5}), (Scaled, (None,), {"scale": 0.5}), (Scaled, (), {}), (Scaled, (), {"closure": None}),
    (OfLoss, (torch.tensor(2.0),), {}), (OfLoss, (), {"loss": 2.0}), (Anything, (0.1, 0.2), {"more": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "args", "kwargs"), ARGUMENTS)
def test_arguments_of_a_step_reach_the_class(cls, args, kwargs, tmp_path):
    plain, stock = made(cls, momentum=0.9)
    train(plain, lambda: stock.step(*args, **kwargs), range(6))
    for until in (3, 6):
        model, opt = made(cls, momentum=0.9)
        ours(opt, model, tmp_path)
        start = fxckpt.load(optimizer=opt).step
        train(model, lambda opt=opt: opt.step(*args, **kwargs), range(start, until))
        assert counts(opt)[:2] == (until, 3)
        opt.ckpt.shutdown()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_a_closure_beside_other_arguments_is_called(tmp_path):
    model, opt = made(Scaled)
    ours(opt, model, tmp_path)

    def closure():
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    assert opt.step(closure, scale=0.5).requires_grad and opt.step(closure=closure) is not None
    assert counts(opt) == (2, 2, 0)
    opt.ckpt.shutdown()


def test_a_step_without_a_required_argument_raises_what_the_class_raises(tmp_path):
    model, opt = made(OfLoss)
    ours(opt, model, tmp_path)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'loss'"):
        train(model, opt.step, [0])
    opt.ckpt.shutdown()


@pytest.mark.parametrize("cls", [SGD, Scaled, OfLoss, Anything])
def test_a_step_shows_the_parameters_of_its_class(cls, tmp_path):
    model, opt = made(cls)
    stock = inspect.signature(opt.step)
    ours(opt, model, tmp_path)
    assert inspect.signature(opt.step) == stock
    opt.ckpt.shutdown()


def test_a_scaler_gives_itself_to_a_step_that_asks_for_it(tmp_path):
    class Aware(SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._step_supports_amp_scaling = True

        def step(self, closure=None, grad_scaler=None):
            assert isinstance(grad_scaler, torch.amp.GradScaler)

    model, opt = made(Aware)
    ours(opt, model, tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    with pytest.warns(FutureWarning):
        scaler.step(opt)
    assert counts(opt) == (1, 1, 0)
    opt.ckpt.shutdown()


# -- that set up state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9}), (SGD, {}), (AdamW, {"fused": True})])
def test_what_dcp_does_to_have_state_is_no_step(cls, options, tmp_path):
    plain, stock = made(cls, **options)
    get_state_dict(plain, stock)
    train(plain, stock.step, range(3))
    given = get_state_dict(plain, stock)
    set_state_dict(plain, stock, model_state_dict=given[0], optim_state_dict=given[1])
    train(plain, stock.step, range(3, 6))
    model, opt = made(cls, **options)
    ours(opt, model, tmp_path)
    get_state_dict(model, opt)
    assert counts(opt) == (0, 0, 0)
    train(model, opt.step, range(3))
    given = get_state_dict(model, opt)
    set_state_dict(model, opt, model_state_dict=given[0], optim_state_dict=given[1])
    train(model, opt.step, range(3, 6))
    assert counts(opt)[0] == 6
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    opt.ckpt.shutdown()


def test_a_first_step_of_a_warm_up_from_zero_is_a_step(tmp_path):
    model, opt = made(lr=0.0)
    ours(opt, model, tmp_path)
    train(model, opt.step, range(2))
    assert counts(opt) == (2, 2, 0)
    opt.ckpt.shutdown()


# -- groups ------------------------------------------------------------------------------------------------------------------


def test_a_parameter_in_two_groups_is_named_with_them(tmp_path):
    model, opt = made()
    opt.param_groups.append(dict(opt.param_groups[0]))
    with pytest.raises(fxckpt.SetupError, match="'weight' is in groups 0 and 1 of the AdamW"):
        ours(opt, model, tmp_path)
    opt.param_groups.pop()
    ours(opt, model, tmp_path)
    train(model, opt.step, [0])
    opt.ckpt.flush()
    opt.param_groups[0]["params"].append(model.bias)
    for ask in (opt.step, opt.ckpt.save):
        with pytest.raises(fxckpt.SetupError, match="'bias' is in group 0 twice"):
            ask()
    opt.param_groups[0]["params"].pop()
    train(model, opt.step, [1])
    opt.ckpt.shutdown()
