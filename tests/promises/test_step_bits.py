"""Promise 2, the optimizer's half: with the kernels the user asked for, a step through the StepGraph has PyTorch's bits."""

from __future__ import annotations

import copy

import optimizer_cases as cases
import pytest
import torch
from torch import nn

import fxckpt
from fxckpt.graph.update import inductor

FORMS = {"default": {}, "single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CLASSES = {
    "SGD": (
        torch.optim.SGD,
        [
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"momentum": 0.9, "dampening": 0.3, "maximize": True},
            {},
        ],
    ),
    "Adam": (torch.optim.Adam, [{}, {"weight_decay": 0.1, "amsgrad": True}, {"maximize": True, "betas": (0.7, 0.9)}]),
    "AdamW": (torch.optim.AdamW, [{}, {"amsgrad": True, "eps": 1e-5}, {"weight_decay": 0.0}]),
}
CASES = [(name, form, i) for name, (_, options) in CLASSES.items() for form in FORMS for i in range(len(options))]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """A few shapes: matrices, vectors, a scalar, one in channels_last order."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(33, 17), (5,), (), (4, 3, 5, 5), (128,)]
    made = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    made[3] = made[3].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(t) for t in made]


def train(opt: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int = 6, missing=lambda step, i: False):
    """Steps with reproducible gradients; ``missing`` says which of them are None."""
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.Generator().manual_seed(1000 * step + i)
            grad = torch.randn(p.shape, generator=g).to(p.dtype)
            p.grad = None if missing(step, i) else grad.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else grad
        opt.param_groups[0]["lr"] *= 0.9
        opt.step()


def pair(cls, options, dtype=torch.float32, **how):
    """The same optimizer twice: as it is, and through compile_step."""
    ours, stock = parameters(dtype=dtype), parameters(dtype=dtype)
    mine = fxckpt.compile_step(cls(ours, lr=1e-2, **options), writer="mock", every=2, **how)
    return mine, ours, cls(stock, lr=1e-2, **options), stock


def assert_same(mine, ours, theirs, stock):
    for a, b in zip(ours, stock):
        assert torch.equal(a, b)
        assert list(mine.state.get(a, {})) == list(theirs.state.get(b, {}))
        for key, value in theirs.state.get(b, {}).items():
            assert mine.state[a][key] is value is None or torch.equal(mine.state[a][key], value), key


@pytest.mark.parametrize(("name", "form", "option"), CASES)
def test_native_step_has_the_bits_of_the_stock_step(name, form, option):
    cls, options = CLASSES[name]
    mine, ours, theirs, stock = pair(cls, {**options[option], **FORMS[form]}, update="native")
    train(mine, ours)
    train(theirs, stock)
    assert mine.ckpt._run.steppers[0].whole is None, "fell back to the stock step, so nothing was tested"
    assert_same(mine, ours, theirs, stock)


@pytest.mark.parametrize("form", FORMS)
def test_bits_stay_equal_when_other_gradients_are_missing_at_each_step(form):
    mine, ours, theirs, stock = pair(torch.optim.AdamW, FORMS[form], update="native")
    missing = lambda step, i: (step + i) % 3 == 0  # noqa: E731
    train(mine, ours, 9, missing)
    train(theirs, stock, 9, missing)
    assert_same(mine, ours, theirs, stock)
    assert len(mine.ckpt._run.steppers[0].programs.traced) <= 2, "a missing gradient is not a new signature"


def test_flags_of_the_user_are_kept_without_update(form="fused"):
    for form in ("single", "foreach", "fused"):
        mine, ours, theirs, stock = pair(torch.optim.Adam, FORMS[form])
        train(mine, ours)
        train(theirs, stock)
        assert_same(mine, ours, theirs, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_have_the_bits_of_the_stock_step(dtype):
    for form in ("single", "fused"):
        mine, ours, theirs, stock = pair(torch.optim.AdamW, FORMS[form], dtype, update="native")
        train(mine, ours)
        train(theirs, stock)
        assert_same(mine, ours, theirs, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cls", "options"), [
    (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"betas": (0.9, 0.95)}), (torch.optim.RMSprop, {}),
    (torch.optim.Adadelta, {}), (torch.optim.NAdam, {}), (torch.optim.RAdam, {"betas": (0.7, 0.9)})])  # fmt: skip
@pytest.mark.parametrize("elements", [50, 40_000])
def test_reduced_types_are_multiplied_by_numbers_that_are_not_rounded(cls, options, dtype, elements):
    pairs = [[nn.Parameter(torch.linspace(-1, 1, elements).to(dtype)) for _ in range(2)] for _ in range(2)]
    opts = [cls(params, lr=1e-2, foreach=False, **options) for params in pairs]
    fxckpt.compile_step(opts[1], writer="mock", every=2, update="native")
    for step in range(8):
        for params, opt in zip(pairs, opts):
            for i, p in enumerate(params):
                p.grad = torch.randn(elements, generator=torch.Generator().manual_seed(10 * step + i)).to(dtype)
            opt.step()
    assert opts[1].ckpt._run.steppers[0].whole is None
    assert_same(opts[1], pairs[1], opts[0], pairs[0])


@pytest.mark.parametrize("name", sorted(cases.CASES.keys() - {"LBFGS", "SparseAdam"}))
def test_nan_and_infinity_in_a_gradient_spread_as_in_the_stock_step(name):
    for form in cases.forms(name):
        theirs, stock = cases.make(name, {}, form)
        mine, ours = cases.make(name, {}, form)
        fxckpt.compile_step(mine, writer="mock", every=2, update="native")
        for step in range(5):
            for opt, params in ((theirs, stock), (mine, ours)):
                for i, p in enumerate(params):
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
                    if p.dim() and step in (2, 3):
                        p.grad.view(-1)[step - 2] = float("nan" if step == 2 else "inf")
                opt.step()
        for mine_p, stock_p in zip(ours, stock):
            torch.testing.assert_close(mine_p, stock_p, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("cls", "key", "values", "options"), [
    (torch.optim.SGD, "weight_decay", (0, 1, 2), {}), (torch.optim.SGD, "dampening", (0, 1), {"momentum": 0.9}),
    (torch.optim.SGD, "momentum", (1, 2), {}), (torch.optim.AdamW, "weight_decay", (1, 2), {}),
    (torch.optim.Adam, "weight_decay", (0, 1), {}), (torch.optim.Adagrad, "lr_decay", (0, 1), {}),
    (torch.optim.RMSprop, "eps", (1, 3), {}), (torch.optim.Muon, "ns_steps", (5, 2), {}),
    (torch.optim.Rprop, "etas", ((0.5, 2), (0.5, 3)), {}), (torch.optim.NAdam, "momentum_decay", (0, 1), {})])  # fmt: skip
def test_whole_numbers_among_the_hyperparameters_may_change(cls, key, values, options):
    pairs = [[nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))] for _ in range(2)]
    opts = [cls(params, lr=0.1, **{key: values[0], **options}) for params in pairs]
    fxckpt.compile_step(opts[1], writer="mock", every=1, update="native")
    for value in values:
        for (p,), opt in zip(pairs, opts):
            opt.param_groups[0][key] = value
            for _ in range(3):
                p.grad = torch.full_like(p, 0.1) + p.detach() * 0.3
                opt.step()
    assert_same(opts[1], pairs[1], opts[0], pairs[0])


@pytest.mark.parametrize("cls", [torch.optim.RAdam, torch.optim.ASGD, torch.optim.AdamW])
def test_a_tensor_among_the_hyperparameters_may_get_another_shape(cls):
    pairs = [[nn.Parameter(torch.linspace(-1, 1, 6))] for _ in range(2)]
    opts = [cls(params, lr=torch.tensor(0.1), foreach=False) for params in pairs]
    fxckpt.compile_step(opts[1], writer="mock", every=1, update="native")
    for lr in (torch.tensor(0.1), torch.tensor([0.2])):
        for (p,), opt in zip(pairs, opts):
            opt.param_groups[0]["lr"] = lr.clone()
            for _ in range(3):
                p.grad = torch.full_like(p, 0.1) + p.detach() * 0.3
                opt.step()
    assert_same(opts[1], pairs[1], opts[0], pairs[0])


def test_groups_with_their_own_hyperparameters_and_counts_have_the_bits_of_the_stock_step():
    def make(params):
        return torch.optim.AdamW([{"params": params[:2], "lr": 1e-1, "weight_decay": 0.0}, {"params": params[2:]}], lr=1e-3)

    ours, stock = parameters(), parameters()
    mine, theirs = fxckpt.compile_step(make(ours), writer="mock", every=1, update="native"), make(stock)
    for opt, params in ((mine, ours), (theirs, stock)):
        train(opt, params, 3)
        opt.param_groups[1]["weight_decay"] = 0.0  # a structural change: another program
        opt.param_groups[0]["betas"] = (0.5, 0.6)  # a numeric one: the same program
        train(opt, params, 3)
    assert_same(mine, ours, theirs, stock)


def test_a_learning_rate_of_zero_makes_no_new_signature():
    mine, ours, theirs, stock = pair(torch.optim.AdamW, {}, update="native")
    for opt, params in ((mine, ours), (theirs, stock)):
        train(opt, params, 2)
        opt.param_groups[0]["lr"] = 0.0
        train(opt, params, 1)
        opt.param_groups[0]["lr"] = 1e-3
        train(opt, params, 1)
    assert_same(mine, ours, theirs, stock)
    programs = [p for p in mine.ckpt._run.steppers[0].programs.traced.values() if isinstance(p, list)]
    assert len(programs) == 1


def test_compiled_step_is_within_a_few_roundings_of_the_stock_step():
    for cls, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})):
        mine, ours, theirs, stock = pair(cls, options, update="inductor")
        train(mine, ours)
        train(theirs, stock)
        assert any(m.flat for m in mine.ckpt._run.steppers[0].bindings.members), "nothing was compiled"
        for a, b in zip(ours, stock):
            bound = 16 * torch.finfo(a.dtype).eps * (b.abs() + 1e-2)
            assert ((a - b).abs() <= bound).all()


def test_compiled_update_gives_each_element_the_same_bits_wherever_blocks_and_threads_cut():
    """Bare steps and steps with checkpoints pass other lists of parameters; promise 2 needs the same bits of both."""
    whole = torch.nn.Parameter(torch.randn(3 * inductor.BLOCK + 61))
    parts = [torch.nn.Parameter(p.clone()) for p in whole.detach().split([5, 8, inductor.BLOCK, 1000, 2 * inductor.BLOCK - 952])]
    gradient = torch.randn(whole.shape)
    before = torch.get_num_threads()
    for params, threads in (([whole], 1), (parts, 2)):
        opt = torch.optim.AdamW(params, lr=1e-2)
        fxckpt.compile_step(opt, writer="mock", every=10**6, update="inductor")
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                for p, g in zip(params, gradient.split([p.numel() for p in params])):
                    p.grad = g.clone()
                opt.step()
        finally:
            torch.set_num_threads(before)
        assert all(m.flat for m in opt.ckpt._run.steppers[0].bindings.members), "nothing was compiled"
        opt.ckpt.shutdown()
    assert torch.equal(whole, torch.cat([p.detach() for p in parts]))


def test_a_compiled_update_is_seen_by_autograd_as_a_change():
    weight = torch.nn.Parameter(torch.randn(4))
    opt = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    fxckpt.compile_step(opt, writer="mock", every=10**6, update="inductor")
    for _ in range(2):
        (weight**2).sum().backward()
        opt.step()
    loss = (weight**2).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_optimizers_that_cannot_be_split_run_their_own_step_and_say_so_once(caplog):
    mine, ours, theirs, stock = pair(torch.optim.AdamW, {"fused": True, "betas": (torch.tensor(0.9), torch.tensor(0.9))})
    with caplog.at_level("INFO", logger="fxckpt"):
        train(mine, ours)
    train(theirs, stock)
    assert_same(mine, ours, theirs, stock)
    assert [r.getMessage() for r in caplog.records if "its own step, whole" in r.getMessage()].__len__() == 1
    assert mine.ckpt.statistics()["checkpoints_started"] == 3


def test_a_subclass_with_its_own_step_is_not_traced_as_its_base():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.add_(1.0)

    ours = parameters()
    before = copy.deepcopy(ours)
    mine = fxckpt.compile_step(Odd(ours, lr=1.0), writer="mock", every=1)
    train(mine, ours, 1)
    assert all(torch.equal(a, b + 1.0) for a, b in zip(ours, before))


def test_strides_of_dimensions_of_size_one_do_not_choose_the_code():
    """A 1x1 convolution's momentum is cloned from a gradient with other strides; after a load it has the weight's."""
    weight, momentum = torch.empty_strided((16, 16, 1, 1), (16, 1, 1, 1)), torch.empty_strided((16, 16, 1, 1), (16, 1, 16, 16))
    assert inductor.same_layout(weight, momentum)
    assert inductor.is_dense(momentum)
    assert not inductor.same_layout(torch.empty(2, 3, 4, 4), torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last))
