"""A step of the journal, made again from a checkpoint and the gradients behind it, has the bits that training had.

``FXCKPT_OPTIMIZERS=full`` (``make optimizers``): every option and form of every class that is journalled, and compiled updates;
else the first option of each, and the forms of AdamW.
"""

from __future__ import annotations

import os

import pytest
import torch
from journal_lives import Life, journalled, net
from optimizer_cases import CASES, TENSOR

import fxckpt
from fxckpt.graph.update.trace import ELEMENTWISE


def made(cls, options):
    """A function that makes this optimizer; tensors among its options are fresh ones."""

    def make(params, lr):
        fresh = {name: value for name, value in options.items() if value != TENSOR}
        if options.get("betas") == TENSOR:
            fresh["betas"] = (torch.tensor(0.9), torch.tensor(0.99))
        lr = torch.tensor(lr) if options.get("lr") == TENSOR else fresh.pop("lr", lr)
        return getattr(torch.optim, cls)(params, lr=lr, **fresh)

    return make


FULL = os.environ.get("FXCKPT_OPTIMIZERS") == "full"


def forms():
    for cls in sorted(ELEMENTWISE):
        for number, options in enumerate(CASES[cls] if FULL else CASES[cls][:1]):
            yield pytest.param(cls, options, id=f"{cls}-{number}")
        if FULL or cls == "AdamW":
            yield pytest.param(cls, {**CASES[cls][1], "foreach": True}, id=f"{cls}-foreach")
    for cls in ("AdamW", "Adam", "SGD", "Adagrad") if FULL else ("AdamW",):
        yield pytest.param(cls, {"fused": True}, id=f"{cls}-fused")


@pytest.mark.parametrize(("cls", "options"), list(forms()))
def test_each_optimizer_goes_on_from_a_record_with_the_bits_of_the_uninterrupted_run(root, one_thread, cls, options):
    through = Life(root / "a", made(cls, options)).train(12).end()
    assert journalled(root / "a")
    before = Life(root / "b", made(cls, options)).train(11).end()
    last = max(journalled(root / "b"))
    after = Life(root / "b", made(cls, options))
    assert after.restored.step == 11 and after.at == before.states[11] == through.states[11]
    assert last == 11 and after.restored.path.name == "journal-000000011"
    assert after.train(12).end().states[12] == through.states[12]


def test_every_step_of_a_journal_can_be_asked_for(root, one_thread):
    life = Life(root).train(11).end()
    assert len(journalled(root)) >= 8
    for step in (2, 3, 5, 6, 7, 8, 9, 11):
        found = Life(root, load={"step": step})
        assert found.restored.step == step and found.at == life.states[step], step
        found.end()


@pytest.mark.skipif(not FULL, reason="compiles for ten seconds: set FXCKPT_OPTIMIZERS=full")
def test_compiled_updates_are_made_again_by_compiled_updates(root, one_thread, inductor_cache):
    life = Life(root, update=None).train(5).end()
    found = Life(root, update=None)
    assert found.restored.step == 5 and found.at == life.states[5]
    assert Life.train(found, 6).states[6] != life.states[5]
    found.end()
    native = Life(root, update="native", load={"step": 5})  # the record says which update it was
    assert native.at == life.states[5]


def test_weights_of_a_journalled_step_load_without_an_optimizer(root, one_thread):
    life = Life(root).train(10).end()
    torch.manual_seed(9)
    model = net()
    assert fxckpt.load(root, model=model).step == 10
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), life.model.state_dict().values()))


def test_gradients_that_are_cleared_in_place_are_copied_in_memory_from_then_on(root, one_thread):
    kept = []

    def keep(life, step):
        kept[:] = [p.grad for p in life.model.parameters() if p.grad is not None]

    life = Life(root, before=keep, between=lambda life, step: [grad.fill_(7) for grad in kept]).train(11).end()
    assert life.opt.ckpt.statistics()["checkpoints_failed"] == 0
    assert 11 in journalled(root) and len(journalled(root)) > 3
    found = Life(root)
    assert found.restored.step == 11 and found.at == life.states[11]


def clamp(life, step):
    with torch.no_grad():
        life.model[4].weight.clamp_(-0.05, 0.05)


def clamp_data(life, step):
    life.model[4].weight.data.clamp_(-0.05, 0.05)


def late(life, step):
    if step == 8:
        clamp(life, step)


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("change", [clamp, clamp_data, late], ids=["clamp", "clamp of .data", "once"])
def test_what_changes_outside_the_step_is_stored_whole(root, one_thread, when, change):
    life = Life(root, **{when: change}).train(11).end()
    assert 11 in journalled(root)
    found = Life(root, **{when: change})
    assert found.restored.step == 11 and found.at == life.states[11]
    found.train(13).end()
    assert found.states[13] == Life(root.with_name("whole"), **{when: change}).train(13).end().states[13]
