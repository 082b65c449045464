"""The contract of ``fxckpt.load``, row by row."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter, OrderedDict, deque

import pytest
import torch
from digests import differences, digest, snapshot, stored
from small_models import GPT, Loader, conv, eager, mlp
from small_training import Training
from torch import nn
from torch.nn.utils import prune
from waiting import committed

import fxckpt
from fxckpt.saving import inventory
from fxckpt.store.dtypes import OF_TORCH
from fxckpt.store.reader import Reader

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "d"


# ---- into a live run ----


def test_no_checkpoint_yet_is_step_0_and_a_log_line(store, caplog):
    training = Training(store)
    before = digest(training.now())
    with caplog.at_level(logging.INFO, "fxckpt"):
        restored = fxckpt.load()
    assert (restored.step, restored.iteration, restored.updates, restored.path) == (0, 0, 0, None)
    assert "fresh start" in caplog.text and digest(training.now()) == before


def test_the_newest_is_loaded_in_place_before_the_first_forward(store):
    first = Training(store).train(4).end()
    again = Training(store, seed=9)
    tensors = {name: t.data_ptr() for name, t in again.model.state_dict().items()}
    restored = fxckpt.load()
    assert (restored.step, restored.iteration, restored.updates, restored.path.name) == (4, 4, 4, "step-000000004")
    assert restored.missing == restored.unexpected == restored.skipped == ()
    assert set(restored.layers) >= {"0", "3"}
    assert differences(again.now(), first.reference[4]) == []
    assert {name: t.data_ptr() for name, t in again.model.state_dict().items()} == tensors
    assert again.scheduler.state_dict() == first.scheduler.state_dict()
    assert digest(again.loader) == digest(first.loader)


@pytest.mark.parametrize(
    ("make", "loader"),
    [(mlp, lambda: Loader.of(8)), (conv, lambda: Loader.of(3, 8, 8)), (GPT, Loader.of_tokens)],
    ids=["mlp", "conv", "gpt"],
)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Rprop])
def test_loaded_state_is_the_same_bits_and_goes_on_to_the_same_bits(make, loader, optimizer, store):
    first = Training(store, make=make, loader=loader(), optimizer=optimizer).train(3)
    first.opt.ckpt.flush()
    state = torch.get_rng_state()
    first.train(3).end()
    again = Training(store, make=make, loader=loader(), optimizer=optimizer, seed=9)
    assert fxckpt.load(step=3).step == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert differences(again.now(), first.reference[3]) == []
    again.train(3)
    assert again.losses == first.losses[3:] and differences(again.now(), first.now()) == []


@pytest.mark.parametrize("wrapped", ["model", "forward"])
def test_compiled_and_wrapped_models_have_the_names_of_the_plain_one(wrapped, store):
    first = Training(store).train(2).end()
    again = Training(store, seed=9, forward=eager)
    given = eager(again.model) if wrapped == "model" else again.forward
    restored = fxckpt.load(model=given)
    assert restored.step == 2 and restored.missing == restored.unexpected == ()
    assert differences(again.now(), first.now()) == []
    assert set(stored(restored.path)) == set(first.now())


def test_by_step_and_by_name(store):
    first = Training(store).train(2)
    first.opt.ckpt.save("best")
    first.train(3).end()
    again = Training(store, seed=9)
    for step in (1, 4, 2):
        assert fxckpt.load(step=step).step == step
        assert differences(again.now(), first.reference[step]) == []
    restored = fxckpt.load(name="best")
    assert (restored.step, restored.path.name) == (2, "best") and differences(again.now(), first.reference[2]) == []


@pytest.mark.parametrize("asked", [{"step": 7}, {"name": "worst"}])
def test_a_step_or_name_that_is_not_there_says_what_is(asked, store):
    Training(store).train(2).end()
    training = Training(store, seed=9)
    before = digest(training.now())
    with pytest.raises(fxckpt.NoCheckpoint, match=r"there is: 2, 1"):
        fxckpt.load(**asked)
    assert digest(training.now()) == before


def test_a_step_asked_of_an_empty_store_raises(store):
    Training(store)
    with pytest.raises(fxckpt.NoCheckpoint):
        fxckpt.load(step=1)


def test_in_the_middle_of_training_goes_back_in_place(store):
    training = Training(store).train(4)
    training.opt.ckpt.flush()
    assert fxckpt.load(step=2).step == 2
    assert differences(training.now(), training.reference[2]) == []
    assert training.opt.ckpt.statistics()["steps"] == 2
    losses = training.losses[2:]
    training.losses.clear()
    training.train(2)
    assert training.losses == losses
    training.opt.ckpt.flush()


def test_a_rollback_starts_a_lineage_that_the_next_life_follows(store):
    training = Training(store, keep=3).train(5)
    training.opt.ckpt.flush()
    fxckpt.load(step=3)
    with torch.no_grad():
        training.opt.param_groups[0]["lr"] = 0.5  # from here on another history
    training.train(1)
    training.opt.ckpt.flush()
    other = training.now()
    training.end()
    again = Training(store, keep=3, seed=9)
    restored = fxckpt.load()
    assert restored.step == 4 and differences(again.now(), other) == [], "not the step 5 of the abandoned history"


def test_after_a_rollback_the_abandoned_ones_are_given_up_before_their_common_past(store):
    training = Training(store, keep=3).train(5)
    training.opt.ckpt.flush()
    assert [each.step for each in fxckpt.checkpoints(store)] == [3, 4, 5]
    fxckpt.load(step=3)
    seen = []
    for _ in range(3):
        training.train(1)
        training.opt.ckpt.flush()
        seen.append([each.step for each in fxckpt.checkpoints(store)])
    assert seen == [[3, 5, 4], [3, 4, 5], [4, 5, 6]]


@pytest.mark.parametrize("fused", [False, True])
def test_attempts_and_updates_are_counted_apart(fused, store):
    """A scaler that finds an inf skips the step, or has the fused kernel skip it: an attempt, no update."""
    torch.manual_seed(0)
    model = mlp()
    opt = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused or None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    fxckpt.compile_step(opt, store, model=model, every=1, update="native", extra={"scaler": scaler})
    for step in range(6):
        scaler.scale(model(torch.randn(4, 8)).sum() * (float("inf") if step in (1, 3) else 1)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    opt.ckpt.flush()
    assert opt.ckpt.statistics()["steps"] == 6
    restored = fxckpt.load()
    assert (restored.step, restored.updates, opt.state[model[0].weight]["step"].item()) == (6, 4, 4)


def test_gradients_are_none_or_zero_as_they_were(store):
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fxckpt.compile_step(opt, store, model=model, every=1, update="native")
    (model[0](torch.ones(1, 3)) + model[1](torch.ones(1, 3))).sum().backward()
    opt.step()
    opt.zero_grad(set_to_none=False)
    model[1].weight.grad = None
    opt.ckpt.shutdown()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    fxckpt.load(store, model=model, optimizer=opt)
    grads = {name: None if p.grad is None else p.grad.abs().sum().item() for name, p in model.named_parameters()}
    assert grads == {"0.weight": 0, "0.bias": 0, "1.weight": None, "1.bias": 0, "2.weight": None, "2.bias": None}


def test_state_tensors_keep_their_strides(store):
    first = Training(store, make=conv, loader=Loader.of(3, 8, 8)).train(2).end()
    again = Training(store, make=conv, loader=Loader.of(3, 8, 8), seed=9)
    fxckpt.load()
    for old, new in zip(first.model.parameters(), again.model.parameters()):
        assert old.stride() == new.stride()
        for key in ("exp_avg", "exp_avg_sq"):
            assert first.opt.state[old][key].stride() == again.opt.state[new][key].stride() == old.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128])
def test_every_type_of_parameter_comes_back(dtype, store):
    def make(seed: int):
        g = torch.Generator().manual_seed(seed)
        model = nn.Module()
        model.w = nn.Parameter(torch.randn(5, 7, generator=g, dtype=torch.float64).to(dtype))
        model.v = nn.Parameter(torch.randn(3, 4, generator=g, dtype=torch.float64).to(dtype).t())
        opt = torch.optim.Adam(model.parameters(), lr=1e-2)
        fxckpt.compile_step(opt, store, model=model, every=1, update=None if dtype.is_complex else "native")
        return model, opt

    model, opt = make(0)
    for _ in range(3):
        (model.w.abs().square().sum() + model.v.abs().square().sum()).backward()
        opt.step()
        opt.zero_grad()
    opt.ckpt.shutdown()
    again, other = make(1)
    assert fxckpt.load(optimizer=other).step == 3
    assert differences(snapshot(again, other), snapshot(model, opt)) == []


def test_other_settings_in_the_script_are_named_once_beside_those_that_are_used(store, caplog):
    def life(lr: float, foreach: bool | None = None, decay: float = 0.0) -> tuple[str, dict]:
        model = nn.Linear(3, 3)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.01}]
        opt = torch.optim.AdamW(groups, lr=lr, foreach=foreach, weight_decay=decay)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
        fxckpt.compile_step(opt, store, model=model, every=1, update="native", extra={"s": scheduler})
        caplog.clear()
        fxckpt.load(optimizer=opt)
        said = "\n".join(m for m in caplog.messages if "the script now says" in m)
        model(torch.ones(1, 3)).sum().backward()
        opt.step()
        opt.zero_grad()
        scheduler.step()
        found = dict(opt.param_groups[0])
        opt.ckpt.shutdown()
        return said, found

    assert life(0.1)[0] == ""
    assert life(0.1)[0] == "", "a schedule is no other setting"
    said, used = life(0.4, foreach=True, decay=0.3)
    assert used["lr"] == 0.0125 and used["foreach"] is None and used["weight_decay"] == 0.0
    for part in ("lr=0.4 (it was 0.1)", "foreach=True (it was None)", "weight_decay=0.3 (it was 0.0)", "at step 2 goes on: "):
        assert said.count(part) == 1
    assert "lr=0.025 and 0.0025" in said and len(said.splitlines()) == 1
    assert life(0.4, foreach=True, decay=0.3)[0] == "", "it was said once"


BYTES = [name for name, known in OF_TORCH.items() if known.startswith("F8")]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex32, torch.complex128, *(getattr(torch, name) for name in BYTES)])
def test_frozen_parameters_and_buffers_of_rare_types_come_back(dtype, store):
    def make(seed: int):
        model = nn.Linear(3, 3)
        raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8) + seed
        model.frozen = nn.Parameter(raw.view(dtype).reshape(3, 2), requires_grad=False)
        model.register_buffer("buffer", raw.flip(0).contiguous().view(dtype))
        return model, fxckpt.compile_step(
            torch.optim.SGD(model.parameters(), lr=0.1), store, model=model, every=1, update="native"
        )

    model, opt = make(0)
    model.frozen.requires_grad_(False)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    opt.ckpt.shutdown()
    again, other = make(1)
    assert fxckpt.load(optimizer=other).step == 1
    for name in ("frozen", "buffer"):
        old, new = getattr(model, name), getattr(again, name)
        assert old.dtype == new.dtype and torch.equal(old.detach().view(torch.uint8), new.detach().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_an_optimizers_state_of_complex_numbers_comes_back(dtype, store):
    class Turning(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state["turn"] = state.get("turn", torch.ones(2, dtype=torch.complex64)).to(torch.complex64).mul(1j).to(dtype)
            super().step(closure)

    def life(steps: int):
        model = nn.Linear(2, 1)
        opt = fxckpt.compile_step(Turning(model.parameters(), lr=0.1), store, model=model, every=1)
        start = fxckpt.load(optimizer=opt).step
        found = [state.get("turn") for state in opt.state.values()]
        for _ in range(steps):
            model(torch.ones(1, 2)).sum().backward()
            opt.step()
        opt.ckpt.shutdown()
        return start, found

    life(3)
    start, found = life(0)
    assert start == 3
    assert [(each.dtype, each.tolist()) for each in found] == [(dtype, [-1j, -1j])] * 2


@pytest.mark.parametrize("late", [False, True])
def test_a_store_whose_complex_numbers_are_pairs_still_loads(late, store, monkeypatch):
    """As versions before wrote complex64. ``late``: nobody knows the names of buffers until the compiler has seen them."""

    class Turn(nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            g = torch.Generator().manual_seed(seed)
            self.w = nn.Parameter(torch.randn(3, 2, generator=g, dtype=torch.complex64))
            self.register_buffer("turn", torch.randn(2, generator=g, dtype=torch.complex64))

        def forward(self):
            return (self.w * self.turn).abs().square().sum()

    def life(seed: int):
        model = Turn(seed)
        opt = torch.optim.Adam(model.parameters(), lr=0.1)
        fxckpt.compile_step(opt, store, model=None if late else model, every=1, update=None)
        return model, opt, fxckpt.load(optimizer=opt).step

    with monkeypatch.context() as before:
        for table in (inventory.DTYPES, inventory.TORCH_DTYPES):
            before.delitem(table, torch.complex64 if torch.complex64 in table else "C64")
        model, opt, _ = life(0)
        forward = eager(model) if late else model
        forward().backward()
        opt.step()
        opt.ckpt.shutdown()
    again, other, step = life(1)
    if late:
        torch._dynamo.reset()
        eager(again)()
    assert step == 1 and differences(snapshot(again, other), snapshot(model, opt)) == []


def test_param_groups_come_back_with_all_their_settings(store):
    def make(lr, beta):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        opt = torch.optim.Adam(
            [
                {"params": model[0].parameters(), "lr": torch.tensor(lr), "note": "first", "schedule": (1, 2)},
                {"params": model[1].parameters(), "betas": (beta, 0.99), "weight_decay": lr},
            ],
            lr=lr,
            foreach=False,
        )
        fxckpt.compile_step(opt, store, model=model, every=1, update="native")
        return model, opt

    model, opt = make(0.25, 0.5)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    opt.param_groups[0]["lr"].fill_(0.125)
    opt.ckpt.shutdown()
    _, other = make(0.75, 0.9)
    live = other.param_groups[0]["lr"]
    fxckpt.load(optimizer=other)
    groups = other.param_groups
    assert groups[0]["lr"] is live and live.item() == 0.125 and groups[0]["schedule"] == (1, 2)
    assert groups[1]["betas"] == (0.5, 0.99) and groups[1]["weight_decay"] == 0.25 and groups[1]["lr"] == 0.25
    assert all(len(group["params"]) == 2 for group in groups)


def test_extra_state_comes_back_with_its_types(store):
    class Anything:
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    value = {
        "counter": Counter({3: 1, 9: 2}),
        5: (1, [2.5, float("nan")], None),
        "deque": deque([1, 2], maxlen=4),
        "ordered": OrderedDict(b=1, a=2),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "big": 2**80,
        "tensor": torch.arange(4).to(torch.bfloat16),
        "minus": -0.0,
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
    }
    held = Anything(value)
    first = Training(store, extra={"anything": held}).train(1)
    first.end()
    other = Anything(None)
    second = Training(store, extra={"anything": other}, seed=9)
    fxckpt.load(optimizer=second.opt)
    back = other.value
    assert repr(back) == repr(value) and [type(v) for v in back.values()] == [type(v) for v in value.values()]
    assert back["deque"].maxlen == 4 and str(back["minus"]) == "-0.0" and torch.equal(back["tensor"], value["tensor"])


def test_what_cannot_be_kept_without_pickle_is_an_error_that_names_the_path(store):
    class Loader2(Loader):
        def state_dict(self):
            return {"epochs": [{"callback": lambda: None}]}

    training = Training(store, loader=Loader2(torch.randn(50, 8), torch.zeros(50, dtype=torch.int64)))
    with pytest.raises(fxckpt.StateError, match=r"data/epochs/0/callback"):
        training.train(1)
    assert committed(store) == []


def test_module_extra_state_and_buffers_that_are_not_persistent_come_back(store):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(8, 4)
            self.calls = 0
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

        def forward(self, x):
            self.calls += 1
            self.scratch.add_(1)
            return super().forward(x)

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    first = Training(store, make=Counting)
    for _ in range(3):
        first.forward(torch.randn(2, 8)).sum().backward()
        first.opt.step()
        first.opt.zero_grad()
    first.end()
    again = Training(store, make=Counting, seed=9)
    restored = fxckpt.load()
    assert again.model.calls == 3 and again.model.scratch.tolist() == [3, 3, 3]
    assert restored.missing == restored.unexpected == () and "scratch" not in stored(restored.path)


def test_a_buffer_that_grew_and_is_not_persistent_comes_back_as_it_was(store):
    class Remembers(nn.Linear):
        def __init__(self):
            super().__init__(8, 4)
            self.register_buffer("history", torch.zeros(0), persistent=False)

        def forward(self, x):
            self.history = torch.cat([self.history, x.mean()[None]])
            return super().forward(x)

    first = Training(store, make=Remembers).train(3).end()
    again = Training(store, make=Remembers)
    fxckpt.load()
    assert torch.equal(again.model.history, first.model.history) and len(again.model.history) == 3


class Carried(nn.Module):
    """A recurrent cell that carries its state from batch to batch in a buffer, which the first forward sets."""

    def __init__(self, persistent):
        super().__init__()
        self.cell = nn.GRUCell(3, 3)
        self.register_buffer("carried", None, persistent=persistent)
        self.register_buffer("mask", torch.ones(3).expand(2, 3), persistent=False)

    def forward(self, x):
        y = self.cell(x, self.carried) * self.mask
        self.carried = y.detach()
        return y


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_a_forward_sets_first_and_buffers_that_were_expanded_come_back(persistent, store):
    def train(directory, steps):
        torch.manual_seed(0)
        model = Carried(persistent)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        if directory is not None:
            fxckpt.compile_step(opt, directory, model=model, every=1, update="native")
            fxckpt.load()
        for step in range(0 if directory is None else opt.ckpt.statistics()["steps"], steps):
            model(torch.full((2, 3), step + 1.0)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        if directory is not None:
            opt.ckpt.shutdown()
        return [*model.parameters(), model.carried, model.mask]

    train(store, 3)
    assert all(map(torch.equal, train(store, 6), train(None, 6)))


def test_a_parameter_that_is_renamed_in_training_is_stored_under_its_new_name(store):
    """``torch.nn.utils.prune`` makes ``weight`` a buffer and calls the same parameter ``weight_orig``."""
    training = Training(store).train(2)
    prune.l1_unstructured(training.model[0], "weight", 0.3)
    training.train(2).opt.ckpt.flush()
    found = fxckpt.latest(store)
    assert found.step == 4 and set(stored(found.path)) >= {"0.weight_orig", "0.weight_mask", "exp_avg/0.weight_orig"}
    assert "0.weight" not in stored(found.path)
    training.train(1)
    assert fxckpt.load(step=4).step == 4
    training.end()
    again = Training(store, seed=9)
    prune.l1_unstructured(again.model[0], "weight", 0.3)
    assert fxckpt.load(step=4).missing == ()
    assert differences(again.now(), training.reference[4]) == []


def slow_and_fast(directory, until, turns=False, start=0):
    """Two optimizers: one steps at every iteration, the other at every fourth, with what the backwards between have added up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    slow, fast = (torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model)
    if directory is not None:
        fxckpt.compile_step([slow, fast], directory, model=model, every=1, update="native")
        start = fxckpt.load().iteration if turns else fxckpt.load().step
    for i in fxckpt.steps(until, optimizer=fast) if turns and directory is not None else range(start, until):
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(i))).square().mean().backward()
        if i % 4 == 3:
            slow.step()
            slow.zero_grad()
        fast.step()
        fast.zero_grad()
    if directory is not None:
        fast.ckpt.flush()
        fast.ckpt.shutdown()
    return snapshot(model, slow, fast)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("ended", [1, 2, 6])
def test_gradients_that_wait_for_a_later_step_of_their_optimizer_come_back(turns, ended, store):
    slow_and_fast(store, ended, turns)
    assert differences(slow_and_fast(store, 10, turns), slow_and_fast(None, 10)) == []


def test_a_checkpoint_saved_in_the_middle_of_an_accumulation_has_its_gradients(store):
    def train(directory, steps, until=None):
        torch.manual_seed(0)
        model = mlp()
        opt = torch.optim.AdamW(model.parameters(), lr=0.1)
        micro = {"batch": 0}
        if directory is not None:
            counter = Counted(micro)
            fxckpt.compile_step(opt, directory, model=model, every=100, update="native", extra={"batch": counter})
            fxckpt.load()
        while micro["batch"] < steps:
            model(torch.randn(8, 8, generator=torch.Generator().manual_seed(micro["batch"]))).square().mean().backward()
            micro["batch"] += 1
            if micro["batch"] % 4 == 0:
                opt.step()
                opt.zero_grad()
            if micro["batch"] == until:
                opt.ckpt.save()
                opt.ckpt.shutdown()
                return None
        if directory is not None:
            opt.ckpt.shutdown()
        return snapshot(model, opt)

    train(store, 12, until=6)
    assert differences(train(store, 12), train(None, 12)) == []


def test_gradients_that_wait_keep_their_order_in_memory_and_survive_a_second_save(store):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    opt = torch.optim.Adam(model.parameters(), fused=True)
    fxckpt.compile_step(opt, store, model=model, every=100)
    for step in range(3):
        model(torch.ones(1, 3, 5, 5)).square().sum().backward()
        if step == 0:
            opt.step()
            opt.zero_grad()
    waiting = [p.grad.clone() for p in model.parameters()]
    opt.ckpt.save("first")
    opt.zero_grad()
    fxckpt.load(name="first")
    opt.ckpt.save("second")
    opt.zero_grad()
    fxckpt.load(name="second")
    assert all(torch.equal(p.grad, found) for p, found in zip(model.parameters(), waiting))
    assert [p.grad.stride() for p in model.parameters()] == [p.stride() for p in model.parameters()]
    opt.ckpt.shutdown()


def test_a_rehearsed_optimizer_trains_on_when_a_parameter_is_renamed(store):
    class Plain(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.grad, alpha=-group["lr"])

    training = Training(store, optimizer=lambda params, lr: Plain(params)).train(4)
    prune.l1_unstructured(training.model[0], "weight", 0.3)
    training.train(4).end()
    assert set(stored(fxckpt.latest(store).path)) >= {"0.weight_orig", "0.weight_mask"}


class Counted:
    """A counter as ``extra=`` takes it."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return dict(self.value)

    def load_state_dict(self, state):
        self.value.update(state)


@pytest.mark.parametrize("trained", [True, False])
def test_layers_are_trained_or_frozen_as_they_were(trained, store, caplog):
    """A script that unfreezes a layer ``if step == 1000`` does not come there again."""
    first = Training(store)
    first.model[0].requires_grad_(not trained)
    first.train(1)
    first.model[0].requires_grad_(trained)
    first.train(1).end()
    goes_on = first.train(1).now()
    again = Training(store)
    again.model[0].requires_grad_(not trained)
    fxckpt.load()
    assert {p.requires_grad for p in again.model[0].parameters()} == {trained}
    assert f"these parameters are {'trained' if trained else 'frozen'} again, as at step 2: 0.weight, 0.bias" in caplog.text
    again.train(1)
    assert differences(again.now(), goes_on) == []


# ---- without a run ----


def test_weights_alone_for_inference(store):
    first = Training(store, make=GPT, loader=Loader.of_tokens()).train(3)
    before = torch.get_rng_state()
    first.end()
    torch.manual_seed(5)
    model, state = GPT(), torch.get_rng_state()
    restored = fxckpt.load(store, model=model)
    assert restored.step == 3 and torch.equal(torch.get_rng_state(), state) and not torch.equal(state, before)
    assert digest(model) == digest(first.model)
    assert model.head.weight is model.tokens.weight


def test_weights_alone_into_a_compiled_model_while_the_trainer_trains(store):
    first = Training(store, keep=2).train(3)
    first.opt.ckpt.flush()
    model = mlp()
    assert fxckpt.load(store, model=eager(model)).step == 3
    assert digest(model) == digest(first.model)
    first.train(2)
    first.opt.ckpt.flush()


def test_into_a_plain_optimizer(store):
    first = Training(store).train(3).end()
    model = mlp()
    opt = torch.optim.AdamW(model.parameters(), lr=0.7)
    restored = fxckpt.load(store, model=model, optimizer=opt)
    assert restored.step == 3 and opt.param_groups[0]["lr"] == first.opt.param_groups[0]["lr"]
    assert differences(snapshot(model, opt), first.now()) == []


class HeadFirst(GPT):
    """The same model, registered in another order: the tied tensor's first name is another."""

    def __init__(self):
        super().__init__()
        self._modules = {name: self._modules[name] for name in ("head", "block", "tokens")}


def test_a_tied_tensor_is_found_by_any_of_its_names(store):
    first = Training(store, make=GPT, loader=Loader.of_tokens()).train(1).end()
    model = HeadFirst()
    assert next(name for name, p in model.named_parameters() if p is model.tokens.weight) == "head.weight"
    restored = fxckpt.load(store, model=model)
    assert restored.missing == restored.unexpected == ()
    assert torch.equal(model.tokens.weight, first.model.tokens.weight) and model.head.weight is model.tokens.weight


def test_a_tied_model_and_an_untied_one(store):
    Training(store, make=GPT, loader=Loader.of_tokens()).train(1).end()
    untied = GPT()
    untied.head.weight = nn.Parameter(torch.zeros_like(untied.head.weight))
    with pytest.raises(fxckpt.LayoutMismatch, match=r"head\.weight: not in the checkpoint"):
        fxckpt.load(store, model=untied)


def test_a_directory_of_others_files_is_none_to_load_from_and_one_to_begin_a_store_in(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(fxckpt.NotAStore, match=r"notes\.txt"):
        fxckpt.load(other, model=mlp())
    assert os.listdir(other) == ["notes.txt"]
    Training(other).train(1).end()
    assert fxckpt.load(other, model=mlp()).step == 1 and (other / "notes.txt").read_text() == "mine"
    (other / "store.json").write_text("mine, too")
    shutil.rmtree(other / "step-000000001")
    with pytest.raises(fxckpt.NotAStore, match=r"store\.json"):
        fxckpt.compile_step(torch.optim.SGD(mlp().parameters()), other)


def test_a_directory_without_checkpoints_given_by_name_is_step_0(tmp_path):
    assert fxckpt.load(tmp_path / "nothing here", model=mlp()).step == 0
    assert not (tmp_path / "nothing here").exists()


def test_without_a_run_it_says_what_to_do(store):
    with pytest.raises(fxckpt.SetupError, match="compile_step"):
        fxckpt.load()
    Training(store).train(1).end()


def test_with_several_runs_it_raises_and_lists_them(tmp_path):
    first, second = Training(tmp_path / "one"), Training(tmp_path / "two", optimizer=torch.optim.SGD)
    with pytest.raises(fxckpt.SetupError, match=r"(?s)2 runs.*one.*AdamW.*two.*SGD"):
        fxckpt.load()
    first.train(2)
    first.opt.ckpt.flush()
    assert fxckpt.load(optimizer=first.opt).step == 2
    assert fxckpt.load(optimizer=second.opt).step == 0
    assert fxckpt.load(tmp_path / "one").step == 2


def test_a_run_that_was_shut_down_is_not_in_the_way_of_the_next(tmp_path):
    first = Training(tmp_path / "one").train(1).end()
    second = Training(tmp_path / "two")
    assert fxckpt.load().step == 0
    second.train(1).end()
    assert first.opt.ckpt is not second.opt.ckpt


def test_extras_that_nobody_asked_for_are_not_called_unexpected(store):
    Training(store).train(1).end()
    assert fxckpt.load(store, model=mlp()).unexpected == ()
    assert set(fxckpt.load(store, model=mlp(), extra={}).unexpected) == {"extra/data", "extra/s"}


def test_after_a_load_the_last_committed_step_is_the_loaded_one(store):
    """A step that was loaded is durable: whoever waits for step N to be safe need not wait for the next commit."""
    training = Training(store)
    assert fxckpt.load().step == 0 and training.found["last_committed_step"] is None
    training.train(3).end()
    again = Training(store, every=100)
    assert fxckpt.load().step == 3
    assert (again.found["last_committed_step"], again.found["last_handed_over_step"]) == (3, 3)
    assert again.found["checkpoints_committed"] == 0
    assert fxckpt.load(step=2).step == again.found["last_committed_step"] == 2
    again.end()


def test_a_script_that_changes_its_working_directory_finds_its_checkpoints_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Training("d").train(3).end()
    training = Training("d")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert fxckpt.load().step == 3
    training.train(1).end()
    assert [each.step for each in fxckpt.checkpoints(tmp_path / "d")] == [1, 2, 3, 4]


def test_what_is_loaded_from_another_store_does_not_stand_in_for_what_lies_in_the_run_s_own(store, tmp_path):
    Training(tmp_path / "other").train(5).end()
    Training(store).train(2).end()
    for elsewhere in ("other", "empty"):
        training = Training(store)
        fxckpt.load(tmp_path / elsewhere, optimizer=training.opt)
        with pytest.raises(fxckpt.StoreNotLoaded):
            training.train(1)
        training.opt.ckpt.shutdown()
    assert [each.step for each in fxckpt.checkpoints(store)] == [1, 2]


def test_a_run_can_begin_with_a_checkpoint_of_another_store(tmp_path):
    first = Training(tmp_path / "other").train(5).end()
    training = Training(tmp_path / "new", seed=9)
    assert fxckpt.load(tmp_path / "other", optimizer=training.opt).step == 5
    assert differences(training.now(), first.reference[5]) == []
    training.train(2).end()
    found = [(each.step, each.generation) for each in fxckpt.checkpoints(tmp_path / "new")]
    assert found == [(6, 1), (7, 2)], "the clock of that other store means nothing here"


def test_a_damaged_checkpoint_that_was_asked_for_is_not_replaced_by_one_of_an_abandoned_branch(store):
    training = Training(store).train(3)
    training.opt.ckpt.flush()
    fxckpt.load(step=1)
    training.train(2).end()
    (newer,) = store.glob("step-000000003-g*")
    (newer / "commit.json").write_bytes(b"{}")
    Training(store, seed=9)
    with pytest.raises(fxckpt.Corrupt, match=newer.name):
        fxckpt.load(step=3)


def test_a_name_is_looked_for_in_the_store_and_not_in_the_path_that_leads_to_it(tmp_path):
    store = tmp_path / "best" / "d"
    Training(store).train(2).end()
    (store / "step-000000001" / "commit.json").write_bytes(b"{}")
    with pytest.raises(fxckpt.NoCheckpoint, match="best"):
        fxckpt.load(store, model=mlp(), name="best")


def test_a_load_that_a_trainer_overtakes_again_and_again_does_not_begin_afresh(store, monkeypatch):
    Training(store).train(2).end()
    looks = []

    def overtaken(self):
        looks.append(self)
        raise fxckpt.NoCheckpoint("taken back")

    monkeypatch.setattr(Reader, "verify", overtaken)
    with pytest.raises(fxckpt.NoCheckpoint, match="taken back"):
        fxckpt.load(store, model=mlp())
    assert len(looks) > 1


def test_what_is_loaded_in_inference_mode_can_be_trained(store):
    first = Training(store).train(3).end()
    training = Training(store, seed=9)
    with torch.inference_mode():
        assert fxckpt.load().step == 3
    assert differences(training.now(), first.reference[3]) == []
    training.train(2).opt.ckpt.flush()
    assert training.found["last_committed_step"] == 5
    model = mlp()
    with torch.inference_mode():
        fxckpt.load(store, model=model, step=3)
    assert torch.equal(model[0].weight, first.reference[3]["0.weight"])


def test_a_frozen_parameter_made_in_inference_mode_is_stored_and_comes_back(store):
    def make():
        model = mlp()
        with torch.inference_mode():
            model.register_parameter("scale", nn.Parameter(torch.rand(2), requires_grad=False))
        return model

    first = Training(store, make=make).train(2).end()
    training = Training(store, make=make, seed=9)
    fxckpt.load()
    assert torch.equal(training.model.scale, first.model.scale)
