"""Every model with updates inside the backward ends with the bits of plain Inductor, and no update disturbs a gradient.

``FXCKPT_MODELS=full`` takes all models of ``support/model_cases.py``, in fp32 and under bf16 autocast: minutes of compiling.
"""

from __future__ import annotations

import logging
import os
from functools import partial

import pytest
import torch
from in_backward_runs import begun, deterministic, same
from model_cases import MODELS, WRITTEN_HERE

from fxckpt.graph.backward import place

FULL = os.environ.get("FXCKPT_MODELS") == "full"
STEPS = 7

pytestmark = pytest.mark.skipif(not FULL, reason="make models: minutes of compiling")


@pytest.fixture(autouse=True)
def repeatable(one_thread, inductor_cache):
    with deterministic():
        yield


def trained(name, updates, autocast):
    run = begun(updates, MODELS[name])
    for _ in range(STEPS):
        run.step(autocast=autocast, **MODELS[name].batch())
    return run


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_armed_unarmed_and_plain_inductor_end_with_the_same_bits(name, autocast):
    if name not in WRITTEN_HERE:
        pytest.importorskip("transformers")
    plain, after, inside = map(partial(trained, name, autocast=autocast), (None, "after_backward", "in_backward"))
    assert same(plain.bits(), after.bits()) and plain.losses == after.losses
    assert same(after.bits(), inside.bits()), "armed is another training than unarmed"
    assert same(plain.bits(), inside.bits())
    late = {name: why for name, why in inside.opt.ckpt.graph.standing.items() if why}
    print(name, inside.armed, late)
    assert inside.armed[-1] > 0, late


@pytest.mark.parametrize("name", MODELS)
def test_what_an_armed_update_writes_reaches_no_other_gradient(name):
    """The poison: what was updated is filled with NaN while the backward goes on."""
    if name not in WRITTEN_HERE:
        pytest.importorskip("transformers")
    sums = [poisoned(name, poison) for poison in (False, True)]
    assert sums[0] == sums[1] and len(sums[0]) > 1


def poisoned(name, poison):
    """All gradients as the ops bring them in one armed backward."""
    run = begun("in_backward", MODELS[name])
    for _ in range(5):
        run.step(**MODELS[name].batch())
    inside, executor, seen = run.opt.ckpt._run.stepping.in_backward.armed, run.opt.ckpt._run.steppers[0].executor, {}
    real = executor.section

    def section(place):
        for m in executor.arranged.owned[place]:
            if inside._gradients[m.index] is not None:
                seen[m.name] = inside._gradients[m.index].double().sum().item()
        real(place)
        if poison:
            for m in executor.arranged.owned[place]:
                m.param.fill_(float("nan"))

    executor.section = section
    torch.manual_seed(9)
    run.compiled(**MODELS[name].batch()).backward()
    del executor.section
    assert inside.open
    inside.leave("the test is over")
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_without_any_pin_what_verifies_the_schedule_keeps_the_bits(name, monkeypatch, caplog):
    if name not in WRITTEN_HERE:
        pytest.importorskip("transformers")
    monkeypatch.setattr(place, "outputs_of", lambda node: [])  # nothing is pinned, and no op waits for a reader
    monkeypatch.setattr("fxckpt.graph.backward.placing.VERSION", "without pins")
    with caplog.at_level(logging.WARNING, "fxckpt"):
        inside = trained(name, "in_backward", autocast=False)
    assert "behind its update" in caplog.text, "some norm's weight is read late"
    assert same(trained(name, None, autocast=False).bits(), inside.bits())
