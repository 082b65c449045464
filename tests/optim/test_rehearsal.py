"""Optimizers that are not of ``torch.optim``: split where that is proven to change nothing, whole otherwise."""

from __future__ import annotations

import copy
import math
import random
import threading

import pytest
import torch
from digests import differences, stored
from torch import nn

import fxckpt
from fxckpt.optim.rehearsal.proofs import PROOFS
from fxckpt.optim.rehearsal.step import RehearsedStep
from fxckpt.store.reader import candidates

LR = 0.05


class Own(torch.optim.Optimizer):
    """What the optimizers here have in common: ``update(p, group, state)`` of each parameter with a gradient."""

    def __init__(self, params, lr=LR, **options):
        super().__init__(params, {"lr": lr, "beta": 0.9, "weight_decay": 0.01, **options})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group, self.state[p])
        return loss

    def begin(self, group):
        pass


class Lion(Own):
    """Tensors are its only state; it writes through ``.data``."""

    def update(self, p, group, state):
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        p.data.mul_(1 - group["lr"] * group["weight_decay"])
        direction = state["exp_avg"].clone().mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"]).sign_()
        p.add_(direction, alpha=-group["lr"])
        state["exp_avg"].lerp_(p.grad, 1 - 0.99)


class SignSGD(Own):
    """Changes the gradient itself."""

    def update(self, p, group, state):
        if "momentum" not in state:
            state["momentum"] = torch.clone(p.grad)
        p.grad.add_(p, alpha=group["weight_decay"])
        state["momentum"].mul_(group["beta"]).add_(p.grad)
        p.sub_(state["momentum"].sign(), alpha=group["lr"])


class Stateless(Own):
    def update(self, p, group, state):
        p.add_(p.grad.sign(), alpha=-group["lr"])


class IntInState(Own):
    """Adam as many write it: an int in the state, ``math.sqrt``, a branch on the count."""

    def update(self, p, group, state):
        if not state:
            state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["step"] += 1
        state["m"].mul_(0.9).add_(p.grad, alpha=0.1)
        state["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
        size = group["lr"] * math.sqrt(1 - 0.999 ** state["step"]) / (1 - 0.9 ** state["step"])
        if state["step"] > 5:
            p.addcdiv_(state["m"], state["v"].sqrt().add_(1e-8), value=-size)
        else:
            p.add_(state["m"], alpha=-size)


class StepInGroup(Own):
    """The count is the group's, with a cache of numbers beside it; the learning rate warms up."""

    def begin(self, group):
        group["step"] = group.get("step", 0) + 1
        group["seen"] = [*group.get("seen", []), group["lr"]][-3:]

    def update(self, p, group, state):
        if not state:
            state["m"] = torch.zeros_like(p)
        state["m"].mul_(0.9).add_(p.grad, alpha=1 / (1 - 0.9 ** group["step"]))
        p.add_(state["m"], alpha=-group["lr"] * min(1.0, group["step"] / 4))


class TensorCount(Own):
    """A 0-dimensional tensor counts, as in torch.optim, and takes part in tensor arithmetic."""

    def update(self, p, group, state):
        if not state:
            state.update(step=torch.zeros(()), m=torch.zeros_like(p))
        state["step"] += 1
        state["m"].lerp_(p.grad, 0.1)
        p.sub_(state["m"] / (1 - 0.9 ** state["step"]), alpha=group["lr"])


class Foreach(Own):
    """List kernels over all parameters of a group."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self.state[p].setdefault("m", torch.zeros_like(p))
            states = [self.state[p]["m"] for p in params]
            torch._foreach_mul_(states, group["beta"])
            torch._foreach_add_(states, [p.grad for p in params])
            torch._foreach_add_(params, torch._foreach_sign(states), alpha=-group["lr"])


class PerShape(Own):
    """Looks at shapes, and normalizes by rows."""

    def update(self, p, group, state):
        if not state:
            state["rows"] = torch.zeros(p.shape[:1])
        state["rows"].mul_(0.9).add_(p.grad.flatten(1).square().mean(dim=1) if p.dim() > 1 else p.grad.square())
        shape = (-1, *[1] * (p.dim() - 1))
        p.sub_(p.grad / (state["rows"].view(shape).sqrt() + 1e-8), alpha=group["lr"] / p.numel())


class TrustRatio(Own):
    """A norm of its own parameter, which no branch looks at: as LAMB and LARS scale."""

    def update(self, p, group, state):
        if not state:
            state["m"] = torch.zeros_like(p)
        state["m"].mul_(0.9).add_(p.grad)
        p.sub_(state["m"] * torch.where(p.norm() > 0, p.norm() / (state["m"].norm() + 1e-6), 1.0), alpha=group["lr"])


class Derived(torch.optim.AdamW):
    """The class of PyTorch's name with another update."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.clamp_(-0.5, 0.5)
        return loss


torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # from then on AdamW.step has PyTorch's hooks, which Derived's calls


SPLIT = [Lion, SignSGD, Stateless, IntInState, StepInGroup, TensorCount, Foreach, PerShape, TrustRatio, Derived]


# ---- those that must run whole ----


class GlobalNorm(Own):
    def update(self, p, group, state):
        p.sub_(p.grad / sum(q.grad.norm() for q in group["params"] if q.grad is not None), alpha=group["lr"])


class StackedNorms(Own):
    """Three numbers in one tensor: with one parameter it would look like that one's own."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        scale = 1 / torch.stack(torch._foreach_norm([p.grad for p in params])).norm()
        for p in params:
            p.sub_(p.grad * scale, alpha=LR)


class Noise(Own):
    def update(self, p, group, state):
        p.sub_(p.grad + 0.01 * torch.randn_like(p), alpha=group["lr"])


class PythonNoise(Own):
    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] * random.random())


class ImportedNoise(Own):
    """Draws in a helper, by a module that it imports there."""

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] * self.draw())

    @staticmethod
    def draw():
        import random as hidden

        return hidden.random()


GLOBAL_STEPS = 0


class Global(Own):
    def begin(self, group):
        global GLOBAL_STEPS  # noqa: PLW0603
        GLOBAL_STEPS += 1

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"])


class ClassAttribute(Own):
    steps = 0

    def begin(self, group):
        ClassAttribute.steps += 1

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] / (1 + ClassAttribute.steps % 2))


class Branch(Own):
    def update(self, p, group, state):
        if p.grad.abs().max() > 1:
            p.sub_(p.grad.sign(), alpha=group["lr"])
        else:
            p.sub_(p.grad, alpha=group["lr"])


class OwnAttribute(Own):
    steps = 0

    def begin(self, group):
        self.steps += 1

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] / self.steps)


class NestedAttribute(Own):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.seen = {"steps": [0]}

    def begin(self, group):
        self.seen["steps"][0] += 1

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] / self.seen["steps"][0])


class Helper:
    steps = 0


class ForeignObject(Own):
    """What it counts in is no attribute of its own, and no copy."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.helper = Helper()

    def begin(self, group):
        self.helper.steps += 1

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] / self.helper.steps)


class OwnTensor(Own):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.scale = torch.ones(())

    def begin(self, group):
        self.scale.mul_(0.9)

    def update(self, p, group, state):
        p.sub_(p.grad * self.scale, alpha=group["lr"])


MODULE_STEPS = [0]


class ModuleGlobal(Own):
    def begin(self, group):
        MODULE_STEPS[0] += 1

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"])


class CountsParameters(Own):
    def update(self, p, group, state):
        group["updates"] = group.get("updates", 0) + 1
        p.sub_(p.grad, alpha=group["lr"] / group["updates"])


class ByNumber(Own):
    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] / len(group["params"]))


class First(Own):
    """Treats one parameter apart from others that look alike."""

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if p is group["params"][0] else 1.0))


class ByIdentity(Own):
    """Knows its parameters by identity, which no stand-in has."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.special = {id(self.param_groups[0]["params"][0])}

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if id(p) in self.special else 1.0))


SPECIAL = set()


class ByHiddenIdentity(Own):
    """Where it knows them from is nowhere to be seen; only the bits tell."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        SPECIAL.add(id(self.param_groups[0]["params"][0]))

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"] * (2.0 if id(p) in SPECIAL else 1.0))


class SharedState(Own):
    def update(self, p, group, state):
        if not state:
            state["m"] = state["same"] = torch.zeros_like(p)
        state["m"].add_(p.grad)
        p.sub_(state["same"], alpha=group["lr"])


class ValueIntoCount(Own):
    def update(self, p, group, state):
        if not state:
            state["norm"] = torch.zeros((), dtype=torch.float64)
        state["norm"].copy_(p.grad.norm())
        p.sub_(p.grad, alpha=group["lr"])


class ReplacesState(Own):
    def update(self, p, group, state):
        state["m"] = state.get("m", torch.zeros_like(p)) * 0.9 + p.grad
        p.sub_(state["m"], alpha=group["lr"])


class ListInState(Own):
    def update(self, p, group, state):
        state.setdefault("history", []).append(group["lr"])
        p.sub_(p.grad, alpha=state["history"][-1])


class OtherData(Own):
    def update(self, p, group, state):
        p.data = p.data - group["lr"] * p.grad


COMPILED = []


@torch.compile(backend=lambda gm, inputs: COMPILED.append(gm) or gm.forward, fullgraph=True)
def compiled_update(p, grad, lr):
    p.sub_(grad.sign() * lr)


class Compiled(Own):
    def update(self, p, group, state):
        compiled_update(p, p.grad, torch.tensor(group["lr"]))


class ReturnsNumber(Own):
    def step(self, closure=None):
        super().step(closure)
        return 1.0

    def update(self, p, group, state):
        p.sub_(p.grad, alpha=group["lr"])


WHOLE = {
    GlobalNorm: "another one",
    StackedNorms: "another one",
    Noise: "random",
    PythonNoise: "random",
    ImportedNoise: "random",
    Global: "GLOBAL_STEPS",
    ClassAttribute: "'steps'",
    Branch: "branches on the values",
    OwnAttribute: "attribute 'steps'",
    NestedAttribute: "attribute 'seen'",
    ForeignObject: "Helper in its attribute",
    OwnTensor: "no parameter's",
    ModuleGlobal: "MODULE_STEPS",
    CountsParameters: "how many",
    ByNumber: "alike",
    First: "alike",
    ByIdentity: "identity",
    ByHiddenIdentity: "bits",
    SharedState: "same memory",
    ValueIntoCount: "depends on the values",
    ReplacesState: "replaces its state",
    ListInState: "is a list",
    OtherData: "other data",
    Compiled: "torch.compile",
    ReturnsNumber: "returns something else",
}


# ---- beside the stock class ----


def parameters():
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 2), (7,), (3, 4), (), (4, 4)]
    return [nn.Parameter(torch.randn(s, generator=g)) for s in shapes if s]


torch.optim.AdamW(parameters())  # from its first object on a class calls hooks, also from within the step of a derived one


def make(cls, **options):
    """Two groups with learning rates of their own."""
    params = parameters()
    return cls([{"params": params[:3]}, {"params": params[3:], "lr": LR / 2}], lr=LR, **options), params


def train(opt, params, first=0, last=9, missing=True):
    """Another learning rate at every step; two parameters have no gradient in some."""
    for step in range(first, last):
        for i, group in enumerate(opt.param_groups):
            group["lr"] = LR * 0.9**step / (1 + i)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            p.grad = None if missing and (step, i) in ((4, 1), (6, 4), (7, 4)) else g
        opt.step()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_same(mine, ours, theirs, stock):
    """Parameters, gradients, states and groups: all of it, to the bit."""
    assert same([p.detach() for p in ours], [p.detach() for p in stock])
    assert same([p.grad for p in ours], [p.grad for p in stock])
    assert same(mine.state_dict(), theirs.state_dict())


def stepper_of(opt):
    return opt.ckpt._run.steppers[0]


def pair(cls, steps=9, **options):
    """The same training through fxckpt and without; returns the stepped optimizer."""
    theirs, stock = make(cls, **options)
    train(theirs, stock, last=steps)
    mine, ours = make(cls, **options)
    fxckpt.compile_step(mine, writer="mock", every=2, update="native")
    train(mine, ours, last=steps)
    check_same(mine, ours, theirs, stock)
    assert mine.ckpt.statistics()["checkpoints_failed"] == 0
    return mine


@pytest.mark.parametrize("cls", SPLIT)
def test_what_is_proven_is_split_and_has_the_bits_of_its_own_step(cls, monkeypatch):
    whole = []
    inner = RehearsedStep._run_whole
    monkeypatch.setattr(RehearsedStep, "_run_whole", lambda self, closure: (whole.append(1), inner(self, closure))[1])
    mine, ours = make(cls)
    fxckpt.compile_step(mine, writer="mock", every=2, update="native")
    train(mine, ours, last=12)
    assert stepper_of(mine).whole is None
    assert stepper_of(mine).strategy.proofs.any()
    assert PROOFS <= len(whole) <= 1 + 4 * PROOFS, "it did not stop running whole"
    whole.clear()
    train(mine, ours, 12, 14)
    assert not whole
    theirs, stock = make(cls)
    train(theirs, stock, last=14)
    check_same(mine, ours, theirs, stock)


@pytest.mark.parametrize("cls", WHOLE)
def test_what_cannot_be_proven_runs_its_own_step_and_says_why_once(cls, caplog):
    def begin():
        global GLOBAL_STEPS  # noqa: PLW0603
        random.seed(1)
        torch.manual_seed(1)
        MODULE_STEPS[0] = GLOBAL_STEPS = ClassAttribute.steps = 0

    def end():
        return MODULE_STEPS[0], GLOBAL_STEPS, ClassAttribute.steps, random.random(), torch.rand(())

    begin()
    theirs, stock = make(cls)
    train(theirs, stock, last=6)
    left = end()
    begin()
    mine, ours = make(cls)
    with caplog.at_level("INFO", logger="fxckpt"):
        fxckpt.compile_step(mine, writer="mock", every=2, update="native")
        train(mine, ours, last=6)
    check_same(mine, ours, theirs, stock)
    assert end() == left, "a rehearsal left something behind"
    assert WHOLE[cls] in stepper_of(mine).whole
    said = [r.getMessage() for r in caplog.records if "its own step, whole" in r.getMessage()]
    assert len(said) == 1
    assert WHOLE[cls] in said[0]
    assert mine.ckpt.statistics()["checkpoints_started"] == 3


def test_what_the_optimizer_compiles_is_compiled():
    torch._dynamo.reset()
    COMPILED.clear()
    mine, ours = make(Compiled)
    fxckpt.compile_step(mine, writer="mock", every=2, update="native")
    train(mine, ours, last=2)
    assert COMPILED, "a rehearsal made Dynamo give the function up"


def test_a_branch_that_comes_late_is_compared_before_it_is_split():
    mine = pair(IntInState, 12)
    assert len({noted for noted, _ in stepper_of(mine).strategy.proofs.done}) == 2
    assert stepper_of(mine).whole is None


def test_what_goes_wrong_late_runs_whole_from_there_on():
    class Late(IntInState):
        def update(self, p, group, state):
            super().update(p, group, state)
            if state["step"] > 6 and p.sum() > 0:
                p.zero_()

    assert "branches" in stepper_of(pair(Late)).whole


def test_shapes_are_seen_and_then_every_shape_has_its_program():
    assert stepper_of(pair(PerShape)).strategy.partition.by_shape
    assert not stepper_of(pair(Lion)).strategy.partition.by_shape


@pytest.mark.parametrize("cls", [Lion, StepInGroup, Derived])
def test_a_closure_is_called_once_and_its_loss_returned(cls):
    def run(wrap):
        opt, params = make(cls)
        wrap(opt)
        losses, calls = [], []
        for step in range(6):

            def closure(step=step):
                calls.append(torch.is_grad_enabled())
                opt.zero_grad()
                loss = sum(((p - step) ** 2).sum() for p in params)
                loss.backward()
                return loss

            losses.append(opt.step(closure).item())
        return opt, params, losses, calls

    mine, ours, losses, calls = run(lambda opt: fxckpt.compile_step(opt, writer="mock", every=2, update="native"))
    theirs, stock, expected, _ = run(lambda opt: None)
    assert (losses, calls) == (expected, [True] * 6)
    check_same(mine, ours, theirs, stock)
    assert stepper_of(mine).strategy.proofs.any()


def test_a_closure_that_is_called_twice_is_left_to_the_optimizer():
    class Twice(Stateless):
        def step(self, closure=None):
            closure()
            super().step()
            return closure()

    opt, params = make(Twice)
    fxckpt.compile_step(opt, writer="mock", every=2, update="native")
    calls = []

    def closure():
        calls.append(1)
        for p in params:
            p.grad = torch.ones_like(p)
        return torch.zeros(())

    for _ in range(3):
        opt.step(closure)
    assert len(calls) == 6
    assert "closure" in stepper_of(opt).whole


def test_hooks_fire_once_and_inner_ones_make_it_run_whole():
    for cls, whole in ((Lion, False), (Derived, True)):
        mine, ours = make(cls)
        fired = []
        mine.register_step_post_hook(lambda *_, fired=fired: fired.append(1))
        fxckpt.compile_step(mine, writer="mock", every=2, update="native")
        train(mine, ours, last=5)
        theirs, stock = make(cls)
        counted = []
        theirs.register_step_post_hook(lambda *_, counted=counted: counted.append(1))
        train(theirs, stock, last=5)
        assert len(fired) == len(counted) == (10 if whole else 5)
        assert (stepper_of(mine).whole is not None) == whole
        check_same(mine, ours, theirs, stock)


def test_lists_in_groups_stay_the_same_objects():
    class Cache(Lion):
        def begin(self, group):
            group["cache"].append(group["lr"])

    def run(wrap):
        opt, params = make(Cache, cache=[])
        wrap(opt)
        train(opt, params)
        return opt, params

    mine, ours = run(lambda opt: fxckpt.compile_step(opt, writer="mock", every=2, update="native"))
    theirs, stock = run(lambda opt: None)
    check_same(mine, ours, theirs, stock)
    assert stepper_of(mine).whole is None
    assert mine.param_groups[0]["cache"] is mine.param_groups[1]["cache"] is mine.defaults["cache"]
    assert len(mine.defaults["cache"]) == 2 * 9


def test_other_threads_may_draw_numbers_and_set_globals_meanwhile():
    """What a rehearsal looks after is told from its code, so that nobody else's work is taken for its own, or undone."""
    stop, drawn = threading.Event(), []

    def work():
        global GLOBAL_STEPS  # noqa: PLW0603
        while not stop.is_set():
            GLOBAL_STEPS += 1
            drawn.append((random.random(), GLOBAL_STEPS))

    random.seed(5)
    first = GLOBAL_STEPS
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert stepper_of(pair(IntInState)).whole is None
    finally:
        stop.set()
        thread.join()
    random.seed(5)
    assert drawn == [(random.random(), first + 1 + i) for i in range(len(drawn))]


def test_other_numbers_make_no_new_program():
    mine, ours = make(IntInState)
    fxckpt.compile_step(mine, writer="mock", every=2, update="native")
    scheduler = torch.optim.lr_scheduler.OneCycleLR(mine, 0.1, 30, cycle_momentum=False)
    for step in range(30):
        for p in ours:
            p.grad = torch.full_like(p, 1 / (1 + step))
        mine.step()
        scheduler.step()
        if step == 10:
            known = dict(stepper_of(mine).strategy.casting.programs)
    assert stepper_of(mine).strategy.casting.programs == known
    assert stepper_of(mine).whole is None


@pytest.mark.parametrize(
    ("cls", "at"), [(Lion, 5), (IntInState, 1), (IntInState, 6), (StepInGroup, 8), (TensorCount, 5), (PerShape, 7)]
)
def test_a_resumed_run_has_the_same_bits(cls, at, tmp_path):
    theirs, stock = make(cls)
    train(theirs, stock)
    mine, ours = make(cls)
    fxckpt.compile_step(mine, tmp_path, every=1, keep=20, update="native")
    train(mine, ours, last=at)
    mine.ckpt.shutdown()
    again, resumed = make(cls)
    fxckpt.compile_step(again, tmp_path, every=1, keep=20, update="native")
    assert fxckpt.load(optimizer=again).step == at
    train(again, resumed, first=at)
    check_same(again, resumed, theirs, stock)
    again.ckpt.shutdown()


def test_every_checkpoint_holds_the_state_of_its_step(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    opt = TensorCount(model.parameters())
    fxckpt.compile_step(opt, tmp_path, model=model, every=1, keep=20, update="native")
    after = {}
    for step in range(8):
        model(torch.full((2, 4), 1.0 + step)).square().sum().backward()
        opt.step()
        after[step + 1] = {n: p.detach().clone() for n, p in model.named_parameters()} | {
            f"{k}/{n}": t.clone() for n, p in model.named_parameters() for k, t in opt.state[p].items()
        }
        opt.zero_grad()
    opt.ckpt.shutdown()
    found = candidates(tmp_path)
    assert sorted(c.record.step for c in found) == list(range(1, 9))
    for each in found:
        assert differences(stored(each.path), after[each.record.step]) == []


def test_inductor_is_refused_once_and_bits_stay_native(caplog):
    theirs, stock = make(Lion)
    train(theirs, stock)
    mine, ours = make(Lion)
    with caplog.at_level("WARNING", logger="fxckpt"):
        fxckpt.compile_step(mine, writer="mock", every=2, update="inductor")
        train(mine, ours)
    check_same(mine, ours, theirs, stock)
    assert len([r for r in caplog.records if "only classes of torch.optim are compiled" in r.getMessage()]) == 1


def test_added_groups_join_and_keep_the_bits():
    def run(wrap):
        opt, params = make(StepInGroup)
        wrap(opt)
        train(opt, params, last=5)
        more = [nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3))]
        opt.add_param_group({"params": more})
        train(opt, params + more, 5, 10)
        return opt, params + more

    mine, ours = run(lambda opt: fxckpt.compile_step(opt, writer="mock", every=2, update="native"))
    theirs, stock = run(lambda opt: None)
    check_same(mine, ours, theirs, stock)
    assert stepper_of(mine).whole is None


def test_a_step_that_raises_raises_what_the_optimizer_raises():
    class Untrained(Lion):
        def begin(self, group):
            if not group.get("ready"):
                raise ValueError("call train() first")

    mine, ours = make(Untrained)
    fxckpt.compile_step(mine, writer="mock", every=2, update="native")
    with pytest.raises(ValueError, match="call train"):
        train(mine, ours, last=1)
    before = copy.deepcopy([p.detach() for p in ours])
    for group in mine.param_groups:
        group["ready"] = True
    train(mine, ours, last=1)
    assert not same(before, [p.detach() for p in ours])


def test_state_that_belongs_to_no_parameter_makes_its_step_run_whole():
    class Global(Stateless):
        def begin(self, group):
            self.state["k"] = self.state.get("k", 0) + 1

    mine, ours = make(Global)
    fxckpt.compile_step(mine, writer="mock", every=2, update="native")
    train(mine, ours)
    assert mine.ckpt._run.steppers[0].whole
    assert mine.state["k"] == 2 * 9
