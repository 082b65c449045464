"""What ``extra=`` takes in dicts, lists and objects of fields comes back exactly and in place, or is refused with the way out."""

from __future__ import annotations

import argparse
import random
from collections import deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loader_runs import stored

from fxckpt.errors import LayoutMismatch, SetupError
from fxckpt.run.extra_state import extras, probe

Transition = namedtuple("Transition", "state action reward")


@dataclass
class Noise:
    """Fields, a generator among them."""

    scale: float = 0.1
    rng: np.random.Generator = field(default_factory=np.random.default_rng)


class Meter:
    """As in torch's ImageNet example."""

    def __init__(self) -> None:
        self.sum, self.count, self.rng = 0.0, 0, random.Random(3)


def gone_on(value: Any, other: Any) -> Any:
    """``other``, of another process, which takes what ``value`` is."""
    (mine,), (theirs,) = extras({"it": value}), extras({"it": other})
    probe([mine])
    saved = stored({"it": mine.get()})["it"]
    assert theirs.misfit(saved) is None
    theirs.set(saved)
    return other


def draws(generator: Any) -> float:
    return float(torch.rand(1, generator=generator)) if isinstance(generator, torch.Generator) else generator.random()


MAKE = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "numpy": np.random.default_rng,
    "numpy, old": np.random.RandomState,
    "numpy, Philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "python": random.Random,
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("around", [
    lambda g: {"rng": g, "at": 3}, lambda g: [1, g], lambda g: deque([g], 2), lambda g: SimpleNamespace(rng=g),
    lambda g: Noise(rng=g), lambda g: {"a": {"b": (1, g)}}, lambda g: {"t": Transition(1, g, 3)},
])  # fmt: skip
def test_a_generator_inside_of_plain_values_goes_on_as_the_same_object(kind, around):
    mine, theirs = MAKE[kind](1), MAKE[kind](2)
    draws(mine)
    gone_on(around(mine), around(theirs))
    assert draws(mine) == draws(theirs)


def test_a_generator_that_the_process_does_not_have_yet_is_made():
    mine = {"late": [np.random.default_rng(4)]}
    other = gone_on(mine, {"late": []})
    assert draws(mine["late"][0]) == draws(other["late"][0])


def test_a_replay_memory_of_namedtuples_comes_back():
    mine = deque([Transition(torch.full((2,), float(i)), i, None) for i in range(3)], maxlen=5)
    other = gone_on(mine, deque(maxlen=5))
    assert repr(other) == repr(mine) and {type(each) for each in other} == {Transition}


def schedulers(lr: float) -> list[torch.optim.lr_scheduler.LRScheduler]:
    opts = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr * i) for i in (1, 2)]
    return [torch.optim.lr_scheduler.StepLR(opt, 2) for opt in opts]


@pytest.mark.parametrize("around", [list, lambda each: {"a": each[0], "b": each[1]}, lambda each: SimpleNamespace(both=each)])
def test_what_has_a_state_of_its_own_takes_it_back_inside_of_plain_values(around):
    mine, other = schedulers(0.1), schedulers(0.7)
    for each in mine:
        each.optimizer.step()
        each.step()
    gone_on(around(mine), around(other))
    assert [each.state_dict() for each in other] == [each.state_dict() for each in mine]


def test_what_has_a_state_of_its_own_and_is_not_there_is_named():
    with pytest.raises(LayoutMismatch, match=r"extra\['it'\]\[1\] had a state_dict\(\), and this process has no such object"):
        gone_on(schedulers(0.1), schedulers(0.1)[:1])


def test_what_an_object_holds_comes_back_through_vars():
    mine, other = Meter(), Meter()
    mine.sum, mine.count = 3.5, 2
    mine.rng.random()
    gone_on(vars(mine), vars(other))
    assert (other.sum, other.count) == (3.5, 2) and mine.rng.random() == other.rng.random()


@pytest.mark.parametrize(("value", "says"), [
    (Meter(), r"extra\['it'\] is a Meter: .*extra=\{'it': vars\(\.\.\.\)\}"),
    (argparse.Namespace(a=1), r"extra\['it'\] is a Namespace: .*vars\(\.\.\.\)"),
    ({"loss": [Meter()]}, r"extra\['it'\]\['loss'\]\[0\]: a Meter cannot.*vars\(\.\.\.\)"),
    ({"scaler": torch.amp.GradScaler("cpu")}, r"extra\['it'\]\['scaler'\]: name the GradScaler itself"),
    ([namedtuple("Local", "a")(1)], r"extra\['it'\]\[0\]: a Local inside of a container.*at the top of its module"),
])  # fmt: skip
def test_what_does_not_come_back_as_it_is_is_refused_with_the_way_out(value, says):
    with pytest.raises(SetupError, match=says):
        probe(extras({"it": value}))


def test_a_namedtuple_whose_fields_are_others_now_is_named(monkeypatch):
    (mine,) = extras({"it": [Transition(1, 2, 3)]})
    saved = mine.get()
    monkeypatch.setitem(globals(), "Transition", namedtuple("Transition", "state action"))
    with pytest.raises(
        LayoutMismatch, match=r"had the fields \['state', 'action', 'reward'\], and has \['state', 'action'\] now"
    ):
        mine.set(saved)
