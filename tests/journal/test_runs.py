"""A run with a journal: which of its steps are records, what it keeps, and that every kind of loop resumes with the same bits."""

from __future__ import annotations

import logging
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from digests import digest
from journal_lives import Life, journalled, larger, whole
from torch import nn

import fxckpt
from fxckpt.errors import SaveFailed, SetupError, StateError
from fxckpt.journal.repeatable import why_not_now
from fxckpt.store.names import subdirectories
from fxckpt.store.reader import candidates, records


def fulls(root) -> list[int]:
    return sorted(whole(each).record.step for each in candidates(root))


class Plain(Life):
    """The same training in a loop without boundaries."""

    def train(self, upto: int) -> Plain:
        for step in range(self.opt.ckpt.statistics()["steps"], upto):
            self.model(torch.randn(4, 2, 6, 6)).square().mean().backward()
            self.before(self, step)
            self.opt.step()
            self.opt.zero_grad()
            self.scheduler.step()
            self.between(self, step)
            self.states[step + 1] = self.now()
        return self


class Scaled(Life):
    """With a scaler that finds an inf now and then, and gradients accumulated over two iterations."""

    def train(self, upto: int) -> Scaled:
        for i in fxckpt.steps(upto):
            loss = self.model(torch.randn(4, 2, 6, 6)).square().mean() * (float("inf") if i in (5, 13) else 1.0)
            self.scaler.scale(loss).backward()
            if i % 2:
                self.scaler.step(self.opt)
                self.scaler.update()
                self.opt.zero_grad()
            self.states[i + 1] = self.now()
        return self


@pytest.mark.parametrize("writer", ["thread", "monitor"])
def test_a_plain_loop_resumes_from_a_record(root, one_thread, writer):
    through = Plain(root.with_name("through")).train(14).end()
    Plain(root, writer=writer).train(11).opt.ckpt.flush()
    assert 11 in journalled(root)
    for run in list(fxckpt.run.run.live_runs):
        run.shutdown()
    found = Plain(root, writer=writer)
    assert found.restored.step == 11
    assert found.train(14).end().states[14] == through.states[14]


def test_scaled_and_accumulated_gradients_resume_from_a_record(root, one_thread):
    def life(place):
        made = Scaled.__new__(Scaled)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        made.__init__(place, extra={"scaler": made.scaler})
        return made

    through = life(root.with_name("through")).train(24).end()
    life(root).train(19).end()
    assert journalled(root)
    found = life(root)
    assert found.restored.path.name.startswith("journal")
    assert found.train(24).end().states[24] == through.states[24]


def test_a_rollback_cuts_the_journal(root, one_thread):
    first = Life(root).train(11).end()
    to = journalled(root)[-3]
    again = Life(root, load={"step": to}).train(to + 1)
    again.opt.ckpt.flush()
    assert to + 1 in fulls(root), "what follows a load is a full one"
    assert max(journalled(root)) == to, "what lay behind it is gone"
    assert again.train(to + 3).end().states[to + 3] == first.states.get(to + 3, again.states[to + 3])
    found = Life(root)
    assert found.restored.step == to + 3 and found.at == again.states[to + 3]


@pytest.mark.parametrize("keep", [1, 2])
def test_records_stay_as_long_as_their_checkpoint_and_no_longer(root, one_thread, keep):
    life = Life(root, keep=keep)
    for step in range(4, 30, 5):
        life.train(step).opt.ckpt.flush()
        bases = {whole(each).record.generation for each in candidates(root)}
        assert len(bases) <= keep
        assert {whole(each).record.journal.base for each in records(root)} <= bases
    life.end()
    slots = [name for name in subdirectories(root) if name.endswith(".partial")]
    assert len(slots) + len(journalled(root)) <= (keep + 1) * 5 + 2 * 2 + 2


def test_a_journal_that_becomes_shorter_or_ends_gives_its_space_back(root, one_thread):
    def slots() -> int:
        return len(journalled(root)) + sum(name.startswith("journal-slot") for name in subdirectories(root))

    Life(root, journal=8).train(18).end()
    assert slots() > 8
    Life(root, journal=2).train(26).end()
    assert slots() <= 3 * 1 + 2
    Life(root, journal=1).train(29).end()
    assert slots() == 0


def test_what_is_left_of_a_branch_that_was_cut_off_is_no_loss(root, one_thread):
    first = Life(root).train(11).end()
    *_, back, gone, left = journalled(root)
    again = Life(root, load={"step": back})
    again.opt.ckpt._run.store._records._cut = set()  # the process dies in the middle of giving them up
    again.train(back + 1).end()
    shutil.rmtree(root / f"journal-{gone:09d}")
    assert left > back + 1 and left in journalled(root)
    found = Life(root)
    assert (found.restored.step, found.restored.skipped) == (back + 1, ()) and found.at == first.states[back + 1]


def test_named_saves_leave_the_journal_as_it_is_and_others_begin_it_anew(root, one_thread):
    life = Life(root).train(9)
    life.opt.ckpt.save("kept")
    life.train(10)
    life.opt.ckpt.flush()
    assert 10 in journalled(root)
    life.opt.ckpt.save()
    life.train(12).end()
    bases = {each.record.journal.base for each in map(whole, records(root)) if each.record.step > 10}
    [base] = [each.record for each in map(whole, candidates(root)) if each.record.generation in bases]
    assert base.step == 10
    found = Life(root)
    assert found.restored.step == 12 and found.at == life.states[12]


def test_after_a_record_that_failed_comes_a_full_checkpoint(root, one_thread, monkeypatch):
    life = Life(root).train(9)
    life.opt.ckpt.flush()
    store, commit, failed = life.opt.ckpt._run.store, life.opt.ckpt._run.store.commit, []

    def failing(slot, record, tensors):
        if record.journal is not None and not failed:
            failed.append(record.step)
            raise SaveFailed("pwrite", slot.path, 0, 28)
        return commit(slot, record, tensors)

    monkeypatch.setattr(store, "commit", failing)
    life.train(14)
    with pytest.raises(SaveFailed):
        life.opt.ckpt.flush()
    life.end()
    assert failed and failed[0] not in journalled(root) and any(step > failed[0] for step in fulls(root))
    found = Life(root)
    assert found.restored.step == 14 and found.at == life.states[14]


def test_a_setting_that_cannot_be_stored_fails_its_checkpoints_and_not_training(root, one_thread):
    def odd(life, step):
        life.opt.param_groups[0]["odd"] = object() if step == 9 else None

    life = Life(root, before=odd).train(12)
    assert life.opt.ckpt.statistics()["checkpoints_failed"] == 1
    with pytest.raises(StateError, match="odd"):
        life.end()
    assert fxckpt.durable_steps(root)[-1] == 12 and 10 not in fxckpt.durable_steps(root)
    assert Life(root).at == life.states[12]


def test_parameters_that_are_emptied_or_replaced_behind_a_step_cost_a_record_at_most(root, one_thread):
    def between(life, step):
        if step in (8, 10):
            weight = life.model[4].weight
            before, weight.data = weight.data, torch.empty(0)
            life.opt.ckpt.end_step()
            weight.data = before if step == 8 else before.clone(memory_format=torch.preserve_format)

    life = Plain(root, between=between).train(14).end()
    found = Plain(root, between=between)
    assert found.restored.step >= 13 and found.at == life.states[found.restored.step]


def unfreeze(life, step):
    life.model[4].requires_grad_(step >= 9)


def test_a_layer_that_is_unfrozen_gets_its_state_in_a_full_checkpoint(root, one_thread):
    life = Life(root, between=unfreeze).train(12).end()
    found = Life(root, between=unfreeze)
    assert found.restored.step == 12 and found.at == life.states[12]


class Average:
    """An average of the weights in frozen parameters of the same model."""

    def __call__(self, life, step):
        with torch.no_grad():
            life.model.ema.lerp_(life.model[4].weight, 0.1)


def with_average() -> nn.Module:
    from journal_lives import net

    model = net()
    model.register_parameter("ema", nn.Parameter(torch.zeros_like(model[4].weight), requires_grad=False))
    return model


def test_an_average_of_the_weights_is_stored_as_buffers_are(root, one_thread):
    def make(params, lr):
        return torch.optim.AdamW([p for p in params if p.requires_grad], lr=lr)

    life = Life(root, make, model=with_average, between=Average()).train(11).end()
    assert 11 in journalled(root)
    found = Life(root, make, model=with_average, between=Average())
    assert found.restored.step == 11 and found.at == life.states[11]


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_frozen_parameter_that_another_one_replaces_is_in_the_next_checkpoint(root, one_thread, when):
    def make(params, lr):
        return torch.optim.AdamW([p for p in params if p.requires_grad], lr=lr)

    def replaced(life, step):
        if step == 8:
            life.model.ema = nn.Parameter(torch.ones_like(life.model.ema), requires_grad=False)

    life = Life(root, make, model=with_average, **{when: replaced}).train(11).end()
    assert journalled(root)[-1] == 11
    found = Life(root, make, model=with_average)
    assert found.restored.step == 11 and found.at == life.states[11]


class Own(torch.optim.SGD):
    """Of a class that is not PyTorch's."""


def with_tensor(params, lr):
    """Adafactor reads a rate that is a tensor on the host: its step is not split."""
    return torch.optim.Adafactor(params, lr=torch.tensor(lr))


CASES = {
    "whole": (with_tensor, "its own step runs whole"),
    "own class": (Own, "Own is not of torch.optim"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_known_to_be_repeatable_is_stored_in_full_and_it_is_said_once(root, one_thread, caplog, case):
    make, why = CASES[case]
    with caplog.at_level(logging.WARNING, "fxckpt"):
        life = Life(root, make).train(8).end()
    assert journalled(root) == [] and max(fulls(root)) == 8
    assert sum("no journal" in text for text in caplog.messages) == 1 and why in caplog.text
    assert Life(root, make).at == life.states[8]


def test_parameters_that_hold_other_tensors_are_named(one_thread):
    from torch.testing._internal.two_tensor import TwoTensor

    param = TwoTensor(torch.ones(3), torch.ones(3))
    member = SimpleNamespace(name="0.weight", param=param, local=param, plain=False)
    executor = SimpleNamespace(arranged=SimpleNamespace(members=[member]))
    stepper = SimpleNamespace(opt=torch.optim.SGD([torch.ones(3)], lr=0.1), whole=None, executor=executor)
    assert why_not_now(stepper, [torch.ones(3)], 1) == "0.weight is a TwoTensor, and steps of these were not compared"


def test_fused_steps_that_unscale_are_stored_in_full_and_it_is_said_once(root, one_thread, caplog):
    def scaled(life, step):
        life.opt.grad_scale, life.opt.found_inf = torch.tensor(1.0), torch.tensor(0.0)

    with caplog.at_level(logging.WARNING, "fxckpt"):
        Life(root, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True), before=scaled).train(8).end()
    assert journalled(root) == []
    assert sum("no journal" in text for text in caplog.messages) == 1 and "unscaled inside" in caplog.text


@pytest.fixture
def flushed():
    """In this thread numbers near zero are zero."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    yield
    torch.set_flush_denormal(False)


def test_where_numbers_near_zero_are_flushed_steps_are_stored_in_full_and_none_is_made_again(root, one_thread, caplog, flushed):
    with caplog.at_level(logging.WARNING, "fxckpt"):
        Life(root).train(8).end()
    assert journalled(root) == [] and sum("set_flush_denormal" in text for text in caplog.messages) == 1
    torch.set_flush_denormal(False)
    life = Life(root).train(12).end()
    torch.set_flush_denormal(True)
    with pytest.raises(SetupError, match=r"call it behind fxckpt.load\(\)"):
        Life(root)
    [run] = [each for each in fxckpt.run.run.live_runs if not each.status.stopped]
    run.shutdown()
    torch.set_flush_denormal(False)
    assert Life(root).at == life.states[12]


def test_one_of_several_ranks_stores_steps_in_full_and_it_is_said(root, caplog, monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.WARNING, "fxckpt"):
        opt = fxckpt.compile_step(torch.optim.SGD(model.parameters(), lr=0.1), root, model=model, every=1, journal=4)
    assert "no journal: this is one of 2 ranks" in caplog.text
    opt.ckpt.shutdown()


def test_a_process_group_that_comes_later_ends_the_journal_and_it_is_said(root, one_thread, caplog, monkeypatch):
    life = Life(root).train(9)
    life.opt.ckpt.flush()
    there = journalled(root)
    monkeypatch.setattr("fxckpt.journal.repeatable.world_size", lambda: 2)
    with caplog.at_level(logging.WARNING, "fxckpt"):
        life.train(13).end()
    assert there and set(journalled(root)) <= set(there) and max(fulls(root)) == 13
    assert sum("one of 2 ranks" in text for text in caplog.messages) == 1


def test_a_long_way_is_said_before_it_is_gone(root, one_thread, caplog):
    Life(root).train(11).end()
    with caplog.at_level(logging.INFO, "fxckpt"):
        Life(root).end()
    said = [text for text in caplog.messages if "from the journal" in text]
    assert len(said) == 2 and said[0].startswith("fxckpt: making step") and said[1].startswith("fxckpt: made step")


def test_a_store_that_lost_its_id_is_known_by_its_records_too(root, one_thread):
    life = Life(root).train(11).end()
    for name in ("store.json", "lock"):
        (root / name).unlink()
    (root / "notes.txt").write_text("of somebody else")
    assert Life(root).end().at == life.states[11]


def test_a_journal_goes_with_every_step_only_and_with_updates_after_the_backward(root):
    opt = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    for every in (2, "auto"):
        with pytest.raises(SetupError, match="every=1"):
            fxckpt.compile_step(opt, root, every=every, journal=4)
    with pytest.raises(SetupError, match="journal=0"):
        fxckpt.compile_step(opt, root, every=1, journal=0)
    with pytest.raises(SetupError, match="do not go together"):
        fxckpt.compile_step(opt, root, every=1, journal=4, updates="in_backward")


def test_bits_of_training_are_the_same_with_and_without_a_journal(root, one_thread):
    plain = Life(root / "a", journal=1).train(11).end()
    for writer in ("thread", "mock"):
        assert Life(root / writer, writer=writer).train(11).end().states == plain.states


def test_the_mock_writer_makes_records_too(root, one_thread):
    life = Life(root, writer="mock").train(6)
    life.opt.ckpt.flush()
    assert life.opt.ckpt.statistics()["last_handed_over_step"] == 6
    life.end()
    assert not os.path.exists(root)


def test_layers_are_a_third_of_the_bytes(root, one_thread):
    Life(root, model=larger).train(8).end()
    full = max(whole(each).record.nbytes for each in candidates(root))
    assert max(whole(each).record.nbytes for each in records(root)) < 0.45 * full
    assert digest(1)
