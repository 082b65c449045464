"""What is kept beyond the newest ``keep``: every so many steps or minutes for good, and the best by a metric."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import Training
from storing import names, start

import fxckpt
from fxckpt.errors import SetupError
from fxckpt.store.reader import Reader, candidates, checkpoints
from fxckpt.store.retention import BAD, GOOD, UNKNOWN, CheckpointStatus, Policy, beyond, newest, surplus


def steps(root) -> list[int]:
    """The steps there are, each of which verifies."""
    found = checkpoints(root)
    for each in found:
        Reader(each.path).verify()
    return [each.step for each in found]


# ---- the decision ----

CHECKPOINTS = st.lists(st.tuples(st.sampled_from([GOOD, GOOD, UNKNOWN, BAD]), st.booleans(), st.none() | st.integers(0, 3),
                                 st.booleans()), max_size=8)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(CHECKPOINTS, st.integers(1, 3), st.integers(0, 9))
def test_giving_up_ends_with_the_newest_and_those_beyond_and_never_with_too_few(drawn, keep, pin):
    there = [CheckpointStatus(i, None, trust, lasting, score) for i, (trust, lasting, score, _) in enumerate(drawn)]
    lineage = {i for i, (_, _, _, ours) in enumerate(drawn) if ours}
    pinned = pin if pin < len(there) and there[pin].trust == GOOD else None
    good = sum(each.trust == GOOD for each in there)
    first_beyond = beyond(there, keep, lineage, pinned)
    while (gone := surplus(there, keep, lineage, pinned)) is not None:
        there.remove(gone)
        assert gone.generation != pinned
        assert gone.trust == BAD or gone not in first_beyond
        assert gone.trust == BAD or sum(each.trust == GOOD for each in there) >= keep
        assert sum(each.trust == GOOD for each in there) >= min(good, keep)
    assert {each.generation for each in beyond(there, keep, lineage, pinned)} == {e.generation for e in first_beyond}
    if good >= keep:
        stay = {e.generation for e in (*newest(there, keep, lineage, pinned), *first_beyond)} | {pinned} - {None}
        assert {each.generation for each in there} == stay


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 12))
def test_each_multiple_of_the_steps_has_one_checkpoint_the_first_behind_it(gaps, every):
    policy, before, kept, step = Policy(every=every), None, [], 0
    taken = []
    for gap in gaps:
        step += gap
        taken.append(step)
        if policy.lasting(before, step, 0.0) is not None:
            kept.append(step)
        before = (step, 0.0)
    multiples = {step // every for step in taken} - {0}
    assert kept == [min(step for step in taken if step // every == multiple) for multiple in sorted(multiples)]


def test_of_equally_good_ones_the_first_is_the_best():
    there = [CheckpointStatus(i, None, GOOD, False, score) for i, score in enumerate((2.0, 1.0, 1.0, 5.0, 5.0))]
    assert [each.generation for each in beyond(there, 2, set(), None)] == [1]


@pytest.mark.parametrize("options", [{"keep_every": 0}, {"keep_every": 1.5}, {"keep_minutes": 0}, {"keep_minutes": "5"},
                                     {"keep_best": ""}, {"keep_best": ("loss", "least")}, {"keep_best": ("a", "b", "c")},
                                     {"keep_best": 3}, {"keep_minutes": math.nan}])  # fmt: skip
def test_what_cannot_be_meant_is_refused_at_once(options, root):
    with pytest.raises(SetupError, match=next(iter(options))):
        start(root, **options)
    with pytest.raises(SetupError, match=next(iter(options))):
        fxckpt.compile_step(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), root, **options)


# ---- for good ----


def test_every_tenth_step_stays_for_good_and_slots_are_still_recycled(root):
    trainer = start(root, keep=2, max_async=1, keep_every=10)
    for step in range(1, 36):
        trainer.save(step)
        kept = step // 10
        assert len(names(root)) <= 3 + kept
    assert steps(root) == [10, 20, 30, 34, 35] and len(names(root)) == 6
    assert [each.lasting for each in checkpoints(root)] == ["steps", "steps", "steps", None, None]
    trainer.close()


def test_what_is_kept_for_good_stays_in_later_runs_whatever_their_options(root):
    trainer = start(root, keep=1, max_async=1, keep_every=3)
    for step in range(1, 8):
        trainer.save(step)
    trainer.close()
    trainer = start(root, keep=1, max_async=1)
    for step in range(8, 14):
        trainer.save(step)
    trainer.close()
    assert steps(root) == [3, 6, 13]
    trainer = start(root, keep=1, max_async=1, keep_every=5)
    for step in range(14, 18):
        trainer.save(step)
    trainer.close()
    assert steps(root) == [3, 6, 15, 17]


def test_a_multiple_that_was_missed_is_made_up_for_across_a_restart(root):
    trainer = start(root, keep=1, max_async=1, keep_every=10)
    trainer.save(9)
    trainer.close()
    trainer = start(root, keep=1, max_async=1, keep_every=10)
    for step in (12, 13, 14):
        trainer.save(step)
    trainer.close()
    assert steps(root) == [12, 14]


def test_a_named_save_does_not_stand_in_for_one_that_is_kept_for_good(root):
    trainer = start(root, keep=1, max_async=1, keep_every=10)
    trainer.save(9)
    trainer.save(10, name="mine")
    for step in (11, 12, 13):
        trainer.save(step)
    trainer.close()
    assert steps(root) == [10, 11, 13]


def test_a_branch_after_a_rollback_keeps_its_own_and_does_not_lose_the_others(root):
    trainer = start(root, keep=1, max_async=1, keep_every=10)
    for step in (5, 10, 15, 20, 25):
        trainer.save(step)
    trainer.store.mark_loaded(next(each.generation for each in checkpoints(root) if each.step == 10))
    for step in (15, 20, 25):
        trainer.save(step)
    trainer.close()
    assert steps(root) == [10, 20, 20, 25]


def test_the_first_checkpoint_of_each_so_many_minutes_stays(root):
    trainer = start(root, keep=1, max_async=1, keep_minutes=0.5)  # a step of the tests' trainer takes a second
    for step in range(10, 100, 7):
        trainer.save(step)
    trainer.close()
    assert steps(root) == [31, 66, 94]  # 30, 60 and 90 seconds were crossed
    assert checkpoints(root)[0].lasting == "minutes"


def test_a_damaged_one_is_not_kept_for_good(root):
    trainer = start(root, keep=1, max_async=1, keep_every=2)
    for step in (1, 2, 3, 4):
        trainer.save(step)
    trainer.close()
    (checkpoints(root)[0].path / "commit.json").write_bytes(b"")
    trainer = start(root, keep=1, max_async=1, keep_every=2)
    trainer.save(5)
    trainer.close()
    assert steps(root) == [4, 5]


def test_starting_over_gives_up_what_an_earlier_life_kept_for_good(root):
    trainer = start(root, keep=1, max_async=1, keep_every=2, keep_best="loss")
    for step in (1, 2, 3):
        trainer.save(step, loss=0.1)
    trainer.close()
    trainer = start(root, load=False, fresh=True, keep=1, max_async=1, keep_every=2, keep_best="loss")
    for step in (1, 2, 3):
        trainer.save(step, loss=5.0 + step)
    trainer.close()
    assert [(each.step, each.metrics["loss"]) for each in checkpoints(root)] == [(1, 6.0), (2, 7.0), (3, 8.0)]


# ---- the best ----


def test_the_best_stays_until_a_better_one_comes_and_its_slot_is_used_again(root):
    trainer = start(root, keep=1, max_async=1, keep_best="loss")
    there = []
    for step, loss in enumerate([5.0, 3.0, 4.0, 9.0, 2.5, 2.5, math.nan, -math.inf, 7.0], 1):
        trainer.save(step, loss=loss)
        there.append(steps(root))
        assert len(names(root)) <= 3
    trainer.save(10)  # nothing was noted
    assert there == [[1], [2], [2, 3], [2, 4], [5], [5, 6], [5, 7], [5, 8], [5, 9]]
    assert steps(root) == [5, 10]
    trainer.close()


def test_the_best_can_be_the_highest_and_is_known_again_after_a_restart(root):
    trainer = start(root, keep=1, max_async=1, keep_best=("accuracy", "max"))
    for step, accuracy in enumerate([0.1, 0.9, 0.5], 1):
        trainer.save(step, accuracy=accuracy)
    trainer.close()
    trainer = start(root, keep=1, max_async=1, keep_best=("accuracy", "max"))
    trainer.save(4, accuracy=0.7)
    trainer.save(5, accuracy=0.8)
    assert steps(root) == [2, 5]
    trainer.save(6, accuracy=0.95)
    assert steps(root) == [6]
    trainer.close()


def test_metrics_come_back_to_the_bit(root):
    noted = {"a": 0.1, "nan": math.nan, "low": -math.inf, "whole": 3.0, "": 5e-324}
    trainer = start(root)
    path = trainer.finish(1, *trainer.begin(1), metrics=noted)
    trainer.close()
    assert {name: value.hex() for name, value in Reader(path).record.metrics.items()} == {
        name: value.hex() for name, value in noted.items()
    }


# ---- through compile_step ----


@pytest.mark.usefixtures("one_thread")
def test_a_note_goes_to_the_checkpoint_whose_step_closes_next_and_to_no_other(tmp_path):
    training = Training(tmp_path / "d", every=2)
    training.opt.ckpt.note(loss=1, other=2.0)
    training.train(1)
    training.opt.ckpt.note(loss=torch.tensor(0.25))  # replaces the 1
    training.train(1)
    training.opt.ckpt.end_step()
    training.opt.ckpt.note(late=3)
    training.train(4)
    training.opt.ckpt.save("named")
    training.end()
    noted = {(found.record.step, found.record.name): found.record.metrics for found in candidates(tmp_path / "d")}
    assert noted == {(2, None): {"loss": 0.25, "other": 2.0}, (4, None): {"late": 3.0}, (6, None): {}, (6, "named"): {}}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), [1.0]])
def test_a_note_that_is_no_number_is_refused(value, tmp_path):
    training = Training(tmp_path / "d")
    with pytest.raises(SetupError, match="note"):
        training.opt.ckpt.note(loss=value)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("writer", ["thread", "monitor"])
def test_the_options_of_compile_step_keep_the_best_and_every_third_and_all_load(writer, tmp_path):
    training = Training(tmp_path / "d", keep=1, max_async=1, keep_every=3, keep_best="loss", writer=writer)
    for step in range(1, 9):
        training.train(1)
        training.opt.ckpt.note(loss=abs(step - 5))
        training.opt.ckpt.flush()
    training.end()
    assert [each.step for each in fxckpt.checkpoints(tmp_path / "d")] == [3, 5, 6, 8]
    again = Training(tmp_path / "d", keep=1, seed=1)
    for step in (3, 5, 6, 8):
        assert fxckpt.load(step=step).step == step
        assert all(torch.equal(again.now()[key], value) for key, value in training.reference[step].items())
    again.end()
