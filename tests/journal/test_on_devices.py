"""A journal on a device that the fake driver plays: records hold the gradients of their step, however late the copies run;
digests come behind the step; and no record is committed before the device has shown that steps repeat there, bit for bit."""

from __future__ import annotations

import json
import logging
import threading

import pytest
import torch
from digests import differences
from journal_lives import signed, whole
from small_models import Loader, mlp
from small_training import Training, all_good, all_made_again
from standin import a_step_while_copies_are_held, device, library, shaped
from torch.nn import functional as F
from waiting import until

import fxckpt
from fxckpt.errors import Corrupt
from fxckpt.journal.replay import Again
from fxckpt.journal.shown import Shown
from fxckpt.run.emitting import Emitter
from fxckpt.saving.digesting import Digesting, DigestPlan
from fxckpt.store.reader import candidates, records

__all__ = ["device", "library"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def journalled(device, monkeypatch):
    """A device whose copies are later than a step takes, and whose memory nobody looks at from the host."""
    for user in ("saving.guard", "journal.looks", "journal.made"):
        monkeypatch.setattr(f"fxckpt.{user}.glimpse", lambda *args: None)
    monkeypatch.setattr("fxckpt.journal.looks._word_bytes", lambda tensor: 0)
    device.fake.late(3000)
    return device


def adamw(params, lr):
    return torch.optim.AdamW(params, lr=lr, foreach=True)


def fused(params, lr):
    return torch.optim.AdamW(params, lr=lr, fused=True)


def conv() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
    return model.to(memory_format=torch.channels_last)


def steps_of(found) -> list[int]:
    return sorted(whole(each).record.step for each in found)


@pytest.mark.parametrize(
    "optimizer, place", [(adamw, shaped), (fused, lambda tensor: 0)], ids=["counts on the host", "counts on the device"]
)
@pytest.mark.parametrize("make", [mlp, conv], ids=["row-major", "channels_last"])
def test_records_hold_the_gradients_of_their_step_however_late_the_copies_run(tmp_path, journalled, optimizer, place, make):
    journalled.place = place
    loader = Loader.of(8) if make is mlp else Loader.of(3, 8, 8)
    training = Training(tmp_path, make=make, loader=loader, optimizer=optimizer, journal=6).train(14).end()
    assert all_made_again(tmp_path, training) == [*range(1, 15)]
    assert len(steps_of(records(tmp_path))) >= 9 and training.found["checkpoints_failed"] == 0
    assert journalled.fake.violations() == ""


def test_each_record_has_the_digest_of_a_layer_and_says_what_it_was_made_on(tmp_path, journalled):
    training = Training(tmp_path, optimizer=adamw, journal=20).train(8).end()
    found = [whole(each).record.journal for each in records(tmp_path)]
    assert [len(each.digests) for each in found] == [1] * 6 and {name for each in found for name in each.digests} == {"0", "3"}
    assert {each.device for each in found} == {"cuda"} and all("stand-in 0" in each.machine for each in found)
    assert all_made_again(tmp_path, training) == [*range(1, 9)]


def test_a_step_whose_layer_is_digested_does_not_wait_for_the_device(tmp_path, journalled):
    training = Training(tmp_path, optimizer=adamw, journal=20).train(4)
    a_step_while_copies_are_held(training, journalled.fake)
    training.end()
    assert journalled.fake.violations() == "" and all_made_again(tmp_path, training) == [1, 2, 3, 4, 5]


def test_a_monitor_writes_records_and_is_not_sent_what_is_only_digested(tmp_path, journalled):
    """The layer that is digested would fill the memory that both share."""
    options = {"journal": 4, "writer": "monitor", "chunk_mb": 1, "staging_mb": 8, "max_async": 1}
    training = Training(tmp_path, make=lambda: mlp(1 << 17), optimizer=adamw, **options).train(9).end()
    assert all_made_again(tmp_path, training) == [*range(1, 10)]
    assert all(len(whole(each).record.journal.digests) == 1 for each in records(tmp_path))
    assert training.found["checkpoints_failed"] == 0 and journalled.fake.violations() == ""


class Replayed(Training):
    """Its loop has boundaries, and its gradients are written over as a graph's replay does it: in their place, past versions."""

    def train(self, steps: int = 1) -> Replayed:
        static = {}
        for _ in fxckpt.steps(steps):
            x, y = next(self.loader)
            for param, grad in zip(params := list(self.model.parameters()), self.grads(x, y, params)):
                param.grad = static.setdefault(param, torch.empty_like(param))
                param.grad.data.copy_(grad)
            self.opt.step()
            self.reference[self.found["steps"]] = self.now()
            self.scheduler.step()
        return self

    def grads(self, x, y, params):
        return torch.autograd.grad(F.cross_entropy(self.forward(x), y), params)


class Clearing(Training):
    """Its loop has boundaries, and clears gradients in place."""

    def train(self, steps: int = 1) -> Clearing:
        for _ in fxckpt.steps(steps):
            x, y = next(self.loader)
            F.cross_entropy(self.forward(x), y).backward()
            self.opt.step()
            self.reference[self.found["steps"]] = self.now()
            self.opt.zero_grad(set_to_none=False)
            self.scheduler.step()
        return self


@pytest.mark.parametrize("loop", [Replayed, Clearing])
def test_gradients_that_are_written_over_in_their_place_are_those_of_their_step(tmp_path, journalled, loop):
    training = loop(tmp_path, optimizer=adamw, journal=20).train(10).end()
    assert all_made_again(tmp_path, training) == [*range(1, 11)]
    assert set(steps_of(records(tmp_path))) >= {*range(4, 11)} and journalled.fake.violations() == ""


# ---- what these rest on: each of these orders is needed ----


def by_reference(self, pending, layer, waiting):
    """As on the host: gradients are read where the backward put them."""
    pending.guard.watch_now(layer, waiting.tensors)
    self._hand_over(pending, layer, self.sources(waiting.tensors))


def test_gradients_that_are_read_where_a_replay_writes_the_next_ones_would_be_seen(tmp_path, journalled, monkeypatch):
    monkeypatch.setattr(Emitter, "_log", by_reference)
    training = Replayed(tmp_path, optimizer=adamw, journal=6).train(14).end()
    with pytest.raises((AssertionError, Corrupt)):
        all_made_again(tmp_path, training)


def test_copies_of_gradients_that_nobody_holds_until_they_have_come_would_be_seen(tmp_path, journalled, monkeypatch):
    """Their memory is given to others."""

    def dropped(self, pending, layer, copies):
        self._hand_over(pending, layer, self.sources(copies))

    monkeypatch.setattr(Emitter, "hand_over_copies", dropped)
    training = Training(tmp_path, optimizer=adamw, journal=6).train(14).end()
    with pytest.raises((AssertionError, Corrupt)):
        all_made_again(tmp_path, training)


def test_a_digest_that_is_begun_before_the_update_would_be_seen(tmp_path, journalled, monkeypatch):
    log = Emitter.log

    def too_early(self, layer, gradients):
        log(self, layer, gradients)
        link = None if self.current is None else self.current.link
        if link is not None and link.digesting is None:
            self.chain.digest(self.current, layer, self._streams)
            assert link.digesting is None or link.digesting[1].copied(60)  # a real stream is as far as that

    monkeypatch.setattr(Emitter, "log", too_early)
    monkeypatch.setattr(Digesting, "_look", lambda self: True)  # else versions tell, and there is no digest
    training = Training(tmp_path, optimizer=adamw, journal=6).train(14).end()
    with pytest.raises(Corrupt, match="made again, is not what training had"):
        all_made_again(tmp_path, training)


def test_a_digest_that_no_fence_waits_for_would_be_seen(tmp_path, journalled, monkeypatch):
    made = DigestPlan.__init__
    monkeypatch.setattr(DigestPlan, "__init__", lambda self, engine, number, sizes: made(self, engine, number + 50, sizes))
    monkeypatch.setattr(Digesting, "_look", lambda self: True)
    training = Training(tmp_path, optimizer=adamw, journal=6).train(14).end()
    with pytest.raises(Corrupt, match="made again, is not what training had"):
        all_made_again(tmp_path, training)


def test_counts_that_are_digested_where_they_lie_would_be_seen(tmp_path, journalled, monkeypatch):
    """The next step advances them before any layer's fence."""
    monkeypatch.setattr("fxckpt.journal.digests._copy", lambda tensor: tensor)
    journalled.place = lambda tensor: 0
    training = Training(tmp_path, optimizer=fused, journal=6).train(14).end()
    with pytest.raises(Corrupt, match="made again, is not what training had"):
        all_made_again(tmp_path, training)


# ---- shown by the device itself ----


def test_no_record_is_committed_before_the_device_has_shown_that_steps_repeat(tmp_path, journalled, monkeypatch):
    answered, later = threading.Event(), Emitter.later

    def late(self, tensor):
        value = later(self, tensor)
        return lambda: value() if answered.wait(60) else None

    monkeypatch.setattr(Emitter, "later", late)
    training = Training(tmp_path, optimizer=adamw, journal=6, max_async=2).train(4)
    training.opt.ckpt.end_step()
    found = training.opt.ckpt._run.saver.flights
    until(lambda: found.under_way()[0].phase == "waiting for the answer whether its step can be made again")
    assert steps_of(candidates(tmp_path)) == [1, 2] and records(tmp_path) == []
    answered.set()
    training.end()
    assert steps_of(records(tmp_path)) == [3, 4] and all_made_again(tmp_path, training) == [1, 2, 3, 4]


@pytest.mark.parametrize("wrong", ["param", "exp_avg", "step"])
def test_where_a_step_made_again_has_other_bits_there_is_no_journal_and_it_is_said(
    tmp_path, journalled, monkeypatch, caplog, wrong
):
    step = Again.step

    def other(self, groups, gradients):
        made = step(self, groups, gradients)
        for param in self.params.values():
            tensor = param if wrong == "param" else self._opt.state[param][wrong]
            tensor.view(-1)[-1:].add_(1e-6 if wrong != "step" else 1)
        return made

    monkeypatch.setattr(Again, "step", other)
    with caplog.at_level(logging.WARNING, "fxckpt"):
        training = Training(tmp_path, optimizer=adamw, journal=6).train(12).end()
    assert records(tmp_path) == [] and training.found["checkpoints_failed"] == 0
    assert sum("made again on stand-in 0, as load() would, had other bits" in text for text in caplog.messages) == 1
    monkeypatch.undo()
    assert len(all_good(tmp_path, training)) >= 9 and all_good(tmp_path, training)[0] == 12


def test_a_device_without_memory_for_the_copies_gets_no_journal_and_it_is_said(tmp_path, journalled, monkeypatch, caplog):
    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Again, "__init__", full)
    with caplog.at_level(logging.WARNING, "fxckpt"):
        training = Training(tmp_path, optimizer=adamw, journal=6).train(6).end()
    assert records(tmp_path) == [] and all_good(tmp_path, training) == [6, 5, 4, 3, 2, 1]
    assert sum("stand-in 0 had no memory" in text for text in caplog.messages) == 1


def test_each_program_is_shown_once_and_of_large_parameters_the_smallest_only(tmp_path, journalled, monkeypatch):
    monkeypatch.setattr("fxckpt.journal.shown.ENOUGH", 100)
    shown, step = [], Again.step

    def noted(self, groups, gradients):
        shown.append(sorted(gradients))
        return step(self, groups, gradients)

    monkeypatch.setattr(Again, "step", noted)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=1e-2, foreach=True)
    fxckpt.compile_step(opt, tmp_path, model=model, every=1, journal=20, update="native")
    for _ in fxckpt.steps(6):
        model(torch.randn(3, 8)).sum().backward()
        opt.step()
        opt.zero_grad()
    opt.ckpt.shutdown()
    assert shown == [["0.bias", "1.bias"]] and len(records(tmp_path)) == 4


def test_a_program_that_comes_later_is_shown_before_its_first_record_is_committed(tmp_path, journalled, monkeypatch):
    """RAdam rectifies from its sixth step on, which is other code."""
    shown, begins = [], Shown.begins

    def noted(self, index, gradients, device):
        begins(self, index, gradients, device)
        shown.append(self._twice is not None)

    monkeypatch.setattr(Shown, "begins", noted)
    make = lambda params, lr: torch.optim.RAdam(params, lr=lr, foreach=True)  # noqa: E731
    training = Training(tmp_path, optimizer=make, journal=20).train(10).end()
    assert [step for step, each in enumerate(shown, start=2) if each] == [2, 6]
    assert all_made_again(tmp_path, training) == [*range(1, 11)] and len(records(tmp_path)) == 8


# ---- what is refused ----


@pytest.mark.parametrize(
    "optimizer, place, why",
    [
        (lambda params, lr: torch.optim.Adafactor(params, lr=lr), shaped, "Adafactor adds elements up"),
        (adamw, lambda tensor: 0 if tensor.dim() == 2 else None, "parameters lie on several devices, or in host memory"),
        (adamw, lambda tensor: 0 if tensor.dim() == 2 else 1, "parameters lie on several devices"),
    ],
)
def test_what_a_device_is_not_known_to_repeat_is_stored_in_full_and_it_is_said(
    tmp_path, journalled, caplog, optimizer, place, why
):
    journalled.place = place
    with caplog.at_level(logging.WARNING, "fxckpt"):
        training = Training(tmp_path, optimizer=optimizer, journal=6).train(5).end()
    assert records(tmp_path) == [] and all_made_again(tmp_path, training) == [1, 2, 3, 4, 5]
    assert sum(why in text for text in caplog.messages) == 1


def test_parameters_that_come_to_a_device_later_are_journalled_there(tmp_path, journalled):
    journalled.place = lambda tensor: None
    training = Training(tmp_path, optimizer=adamw, journal=20).train(4)
    training.opt.ckpt.flush()
    journalled.place = shaped
    for param in training.model.parameters():
        param.data = param.data.clone()
    training.train(4).end()
    assert [whole(each).record.journal.device for each in records(tmp_path)].count("cuda") >= 2
    assert all_made_again(tmp_path, training) == [*range(1, 9)]


# ---- loading ----


def test_a_run_goes_on_from_a_record_of_a_device_with_the_bits_that_training_had(tmp_path, journalled):
    reference = Training(None, optimizer=adamw).train(12)
    Training(tmp_path, optimizer=adamw, journal=20).train(7).end()
    again = Training(tmp_path, seed=3, optimizer=adamw, journal=20)
    assert fxckpt.load().step == 7
    again.train(5).end()
    assert differences(reference.now(), again.now()) == [] and reference.losses[7:] == again.losses
    assert steps_of(records(tmp_path))[-1] == 12


def test_without_a_device_the_full_checkpoint_is_loaded_and_it_is_said(tmp_path, journalled, monkeypatch):
    training = Training(tmp_path, optimizer=adamw, journal=20).train(7).end()
    monkeypatch.setattr(journalled, "there", lambda: None)
    found = fxckpt.load(tmp_path, model=training.model)
    assert found.step == 2 and "made on a CUDA device (torch" in found.skipped[0][1] and "stand-in 0" in found.skipped[0][1]
    with pytest.raises(Corrupt, match="here is none to make it again on"):
        fxckpt.load(tmp_path, model=training.model, step=5)


@pytest.mark.parametrize("kind", ["cpu", None, 0], ids=str)
def test_a_kind_of_device_that_no_run_writes_is_damage(tmp_path, journalled, kind):
    Training(tmp_path, optimizer=adamw, journal=20).train(5).end()
    newest = max((whole(each) for each in records(tmp_path)), key=lambda each: each.record.step)
    body = json.loads(newest.record.to_bytes())
    assert body["format"] == 6
    body["journal"]["device"] = kind
    (newest.path / "commit.json").write_bytes(signed(body))
    found = fxckpt.load(tmp_path, model=mlp())
    assert found.step == 4 and "device" in found.skipped[0][1]


def test_another_device_is_named_and_its_bits_are_compared(tmp_path, journalled, monkeypatch, caplog):
    training = Training(tmp_path, optimizer=adamw, journal=20).train(7).end()
    monkeypatch.setattr(journalled, "name", lambda ordinal: "another one")
    with caplog.at_level(logging.WARNING, "fxckpt"):
        found = Training(tmp_path, seed=3, optimizer=adamw, journal=20)
        assert fxckpt.load().step == 7
    assert differences(found.now(), training.reference[7]) == []
    assert any("stand-in 0, and here is" in text and "another one" in text for text in caplog.messages)


def test_weights_in_host_memory_get_the_step_that_a_device_made_again(tmp_path, journalled):
    training = Training(tmp_path, optimizer=adamw, journal=20).train(7).end()
    journalled.place = lambda tensor: None  # the model's; what is brought to the device plays itself
    model = mlp()
    assert fxckpt.load(tmp_path, model=model).step == 7
    assert all(torch.equal(t, training.reference[7][name]) for name, t in model.state_dict().items())


def test_a_bit_that_flips_in_a_devices_memory_is_found_by_a_digest(tmp_path, journalled):
    training = Training(tmp_path, optimizer=adamw, journal=20).train(5)
    training.opt.ckpt.flush()
    training.model[0].weight.data.view(torch.int32)[0, 0] ^= 1 << 3
    training.train(4).end()
    found = Training(tmp_path, seed=3, optimizer=adamw, journal=20)
    restored = fxckpt.load()
    assert restored.step <= 5 and "layer '0' of step" in restored.skipped[0][1]
    assert differences(found.now(), training.reference[restored.step]) == []


def test_gradients_of_two_optimizers_are_held_until_the_record_of_both_has_them(tmp_path, journalled):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
    opts = [adamw(model[0].parameters(), 1e-2), torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9, foreach=True)]
    fxckpt.compile_step(opts, tmp_path, model=model, every=1, keep=20, journal=6, update="native")
    expected = {}
    for step in fxckpt.steps(12):
        for opt in opts:
            model(torch.randn(5, 8)).square().mean().backward()
            opt.step()
            for each in opts:
                each.zero_grad()
        expected[step + 1] = {name: t.clone() for name, t in model.state_dict().items()}
    opts[0].ckpt.shutdown()
    assert steps_of(candidates(tmp_path)) == [1, 2, 8] and journalled.fake.violations() == ""
    for step, state in expected.items():
        assert fxckpt.load(tmp_path, model=model, step=step).step == step
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items()), step
