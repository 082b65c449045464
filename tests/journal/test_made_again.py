"""A step of the journal, made again from a checkpoint and the gradients behind it, has the bits that training had.

``FXCKPT_OPTIMIZERS=full`` (``make optimizers``): every option and form of every class that is journalled, and compiled updates;
else the first option of each, and the forms of AdamW.
"""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from journal_lives import Life, journalled, net
from optimizer_cases import CASES, TENSOR
from torch import nn

import fxckpt
from fxckpt.journal.repeatable import REPEATABLE


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
    for cls in sorted(REPEATABLE):
        for number, options in enumerate(CASES[cls] if FULL else CASES[cls][:1]):
            yield pytest.param(cls, options, id=f"{cls}-{number}")
        if FULL or cls == "AdamW":
            yield pytest.param(cls, {**CASES[cls][1], "foreach": True}, id=f"{cls}-foreach")
    for cls in ("AdamW", "Adam", "SGD", "Adagrad") if FULL else ("AdamW",):
        yield pytest.param(cls, {"fused": True}, id=f"{cls}-fused")


class Matrices(nn.Module):
    """All that Muon takes. Where others have a bias the second matrix has no gradient now and then."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(72, 9, bias=False), nn.Linear(9, 20, bias=False)

    def __getitem__(self, index):
        return SimpleNamespace(bias=self.second.weight)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).tanh())


@pytest.mark.parametrize(("cls", "options"), list(forms()))
def test_each_optimizer_goes_on_from_a_record_with_the_bits_of_the_uninterrupted_run(root, one_thread, cls, options):
    def copied(life, step):
        """What a process would leave that dies in its twelfth step."""
        if step == 11:
            life.opt.ckpt.flush()
            shutil.copytree(root / "a", root / "b")

    model = Matrices if cls == "Muon" else net
    through = Life(root / "a", made(cls, options), model=model, before=copied).train(12).end()
    after = Life(root / "b", made(cls, options), model=model)
    assert after.restored.step == 11 and after.at == through.states[11]
    assert max(journalled(root / "b")) == 11 and after.restored.path.name == "journal-000000011"
    assert after.train(12).end().states[12] == through.states[12]


def test_every_step_of_a_journal_can_be_asked_for(root, one_thread):
    life = Life(root).train(11).end()
    assert len(journalled(root)) >= 8
    for step in (2, 3, 6, 8, 11):
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


class Wide(nn.Module):
    """So large that PyTorch's threads share each operation, in a type that is rounded otherwise where a share ends."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(shape).bfloat16() for shape in ((700, 701), (70_000,)))
        self.bias = nn.Parameter(torch.zeros(5).bfloat16())

    def __getitem__(self, index):
        return self

    def forward(self, x):
        return sum((weight.square() * x.sum().bfloat16()).sum() for weight in self.weights) + self.bias.sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda params, lr: torch.optim.Adam(params, lr=lr, weight_decay=0.1, eps=1e-5, betas=(0.7, 0.9)),
        lambda params, lr: torch.optim.Adafactor(params, lr=lr),
    ],
    ids=["Adam", "Adafactor"],
)
def test_steps_are_made_again_with_the_threads_of_training(root, one_thread, make):
    def enlarge(life, step):
        """Adafactor takes small ones all alike."""
        for weight in life.model.weights:
            weight.grad.copy_(weight.detach() * 0.7)

    torch.set_num_threads(3)
    life = Life(root, make, model=Wide, before=enlarge).train(12).end()
    torch.set_num_threads(1)
    found = Life(root, make, model=Wide)
    assert found.restored.skipped == () and found.restored.step == 12 in journalled(root)
    assert found.at == life.states[12] and torch.get_num_threads() == 1


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


def test_gradients_that_are_cleared_past_their_counters_are_all_known_by_the_first_records(root, one_thread):
    """However many full checkpoints came before them."""
    kept = []

    def keep(life, step):
        kept[:] = [p.grad for p in life.model.parameters() if p.grad is not None]

    life = Life(root, journal=20, before=keep, between=lambda life, step: [grad.data.fill_(7) for grad in kept])
    for name in "abcd":
        life.opt.ckpt.save(name)
    life.train(7).opt.ckpt.flush()
    logged = {key.split("/", 1)[1] for key in life.opt.ckpt._run.emitter.changed_outside if key.startswith("gradient/")}
    assert logged == {name for name, _ in life.model.named_parameters()}
    life.train(11).end()
    assert 11 in journalled(root)
    assert Life(root, journal=20).at == life.states[11]


def clamp(life, step):
    with torch.no_grad():
        life.model[4].weight.clamp_(-0.05, 0.05)


def clamp_data(life, step):
    life.model[4].weight.data.clamp_(-0.05, 0.05)


def late(life, step):
    if step == 8:
        clamp(life, step)


def late_data(life, step):
    """Past the version counter, and behind the steps of which every element is looked at."""
    if step == 8:
        life.model[4].weight.data.mul_(0.5)


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize(
    "change", [clamp, clamp_data, late, late_data], ids=["clamp", "clamp of .data", "once", "all of .data once"]
)
def test_what_changes_outside_the_step_is_stored_whole(root, one_thread, when, change):
    life = Life(root, **{when: change}).train(11).end()
    assert 11 in journalled(root)
    found = Life(root, **{when: change})
    assert found.restored.step == 11 and found.at == life.states[11]
    found.train(13).end()
    assert found.states[13] == Life(root.with_name("whole"), **{when: change}).train(13).end().states[13]
