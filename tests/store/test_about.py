"""What every record repeats of its run: the past, thinned out; where the store began; and that nothing malformed is shown."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from small_training import Training
from storing import a_record

import fxckpt
from fxckpt.store import about
from fxckpt.store.reader import Reader
from fxckpt.store.record import Record


def noted(steps: range) -> about.About:
    """A run that committed these steps: one a second, two seconds to write 10 bytes, a tenth of a second of stall each."""
    found = about.About(1, 4711)
    for step in steps:
        found.note(step, float(step), float(step), step + 2.0, 10, step / 10, {"loss": 1.0 / step})
    return found


def read_back(record: Record) -> Record:
    """Through the bytes of commit.json."""
    return Record.from_bytes(record.to_bytes(), "commit.json")


def test_a_long_history_is_thinned_out_and_its_sums_stay_right():
    found = noted(range(1, 5001))
    past = about.history(read_back(a_record(5001, state=found.to_state())))
    steps = [each.step for each in past]
    assert (
        len(past) <= about.ROWS + 1
        and steps == sorted(set(steps))
        and steps[-about.NEWEST :] == [*range(5002 - about.NEWEST, 5002)]
    )
    assert all((each.written, each.stall) == (10 * each.step, pytest.approx(each.step / 10)) for each in past[:-1])
    gaps = [b - a for a, b in pairwise(steps)]
    assert gaps[:8] == sorted(gaps[:8], reverse=True) and gaps[0] > 100, "the older, the wider apart"


def test_of_a_history_with_a_journal_records_go_before_checkpoints():
    found = about.About(1, 4711)
    found.journal = 16
    for step in range(1, 2001):
        found.note(step, float(step), float(step), step + 2.0, 10, 0.0, {}, journal=step % 16 != 1)
    record = read_back(a_record(2001, state=found.to_state()))
    past = about.history(record)
    assert about.watched(record) == (1, 4711, 16) and len(past) <= about.ROWS + 1
    assert all(each.journal == (each.step % 16 != 1) for each in past[:-1])
    assert [each.step for each in past[-33:]] == [*range(1969, 2002)] and past[0].step == 1
    assert sum(not each.journal for each in past[:-33]) > 16, "the older ones are full ones"
    assert all(each.written == 10 * each.step for each in past[:-1])


def test_a_run_that_goes_on_adds_to_the_sums_of_the_one_before_and_marks_where_it_began():
    first = a_record(4, state=noted(range(1, 4)).to_state())
    second = about.About(2, 4712)
    second.continue_from(read_back(first), 5.0)  # this process had waited five seconds before it loaded
    second.note(5, 50.0, 50.0, 51.0, 10, 5.5, {})
    past = about.history(read_back(a_record(6, state=second.to_state())))
    assert [(each.step, each.committed is None) for each in past] == [
        (1, False), (2, False), (3, False), (4, True), (5, False), (6, True)
    ]  # fmt: skip
    assert past[-2].stall == pytest.approx(0.3 + 0.5) and past[-2].written == 30 + 0 + 10
    assert about.watched(read_back(a_record(6, state=second.to_state()))) == (2, 4712, None)


def test_a_load_of_an_older_step_forgets_what_came_after_it():
    run = noted(range(1, 6))
    run.continue_from(a_record(2, state=noted(range(1, 2)).to_state()), 0.0)
    assert [each.step for each in about.history(a_record(3, state=run.to_state()))] == [1, 2, 3]


def test_metrics_that_are_not_finite_come_through():
    found = about.About("auto", 1)
    found.note(1, 1.0, 1.0, 2.0, 1, 0.0, {"loss": math.nan, "best": -math.inf})
    metrics = about.history(read_back(a_record(2, state=found.to_state())))[0].metrics
    assert math.isnan(metrics["loss"]) and metrics["best"] == -math.inf


FOREIGN = [
    None, [], {"history": 3}, {"history": {"rows": 7, "every": [], "pid": "x"}}, {"origin": {"time": 1}}, {"config": 5},
    {"history": {"rows": [[1], [-1, 0, 0, 0, 0, 0, 0, {}], None], "journal": -3}},
    {"history": {"rows": [[1, 0, 0, 0, 0, 0, 0, {}, 5], [1, 0, 0, 0, 0, 0, 0, {}, True, 1]], "journal": "x"}},
    {"imported": {"source": {"!": "no"}, "format": "x", "time": 1}},
]  # fmt: skip


@pytest.mark.parametrize("state", FOREIGN)
def test_what_another_program_wrote_there_is_not_shown_and_no_error(state):
    record = read_back(a_record(3, state=state))
    assert [each.step for each in about.history(record)] == [3]
    assert about.origin(record) is None and about.config(record) is None and about.watched(record) == (None, None, None)


def test_a_training_keeps_the_history_of_checkpoints_that_are_gone_over_lives(root):
    for life in (1, 2):
        training = Training(root, keep=1)
        fxckpt.load(optimizer=training.opt)
        for _ in range(3):
            training.train()
            training.opt.ckpt.note(loss=float(life))
            training.opt.ckpt.flush()  # a record knows those that are durable when its step closes
        training.end()
    (only,) = fxckpt.checkpoints(root)
    past = about.history(Reader(only.path).record)
    assert [each.step for each in past] == [1, 2, 3, 4, 5, 6]
    assert [each.step for each in past if each.committed is None] == [3, 6]
    assert [each.metrics["loss"] for each in past] == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
