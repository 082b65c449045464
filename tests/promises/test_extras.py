"""``extra=``: plain values are changed in place by a load, and what no checkpoint can hold is said at compile_step."""

from __future__ import annotations

import collections
import dataclasses
import logging
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

import fxckpt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "d"


def run(store, **extra):
    """A run that has loaded, of a new model."""
    model = nn.Linear(2, 1)
    opt = fxckpt.compile_step(torch.optim.SGD(model.parameters(), lr=0.1), store, model=model, every=1, extra=extra)
    fxckpt.load(optimizer=opt)
    return model, opt


def step(model, opt):
    model(torch.ones(2, 2)).sum().backward()
    opt.step()
    opt.ckpt.end_step()


def kept(store, before, after) -> None:
    """Save ``before`` as it is, and load it into ``after``."""
    model, opt = run(store, it=before)
    step(model, opt)
    opt.ckpt.shutdown()
    _, opt = run(store, it=after)
    opt.ckpt.shutdown()


@dataclasses.dataclass
class Best:
    """What a script keeps of its best epoch."""

    accuracy: float = 0.0
    history: list = dataclasses.field(default_factory=list)
    inner: object = None


@dataclasses.dataclass(frozen=True)
class Epoch:
    """A line of a log, never changed."""

    number: int
    loss: float


@dataclasses.dataclass(slots=True)
class Small:
    """Without a dictionary of its own."""

    count: int = 0


def test_a_dict_is_changed_in_place_and_so_is_what_it_holds(store):
    inner, row = {"a": 0}, []
    live = {"inner": inner, "row": row, "gone": 1}
    kept(store, {"best": 0.5, "inner": {"a": 1, 7: (2, 3)}, "row": [1, {"x": 2}]}, live)
    assert live == {"best": 0.5, "inner": {"a": 1, 7: (2, 3)}, "row": [1, {"x": 2}]}
    assert live["inner"] is inner and live["row"] is row and list(live) == ["best", "inner", "row"]


KINDS = [
    ([1, 2.5, "x"], []),
    (collections.OrderedDict(b=1, a=2), collections.OrderedDict()),
    (collections.Counter("aab"), collections.Counter("z")),
    (collections.defaultdict(list, {"a": [1]}), collections.defaultdict(list)),
    (collections.deque([1, 2], 5), collections.deque(maxlen=5)),
    ({1, 2}, {3}),
    (bytearray(b"ab"), bytearray()),
    (types.SimpleNamespace(best=1.5, inner=types.SimpleNamespace(n=2)), types.SimpleNamespace(other=0)),
    (Best(0.5, [1, 2], Small(3)), Best()),
    (Best(0.5, [Epoch(1, 0.5), Best(0.1)], {"small": Small(3)}), Best()),
    (Small(4), Small()),
    ({"epochs": [Epoch(0, 1.0), Epoch(1, 0.5)], "of": Epoch(2, 0.1)}, {"of": Epoch(0, 0.0)}),
    (np.arange(3.0), np.zeros(3)),
    (torch.arange(3.0), torch.zeros(3)),
]


def same(a, b) -> bool:
    return type(a) is type(b) and (bool((a == b).all()) if isinstance(a, (np.ndarray, torch.Tensor)) else a == b)


@pytest.mark.parametrize(("before", "after"), KINDS, ids=lambda value: type(value).__name__)
def test_a_plain_value_of_each_kind_comes_back_in_the_object_that_was_given(before, after, store):
    kept(store, before, after)
    assert same(after, before)


def test_a_tensor_in_a_plain_value_is_filled_where_it_is(store):
    tensor = torch.zeros(2)
    kept(store, {"ema": torch.tensor([1.0, 2.0])}, live := {"ema": tensor})
    assert live["ema"] is tensor and tensor.tolist() == [1, 2]


def test_what_a_script_changes_after_the_step_is_in_its_checkpoint(store):
    state = {"best": 0.0}
    model, opt = run(store, state=state)
    model(torch.ones(2, 2)).sum().backward()
    opt.step()
    state["best"] = 0.75
    opt.ckpt.end_step()
    state["best"] = 0.9
    opt.ckpt.shutdown()
    run(store, state=(again := {}))
    assert again == {"best": 0.75}


@pytest.mark.parametrize(("before", "after"), [([1], {}), ({}, [1]), (torch.zeros(2), torch.zeros(3)), (Best(), Small())])
def test_a_value_of_another_kind_than_the_stored_one_is_an_error_before_anything_is_touched(before, after, store):
    model, opt = run(store, it=before)
    step(model, opt)
    opt.ckpt.shutdown()
    model = nn.Linear(2, 1)
    weight = model.weight.detach().clone()
    opt = fxckpt.compile_step(torch.optim.SGD(model.parameters()), store, model=model, extra={"it": after})
    with pytest.raises(fxckpt.LayoutMismatch, match=r"extra\['it'\]: checkpoint"):
        fxckpt.load(optimizer=opt)
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("value", [0.5, 3, "best", None, (1, 2), Epoch(1, 0.5)], ids=lambda value: type(value).__name__)
def test_what_no_load_can_change_is_refused_with_the_advice_to_use_a_dict(value, store):
    with pytest.raises(fxckpt.SetupError, match="Keep it in a dict"):
        run(store, best=value)


def test_a_plain_data_loader_and_an_iterator_are_sent_to_batches(store):
    loader = torch.utils.data.DataLoader([1, 2])
    for value in (loader, iter(loader), iter([1])):
        with pytest.raises(fxckpt.SetupError, match=r"for x in fxckpt\.batches"):
            run(store, loader=value)
    assert not store.exists()


class Stateful:
    """Gives whatever state it is told to; counts how often it is asked."""

    def __init__(self, state):
        self.state, self.asked = state, 0

    def state_dict(self):
        self.asked += 1
        return self.state() if callable(self.state) else self.state

    def load_state_dict(self, state):
        self.state = state


class Local:
    """No value that a file can hold."""


@pytest.mark.parametrize("value", [Stateful({"deep": [{"x": Local()}]}), {"deep": [{"x": Local()}]}], ids=["object", "plain"])
def test_what_cannot_be_stored_is_refused_at_compile_step_with_the_path_to_it(value, store):
    with pytest.raises(fxckpt.SetupError, match=r"extra\['it'\](/deep/0/x|\['deep'\]\[0\]\['x'\]): a .*Local"):
        run(store, it=value)
    assert not store.exists()


def test_an_object_of_a_class_that_no_new_process_finds_is_refused_inside_of_a_container(store):
    Inner = dataclasses.make_dataclass("Inner", ["x"])
    with pytest.raises(fxckpt.SetupError, match="at the top of its module"):
        run(store, it=[Inner(1)])


def test_a_state_dict_that_raises_is_refused_at_compile_step(store):
    with pytest.raises(fxckpt.SetupError, match=r"extra\['it'\].state_dict\(\), of a Stateful, raised ZeroDivisionError"):
        run(store, it=Stateful(lambda: 1 / 0))


@pytest.mark.parametrize("state", [{}, None, []])
def test_an_empty_state_dict_is_named_in_a_warning(state, store, caplog):
    with caplog.at_level(logging.WARNING, logger="fxckpt"):
        run(store, it=Stateful(state))
    assert "extra['it'].state_dict(), of a Stateful, is empty" in caplog.text


def test_what_is_empty_for_a_reason_is_not_warned_of(store, caplog):
    with caplog.at_level(logging.WARNING, logger="fxckpt"):
        run(store, scaler=torch.amp.GradScaler("cpu", enabled=False), a={}, b=[])
    assert "empty" not in caplog.text


def test_probing_draws_no_random_numbers_and_starts_no_loader(store):
    class Loader(Stateful):
        def __iter__(self):
            return iter(())

    def draws():
        return {"x": torch.rand(1), "y": random.random(), "z": np.random.rand()}

    loader, other = Loader({"at": 1}), Stateful(draws)
    model = nn.Linear(2, 1)
    opt = torch.optim.SGD(model.parameters())
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    fxckpt.compile_step(opt, store, model=model, extra={"loader": loader, "other": other})
    assert (torch.rand(1), random.random(), np.random.rand()) == before
    assert loader.asked == 0 and other.asked == 1


def test_nothing_is_asked_where_fxckpt_is_off(store, monkeypatch):
    monkeypatch.setenv("FXCKPT_DISABLE", "1")
    each = Stateful({})
    model = nn.Linear(2, 1)
    fxckpt.compile_step(torch.optim.SGD(model.parameters()), store, model=model, extra={"it": each})
    assert each.asked == 0
