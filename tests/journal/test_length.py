"""``journal="auto"``: how many steps lie between two full checkpoints is chosen from what was measured, and said."""

from __future__ import annotations

import dataclasses
import logging
from itertools import pairwise

import pytest
import torch
from journal_lives import Life, larger

import fxckpt
from fxckpt.errors import SetupError
from fxckpt.journal.length import Choice, Measured, Trial, choose, describe
from fxckpt.saving.landing import Landing
from fxckpt.store.record_pool import records_that_fit

FAST = Measured(
    full=300_000_000, record=100_000_000, bandwidth=2e9, step_seconds=0.2, update_seconds=0.01, room=1000
)  # AdamW; the disk takes four records in a step


def choice(restore_seconds: float = 30.0, **other: float) -> tuple[int, str]:
    found = choose(dataclasses.replace(FAST, **other), restore_seconds)
    return found.steps, found.why


def test_full_checkpoints_are_so_far_apart_that_more_steps_would_save_next_to_nothing():
    assert choice() == (64, "more steps would have hardly fewer bytes")
    assert choice(full=200_000_000)[0] == 32, "SGD with momentum"
    assert choice(bandwidth=1e12, step_seconds=60.0)[0] == 64, "however fast the disk"


def test_they_are_farther_apart_where_the_disk_would_not_keep_up_with_them():
    # 102 MB a step: 2 MB beside the record's 100, for the 200 MB that a full checkpoint has more
    assert choice(bandwidth=0.51e9) == (100, "with fewer steps the disk would not keep up")


def test_no_more_steps_than_a_load_can_make_again_in_the_time_it_has():
    steps, why = choice(restore_seconds=1.21)  # 0.06 s each: 50 ms of reading, 10 of update
    assert steps == 1 + 20 and "1.21 s longer" in why
    assert choice(restore_seconds=1.21, update_seconds=0.07)[0] == 1 + 10
    assert choice(restore_seconds=1.21, bandwidth=1e9)[0] == 1 + 11


def test_no_more_records_than_the_disk_has_room_for():
    steps, why = choice(room=9)
    assert steps == 10 and "no room" in why
    assert choice(room=0)[0] == 1


def test_a_disk_that_is_too_slow_for_records_alone_is_said():
    steps, why = choice(bandwidth=0.4e9, restore_seconds=1000)
    assert steps == 64 and "training will wait" in why
    assert "training will wait" not in choice()[1]


def test_no_journal_where_a_record_is_as_large_as_a_full_checkpoint():
    steps, why = choice(full=101_000_000)
    assert steps == 1 and "nearly the bytes" in why


def test_the_line_says_what_was_chosen_and_by_which_numbers():
    line = describe(FAST, choose(FAST, 30.0))
    assert line == (
        "journal='auto': a full checkpoint every 64 steps: more steps would have hardly fewer bytes (300 MB a full checkpoint, "
        "100 MB a record; 2000 MB/s to the disk, 0.2 s a step; load() makes 63 steps again at most, in about 3.8 s)"
    )


def test_the_room_on_a_disk_is_shared_by_the_checkpoints_that_are_kept(tmp_path):
    one, many = records_that_fit(str(tmp_path), 1, 1 << 20), records_that_fit(str(tmp_path), 3, 1 << 20)
    assert many > 0 and one == pytest.approx(2 * many, rel=0.2)
    assert records_that_fit("", 1, 1 << 40) > 1 << 40 < records_that_fit(str(tmp_path / "gone"), 1, 1 << 40)


def test_the_updates_of_several_optimizers_count_as_one_step():
    trial = Trial(30.0, lambda nbytes: 1000)
    for turn in range(10):
        at = 1.0 * turn
        trial.updated((at, 0.0), (at + 0.01, 0.0))
        trial.updated((at + 0.5, 0.0), (at + 0.53, 0.0))
        trial.taken(Landing(turn, nbytes=100 if turn else 300, seconds=0.5), record=turn > 0)
    found = trial.measured()
    assert found is not None and found.step_seconds == pytest.approx(1.0) and found.update_seconds == pytest.approx(0.04)


def test_a_run_measures_chooses_once_says_it_and_goes_on_with_the_same_bits(root, one_thread, caplog, monkeypatch):
    seen = []

    def chosen(found: Measured, restore_seconds: float) -> Choice:
        seen.append((found, restore_seconds))
        return Choice(9, "so it was asked")

    monkeypatch.setattr("fxckpt.journal.whether.choose", chosen)
    with caplog.at_level(logging.INFO, "fxckpt"):
        life = Life(root, journal="auto", model=larger, keep=3).train(40).end()
    [(found, limit)], [line] = seen, [text for text in caplog.messages if "journal='auto': " in text]
    assert limit == 30 and "every 9 steps: so it was asked" in line
    assert found.full > 2.5 * found.record > 0 and found.update_seconds >= 0 and found.step_seconds > 0 and found.room > 0
    assert found.bandwidth > 0 and life.opt.ckpt._run.chain.whether.trial is None
    fulls = [each.step for each in fxckpt.checkpoints(root)]
    assert [b - a for a, b in pairwise(fulls)] == [9, 9]
    found = Life(root, journal="auto", model=larger)
    assert found.restored.step == 40 and found.at == life.states[40]


def test_a_limit_of_time_is_held(root, one_thread, caplog):
    with caplog.at_level(logging.INFO, "fxckpt"):
        life = Life(root, journal="auto", restore_seconds=1e-9, model=larger).train(24).end()
    assert life.opt.ckpt._run.chain.whether.length == 1 and fxckpt.latest(root).step == 24
    assert sum("1e-09 s longer at most" in text for text in caplog.messages) == 1


def test_other_values_are_refused_with_what_can_be_said(root):
    opt = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    for given, said in (
        ({"journal": "often"}, "journal='often': expected a whole number"),
        ({"journal": "auto", "every": "auto"}, "goes with every=1"),
        ({"journal": "auto", "restore_seconds": 0}, "restore_seconds=0"),
        ({"journal": "auto", "updates": "in_backward"}, "do not go together"),
    ):
        with pytest.raises(SetupError, match=said):
            fxckpt.compile_step(opt, root, **{"every": 1, **given})
