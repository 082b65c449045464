"""Updates of many small tensors on two threads: the same calls, the same bits, and nothing left of it elsewhere."""

from __future__ import annotations

import threading

import pytest
import torch
from intraop import intraop_threads

import fxckpt
from fxckpt.compat.threads import can_use_one_core, one_core
from fxckpt.optim.calls import WORTH_SHARING, _SharedCalls
from fxckpt.optim.helper_thread import HelperThread

pytestmark = pytest.mark.skipif(not can_use_one_core(), reason="this build of torch does not run on OpenMP")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


@pytest.fixture
def two_threads():
    with intraop_threads(2):
        yield


def small_parameters(count: int = 100) -> list[torch.nn.Parameter]:
    """Parameters of odd sizes below what PyTorch splits, with gradients, some of them denormal."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for i in range(count):
        parameter = torch.nn.Parameter(torch.randn(3 + i, 37, generator=generator))
        parameter.grad = torch.randn(3 + i, 37, generator=generator)
        parameter.grad[0] *= 1e-39
        out.append(parameter)
    return out


def test_every_call_is_made_once_and_on_both_threads():
    barrier, made = threading.Barrier(2, timeout=20), []

    def call(values):
        if len(made) < 2:
            made.append(threading.get_ident())
            barrier.wait()  # passes only when both threads are here
        else:
            made.append(values)

    HelperThread().run([call] * 9, "values")
    assert len(set(made[:2])) == 2 and made[2:] == ["values"] * 7


@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_error_of_either_thread_is_raised_when_both_are_done(where):
    barrier, caller = threading.Barrier(2, timeout=20), threading.get_ident()

    def call(values):
        barrier.wait()
        if (threading.get_ident() == caller) == (where == "caller"):
            raise ValueError(f"from the {where}")

    helper = HelperThread()
    with pytest.raises(ValueError, match=where):
        helper.run([call, call], None)
    helper.run([lambda values: None], None)  # it lives on


def test_the_helper_treats_denormal_numbers_as_its_caller_does():
    tiny, seen = torch.tensor(1e-39), {}

    def call(values):
        barrier.wait()
        seen[threading.get_ident()] = float(tiny * 1.0)

    helper = HelperThread()
    for flush in (False, True, False):
        torch.set_flush_denormal(flush)
        try:
            barrier = threading.Barrier(2, timeout=20)
            helper.run([call, call], None)
        finally:
            torch.set_flush_denormal(False)
        assert len(seen) == 2 and all((value == 0) == flush for value in seen.values())


def test_one_core_is_one_thread_inside_and_what_it_was_outside(two_threads):
    inside, other = [], []
    with one_core():
        inside.append(torch.get_num_threads())
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    assert (inside, other, torch.get_num_threads()) == ([1], [2], 2)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-2, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
        lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
    ],
    ids=["AdamW", "AdamW foreach", "SGD foreach", "RMSprop single", "AdamW fused", "SGD fused", "Adagrad fused"],
)
def test_two_threads_give_the_bits_of_one(tmp_path, two_threads, make, flush):
    ours, stock = make(small_parameters()), make(small_parameters())
    fxckpt.compile_step(ours, tmp_path, every=10**9, update="native")
    torch.set_flush_denormal(flush)
    try:
        for _ in range(4):
            ours.step()
            stock.step()
    finally:
        torch.set_flush_denormal(False)
    calls = ours.ckpt._run.steppers[0].executor.prepared.at_once
    assert any(isinstance(call, _SharedCalls) for call in calls), "nothing was shared: the test shows nothing"
    for mine, theirs in zip(ours.param_groups[0]["params"], stock.param_groups[0]["params"]):
        assert same_bits(mine, theirs)
        for key, value in stock.state[theirs].items():
            assert same_bits(ours.state[mine][key], value)


def test_a_mode_of_the_caller_sees_every_operator(tmp_path, two_threads):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        tensors = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "addcdiv_" in str(func):
                Counting.tensors += len(args[0])
            return func(*args, **(kwargs or {}))

    parameters = small_parameters()
    ours = torch.optim.AdamW(parameters, lr=1e-2, foreach=True)
    fxckpt.compile_step(ours, tmp_path, every=10**9, update="native")
    ours.step()
    ours.step()
    with Counting():
        ours.step()
    assert Counting.tensors == len(parameters) and 8 * len(parameters) >= WORTH_SHARING


def test_a_count_that_was_given_other_memory_advances_there(tmp_path):
    parameters = small_parameters(4)
    ours = torch.optim.AdamW(parameters, lr=1e-2)
    fxckpt.compile_step(ours, tmp_path, every=10**9, update="native")
    ours.step()
    ours.step()
    last = ours.state[parameters[-1]]["step"]
    last.data = last.detach().clone()
    ours.step()
    assert [ours.state[p]["step"].item() for p in parameters] == [3.0] * 4


class Products(torch.optim.Optimizer):
    """Not of ``torch.optim``, and split; its products of matrices may have other bits on one core than on two."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_((p.grad @ p.grad.T) @ p.grad, alpha=group["lr"])


def test_operators_of_a_rehearsal_keep_the_threads_that_its_own_step_has(tmp_path, two_threads):
    parameters = small_parameters()
    ours = Products(parameters, lr=1e-3)
    fxckpt.compile_step(ours, tmp_path, every=10**9, update="native")
    for _ in range(5):
        ours.step()
    stepper = ours.ckpt._run.steppers[0]
    assert stepper.strategy.proofs.any() and stepper.whole is None
    calls = stepper.executor.prepared.at_once
    assert calls and not any(isinstance(call, _SharedCalls) for call in calls)
