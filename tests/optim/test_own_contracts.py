"""Optimizers with state of their own, in attributes, in optimizers that they hold, in their own state dicts: a resumed run has
the bits of one that was not interrupted, or the reason why not is said before training."""

from __future__ import annotations

import collections
import enum
import itertools
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from digests import snapshot
from torch import nn

import fxckpt

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


class Life:
    """One process of a training, in this one: everything is made anew, loaded, and trained up to a step."""

    def __init__(self, make, directory=None, until=0, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.opt, self.start = make(list(self.model.parameters())), 0
        if directory is not None:
            fxckpt.compile_step(self.opt, directory, model=self.model, every=1, update="native", **options)
            self.start = fxckpt.load(optimizer=self.opt).step
        self.losses = {step: self.step(step) for step in range(self.start, until)}
        if directory is not None:
            self.opt.ckpt.shutdown()

    def step(self, number):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(number))

        losses = []

        def closure():
            self.opt.zero_grad()
            loss = (self.model(x) - 1).square().mean()
            loss.backward()
            losses.append(loss.item())
            return loss

        if getattr(self.opt, "wants_closure", False):
            self.opt.step(closure)
        else:
            closure()
            self.opt.step()
        return losses


def resumes(make, tmp_path, kill=5, until=11, **options):
    """Plain PyTorch, a whole run and one that was resumed at ``kill``: the same losses and bits. Returns the resumed one."""
    plain, whole = Life(make, until=until), Life(make, tmp_path / "whole", until, **options)
    assert plain.losses == whole.losses
    first, second = Life(make, tmp_path / "killed", kill, **options), Life(make, tmp_path / "killed", until, **options)
    assert second.start == kill and len(first.losses) == kill
    assert second.losses == {step: loss for step, loss in plain.losses.items() if step >= kill}
    for a, b in zip(plain.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
    mine, theirs = snapshot(second.model, second.opt), snapshot(whole.model, whole.opt)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    return second


# -- attributes --------------------------------------------------------------------------------------------------------------


class Mode(enum.Enum):
    WARM = 1
    HOT = 2


class Counting(SGD):
    """The factor of each step is whatever ``factor`` makes of what it keeps."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        self.begin()

    def begin(self):
        self.calls = 0

    def factor(self):
        self.calls += 1
        return min(1.0, self.calls / 8)

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1 * self.factor()
        return super().step(closure)


class InTuple(Counting):
    def begin(self):
        self.calls = ("calls", 0, None)

    def factor(self):
        self.calls = ("calls", self.calls[1] + 1, True)
        return self.calls[1] / 20


class InDict(Counting):
    def begin(self):
        self.history, self.alias = {"factors": [], 7: {}}, None

    def factor(self):
        self.history["factors"].append(len(self.history["factors"]) / 30)
        self.alias = self.history[7]
        self.alias["last"] = sum(self.history["factors"])
        return self.history[7]["last"]


class InObject(Counting):
    def begin(self):
        self.config = SimpleNamespace(inner=SimpleNamespace(count=0), name="x", made=lambda: 3)

    def factor(self):
        self.config.inner.count += 1
        return self.config.inner.count / 10


class InTensor(Counting):
    def begin(self):
        self.scale = torch.zeros(())
        self.seen = [self.scale, torch.zeros(3)]  # the same tensor

    def factor(self):
        self.seen[0] += 0.05
        self.seen[1] += 1
        return self.scale.item() + self.seen[1].sum().item() / 100


class InDeque(Counting):
    def begin(self):
        self.last, self.mode, self.numbers = collections.deque(maxlen=3), Mode.WARM, np.zeros(2)

    def factor(self):
        self.last.append(len(self.last) + (sum(self.last) if self.last else 0))
        self.mode = Mode.HOT if self.last[-1] > 4 else Mode.WARM
        self.numbers = self.numbers + 1
        return (self.last[-1] % 7 + (self.mode is Mode.HOT) + self.numbers[0]) / 20


class InGenerator(Counting):
    def begin(self):
        self.torch, self.numpy, self.python = torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3)

    def factor(self):
        drawn = torch.rand((), generator=self.torch).item() + self.numpy.random() + self.python.random()
        return drawn / 3


class InScheduler(Counting):
    def begin(self):
        self.own = torch.optim.lr_scheduler.LambdaLR(SGD([nn.Parameter(torch.ones(1))], lr=1.0), lambda step: (step % 5) / 5)

    def factor(self):
        self.own.optimizer.step()
        self.own.step()
        return self.own.get_last_lr()[0]


class MadeLater(Counting):
    def begin(self):
        pass

    def factor(self):
        self.calls = getattr(self, "calls", [torch.zeros(1)])
        self.calls[0] += 1
        return self.calls[0].item() / 10


class ByIdentity(Counting):
    def begin(self):
        self.counts = {id(p): 0 for group in self.param_groups for p in group["params"]}
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def factor(self):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    self.counts[id(p)] += 1
                    self.slow[p].lerp_(p, 0.5)
                    if self.counts[id(p)] % 3 == 0:
                        p.copy_(self.slow[p])
        return 1.0


class InState(Counting):
    def begin(self):
        pass

    def factor(self):
        self.state["k"] = self.state.get("k", 0) + 1
        return self.state["k"] / 10


class SlowWeights(AdamW):
    """A list of slow weights, interpolated every third step."""

    def __init__(self, params):
        super().__init__(params, lr=0.05)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.count = 0

    def step(self, closure=None):
        loss, self.count = super().step(closure), self.count + 1
        for p, slow in zip((p for group in self.param_groups for p in group["params"]), self.slow):
            if self.count % 3 == 0:
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)
        return loss


class SharedState(torch.optim.Optimizer):
    """One buffer, which stands in the state of all parameters of a shape."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        by_shape = {}
        for p in (p for group in self.param_groups for p in group["params"]):
            if "shared" not in self.state[p]:
                self.state[p]["shared"] = by_shape.setdefault(p.dim(), torch.zeros(2))
            self.state[p]["shared"] += p.grad.norm()
            p.add_(p.grad, alpha=-0.1 / self.state[p]["shared"][0].item())


ATTRIBUTES = [
    Counting, InTuple, InDict, InObject, InTensor, InDeque, InGenerator, InScheduler, MadeLater, ByIdentity, InState, SlowWeights,
    SharedState,
]  # fmt: skip


@pytest.mark.parametrize("make", ATTRIBUTES, ids=lambda c: c.__name__)
def test_what_an_optimizer_keeps_in_attributes_comes_back(make, tmp_path):
    resumes(make, tmp_path)


def test_an_attribute_of_the_user_on_a_class_of_torch_comes_back(tmp_path):
    def make(params):
        opt = SGD(params, lr=0.1)
        opt.seen = 0
        opt.register_step_pre_hook(count)
        return opt

    def count(opt, *_):
        opt.seen += 1
        opt.param_groups[0]["lr"] = 0.1 * opt.seen / 10

    assert resumes(make, tmp_path).opt.seen == 11


def test_a_second_load_takes_back_what_was_made_since(tmp_path):
    life = Life(MadeLater, tmp_path / "c", 0)
    model, opt = life.model, MadeLater(list(life.model.parameters()))
    fxckpt.compile_step(opt, tmp_path / "d", model=model, every=1)
    opt.ckpt.save("before")
    life.opt = opt
    life.step(0)
    assert hasattr(opt, "calls")
    fxckpt.load(optimizer=opt, name="before")
    assert not hasattr(opt, "calls")
    opt.ckpt.shutdown()


def test_tensors_in_attributes_stay_the_tensors_that_others_hold(tmp_path):
    Life(SlowWeights, tmp_path / "c", 4)
    held = []

    def make(params):
        opt = SlowWeights(params)
        held.extend(opt.slow)
        return opt

    opt = Life(make, tmp_path / "c", 4).opt
    assert all(a is b for a, b in zip(held, opt.slow))


class Locked(Counting):
    def begin(self):
        self.calls, self.numbers = 0, itertools.count()


def test_what_cannot_be_stored_is_refused_by_name_at_compile_step(tmp_path):
    with pytest.raises(fxckpt.SetupError, match=r"Locked .* keeps a itertools.count in numbers: .*state_dict"):
        Life(Locked, tmp_path)


class Late(Counting):
    def factor(self):
        self.helper = SimpleNamespace(calls=1)
        return 1.0


def test_an_object_made_in_training_is_refused_by_name_at_the_first_checkpoint(tmp_path):
    with pytest.raises(fxckpt.SetupError, match=r"Late .* keeps a types.SimpleNamespace in helper, made in training"):
        Life(Late, tmp_path, 3)


def test_what_a_script_sets_before_it_loads_stays(tmp_path):
    Life(Counting, tmp_path, 3)
    model = Life(Counting).model
    opt = fxckpt.compile_step(Counting(list(model.parameters())), tmp_path, model=model)
    opt.label = "mine"
    assert fxckpt.load(optimizer=opt).step == 3
    assert opt.label == "mine" and opt.calls == 3
    opt.ckpt.shutdown()


def test_a_lock_or_a_function_in_an_attribute_is_nothing_to_store(tmp_path):
    class Fixed(Counting):
        def begin(self):
            super().begin()
            self.lock, self.function, self.kind, self.weak = threading.Lock(), lambda: 0, int, torch.float16

    resumes(Fixed, tmp_path)


# -- its own state_dict ------------------------------------------------------------------------------------------------------


class OwnDict(Locked):
    """Says itself what of it is state, and counts with what nobody else can store."""

    def factor(self):
        return min(1.0, next(self.numbers) / 8)

    def state_dict(self):
        self.reached = next(self.numbers)
        self.numbers = itertools.count(self.reached)
        return {**super().state_dict(), "reached": self.reached, "tensor": torch.full((2,), self.reached)}

    def load_state_dict(self, state_dict):
        state_dict = dict(state_dict)
        assert torch.equal(state_dict.pop("tensor"), torch.full((2,), state_dict["reached"]))
        self.numbers = itertools.count(state_dict.pop("reached"))
        super().load_state_dict(state_dict)


class OtherKeys(OwnDict):
    """Its state dict has no ``state`` and no ``param_groups``."""

    def state_dict(self):
        return {"all": super().state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["all"])


class Half(Counting):
    """PyTorch's own ``load_state_dict`` would give it a momentum of its parameters' type."""

    def step(self, closure=None):
        super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            buffer = self.state[p].setdefault("more", torch.zeros(p.shape, dtype=torch.float64))
            p.data.add_(buffer.add_(p.grad, alpha=1e-9).float(), alpha=-1e6)

    def state_dict(self):
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict):
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "calls"})
        self.calls = state_dict["calls"]
        self.state = collections.defaultdict(dict)  # whatever it does to it


class MakesHelper(Counting):
    """Makes an object at its first step; its contract says what of it is state."""

    def begin(self):
        self.helper = None

    def factor(self):
        self.helper = self.helper or SimpleNamespace(calls=0, lock=itertools.count())
        self.helper.calls += 1
        return self.helper.calls / 9

    def state_dict(self):
        return {**super().state_dict(), "calls": self.helper and self.helper.calls}

    def load_state_dict(self, state_dict):
        state_dict = dict(state_dict)
        self.helper = SimpleNamespace(calls=state_dict.pop("calls"), lock=itertools.count())
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("make", [OwnDict, OtherKeys, Half, MakesHelper], ids=lambda c: c.__name__)
def test_what_its_own_state_dict_would_keep_comes_back_through_its_own_load_state_dict(make, tmp_path):
    resumes(make, tmp_path)


def test_what_hooks_add_to_the_state_dict_comes_back_through_hooks(tmp_path):
    def make(params):
        opt, count = SGD(params, lr=0.1), [0]
        opt.register_state_dict_post_hook(lambda opt, found: {**found, "count": count[0]})

        def loaded(opt, given):
            count[0] = given.pop("count")

        def before(opt, *_):
            count[0] += 1
            opt.param_groups[0]["lr"] = count[0] / 50

        opt.register_load_state_dict_pre_hook(loaded)
        opt.register_step_pre_hook(before)
        return opt

    resumes(make, tmp_path)


def test_a_class_that_does_not_take_its_own_state_dict_is_named(tmp_path):
    class Broken(OwnDict):
        def load_state_dict(self, state_dict):
            raise KeyError("reached")

    Life(OwnDict, tmp_path, 3)
    Broken.__name__ = "OwnDict"
    with pytest.raises(fxckpt.LayoutMismatch, match=r"OwnDict.load_state_dict\(\) did not take .*KeyError"):
        Life(Broken, tmp_path)


def test_a_state_dict_that_cannot_be_stored_is_refused_by_name_at_compile_step(tmp_path):
    class Odd(Counting):
        def state_dict(self):
            return {**super().state_dict(), "function": print}

    with pytest.raises(fxckpt.SetupError, match=r"Odd .* keeps a builtin_function_or_method in state_dict\(\)\['function'\]"):
        Life(Odd, tmp_path)


# -- optimizers that hold others ---------------------------------------------------------------------------------------------


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware, as it is most often written."""

    wants_closure = True

    def __init__(self, params, base=SGD):
        super().__init__(params, {"rho": 0.05, "lr": 0.1, "momentum": 0.9})
        self.base_optimizer = base(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
            self.first_step()
            closure()
        self.second_step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class SharpOnLeftovers(Sharp):
    """Climbs along the gradients that its last step left."""

    def step(self, closure=None):
        if all(p.grad is not None for group in self.param_groups for p in group["params"]):
            self.first_step()
        else:
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p]["old"] = p.detach().clone()
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Never calls ``Optimizer.__init__``; the groups are the inner optimizer's."""

    def __init__(self, optimizer, k=3):
        self.optimizer, self.k = optimizer, k
        self.param_groups, self.state, self.fast_state = optimizer.param_groups, collections.defaultdict(dict), optimizer.state
        self.defaults, self.counts = optimizer.defaults, [0] * len(optimizer.param_groups)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        for i, group in enumerate(self.param_groups):
            self.counts[i] += 1
            for p in group["params"] if self.counts[i] % self.k == 0 else ():
                slow = self.state[p].setdefault("slow", p.detach().clone())
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)
        return loss


class Forwarded(torch.optim.Optimizer):
    """Groups and state are properties; it counts."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self, closure=None):
        self.calls += 1
        self.param_groups[0]["lr"] = 0.01 * self.calls
        return self.inner.step(closure)


class NoSubclass:
    """As schedulefree's wrapper: of no class of torch, but with all that an optimizer has."""

    def __init__(self, base):
        self.base, self.train_mode = base, 0

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self):
        self.base.zero_grad()

    def step(self, closure=None):
        self.train_mode += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            z = self.state[p].setdefault("z", p.detach().clone())
            z.lerp_(p.detach(), self.train_mode / 20)
            p.data.lerp_(z, 0.3)
        return self.base.step(closure)


class Several(torch.optim.Optimizer):
    """Hands its parameters out to two optimizers in a list."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.parts = [SGD(params[:2], lr=0.1, momentum=0.9), AdamW(params[2:], lr=0.1)]

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def lookahead(params):
    return Lookahead(AdamW(params, lr=0.05))


HOLDING = {
    "sharp": Sharp,
    "sharp on leftovers": SharpOnLeftovers,
    "sharp over own counts": lambda params: Sharp(
        params, type("B", (Counting,), {"__init__": lambda s, p, **_: Counting.__init__(s, p)})
    ),
    "lookahead": lookahead,
    "lookahead over a closure": lambda params: Lookahead(OwnDict(params)),
    "wrapped twice": lambda params: Lookahead(Lookahead(AdamW(params, lr=0.05), 2)),
    "forwarded": lambda params: Forwarded(AdamW(params, lr=0.05)),
    "several": Several,
    "of no class of torch": lambda params: NoSubclass(SGD(params, lr=0.1, momentum=0.9)),
}


@pytest.mark.parametrize("name", HOLDING)
def test_optimizers_that_an_optimizer_holds_resume_with_it(name, tmp_path):
    resumes(HOLDING[name], tmp_path)


def test_groups_and_states_that_two_optimizers_share_are_shared_after_a_load(tmp_path):
    opt = resumes(Sharp, tmp_path).opt
    assert opt.base_optimizer.param_groups is opt.param_groups
    opt = resumes(lookahead, tmp_path / "b").opt
    assert opt.fast_state is opt.optimizer.state and opt.param_groups is opt.optimizer.param_groups


@pytest.mark.parametrize("name", ["lookahead", "wrapped twice"])
def test_the_inner_optimizer_alone_is_refused_at_its_first_step_and_the_advice_is_right(name, tmp_path):
    life = Life(HOLDING[name])
    fxckpt.compile_step(life.opt.optimizer, tmp_path / "inner", model=life.model, every=1)
    with pytest.raises(fxckpt.SetupError, match=r"stepped by a Lookahead .* Call compile_step on the Lookahead"):
        life.step(0)
    life.opt.optimizer.ckpt.shutdown()
    resumes(HOLDING[name], tmp_path)  # as advised


def test_an_optimizer_whose_inner_one_has_a_run_is_refused(tmp_path):
    life = Life(lookahead)
    fxckpt.compile_step(life.opt.optimizer, tmp_path / "inner", model=life.model, every=1)
    with pytest.raises(fxckpt.SetupError, match=r"AdamW \(held by the Lookahead.* already belongs"):
        fxckpt.compile_step(life.opt, tmp_path / "outer", model=life.model)
    life.opt.optimizer.ckpt.shutdown()
    fxckpt.compile_step(life.opt, tmp_path / "outer", model=life.model).ckpt.shutdown()


def test_an_optimizer_that_trains_what_is_not_in_its_groups_is_refused(tmp_path):
    class Hidden(SGD):
        def __init__(self, params):
            super().__init__(params[:2], lr=0.1)
            self.other = SGD(params[2:], lr=0.1)

    with pytest.raises(fxckpt.SetupError, match="SGD in other, which trains parameters that are in no group"):
        Life(Hidden, tmp_path)


def test_the_halves_of_a_step_that_a_loop_calls_itself_are_a_step(tmp_path):
    def train(life, steps):
        for number in steps:
            x = torch.randn(4, 4, generator=torch.Generator().manual_seed(number))
            for half in (life.opt.first_step, life.opt.second_step):
                life.model(x).square().mean().backward()
                if hasattr(life.opt, "ckpt"):
                    life.opt.ckpt.flush()
                half()
                life.opt.zero_grad()

    plain, first = Life(Sharp), Life(Sharp)
    train(plain, range(9))
    fxckpt.compile_step(first.opt, tmp_path, model=first.model, every=1, update="native")
    train(first, range(4))
    first.opt.ckpt.shutdown()
    second = Life(Sharp)
    fxckpt.compile_step(second.opt, tmp_path, model=second.model, every=1, update="native")
    assert fxckpt.load(optimizer=second.opt).step == 4
    train(second, range(4, 9))
    assert second.opt.ckpt.statistics()["steps"] == 9
    second.opt.ckpt.shutdown()
    assert all(map(torch.equal, plain.model.parameters(), second.model.parameters()))
