"""What shows a run, tells of it or reads it back knows the steps of a journal."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress

import pytest
import torch
from journal_lives import Life, journalled, larger, whole
from waiting import until

import fxckpt
from fxckpt.cli import main, watch
from fxckpt.store.reader import candidates


@pytest.fixture
def trained(root, one_thread):
    """A life of eleven steps, alive and at rest: the last full checkpoint, and records behind it."""
    life = Life(root, model=larger, on_commit=(told := [])).train(11)
    life.opt.ckpt.flush()
    life.told = told
    return life


def last_full(root) -> int:
    return max(whole(each).record.step for each in candidates(root))


def test_watch_says_which_step_is_durable_and_how_far_the_last_checkpoint_is(root, trained):
    view, full = watch.look(str(root)), last_full(root)
    assert (view.step, view.full_step, view.journal, view.writer) == (11, full, 6, os.getpid()) and full < 11
    assert (view.next_step, view.next_full_step) == (12, full + 6)
    [base] = [each.record for each in map(whole, candidates(root)) if each.record.step == full]
    assert view.nbytes == base.nbytes > view.record_nbytes > 0 and view.fits == view.free_bytes // view.nbytes
    assert min(view.bytes_per_second, view.record_bytes_per_second, view.write_seconds, view.record_write_seconds) > 0
    assert view.step_seconds > 0 and view.stall_share >= 0
    shown = dict(line.split("  ", 1) for line in watch.table(view))
    assert f"11 is durable, {11 - full} steps of the journal behind the checkpoint of step {full}" in shown["STEP"]
    assert "a checkpoint every 6 steps" in shown["JOURNAL"] and f"the next full checkpoint at {full + 6}" in shown["NEXT"]


def test_a_step_behind_a_record_that_is_gone_is_not_durable(root, trained):
    trained.end()
    gone = last_full(root) + 2
    shutil.rmtree(root / f"journal-{gone:09d}")
    assert (
        watch.look(str(root)).step == fxckpt.durable_steps(root)[-1] == Life(root, model=larger).end().restored.step == gone - 1
    )
    shutil.rmtree(root / f"step-{last_full(root):09d}")
    assert (
        watch.look(str(root)).step == fxckpt.durable_steps(root)[-1] == Life(root, model=larger).end().restored.step == gone - 3
    )


def test_steps_of_the_journal_are_listed_beside_checkpoints(root, trained):
    fulls = [each.step for each in fxckpt.checkpoints(root)]
    assert fulls == sorted(whole(each).record.step for each in candidates(root)) and fxckpt.latest(root).step == fulls[-1]
    found = fxckpt.durable_steps(root)
    assert found == sorted({*fulls, *journalled(root)}) and found[-1] == 11
    trained.end()
    again = Life(root, model=larger, load={"step": found[-2]}).train(found[-2] + 1)
    again.opt.ckpt.flush()
    assert fxckpt.durable_steps(root)[-1] == found[-2] + 1
    assert fxckpt.durable_steps(root.with_name("none")) == []


def test_a_callback_and_the_statistics_tell_records_from_checkpoints(root, trained):
    numbers = {done.step: done.journal for done in trained.told}
    assert [*numbers] == list(range(1, 12)) and [step for step, number in numbers.items() if number] == journalled(root)
    for step, number in numbers.items():
        assert number in (0, numbers[step - 1] + 1 if step > 1 else 0)
    sizes = {bool(done.journal): done.nbytes for done in trained.told}
    assert sizes[True] < sizes[False]
    found = trained.opt.ckpt.statistics()
    assert (found["checkpoints_committed"], found["records_committed"]) == (11, len(journalled(root)))


def test_a_plot_tells_records_from_checkpoints(root, trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(root), "-o", str(tmp_path / "run.svg"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    logged = {row["step"] for row in rows if row["journal"]}
    assert 11 in logged and logged == {*journalled(root)} & {row["step"] for row in rows}, "of those durable by then"
    assert "full checkpoint" in (tmp_path / "run.svg").read_text()
    assert main(["plot", str(root), "-o", str(tmp_path / "run.svg")]) == 0
    assert f"and {len(logged)} records of the journal, up to step 11" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["damaged", "removed"])
def test_a_record_that_cannot_be_read_back_is_not_built_on(root, one_thread, monkeypatch, how):
    life = Life(root, read_back="all").train(8)
    life.opt.ckpt.flush()
    store, commit, spoilt = life.opt.ckpt._run.store, life.opt.ckpt._run.store.commit, []

    def spoiling(slot, record, tensors):
        path = commit(slot, record, tensors)
        if record.journal is not None and not spoilt:
            spoilt.append(record.step)
            file = path / "gradients.safetensors"
            file.unlink() if how == "removed" else file.write_bytes(file.read_bytes()[:-1] + b"x")
        return path

    monkeypatch.setattr(store, "commit", spoiling)
    for step in range(9, 15):
        life.train(step)
        with suppress(fxckpt.FxckptError):
            life.opt.ckpt.flush()
    found, fulls = life.opt.ckpt.statistics(), [each.step for each in fxckpt.checkpoints(root)]
    assert any(spoilt[0] < step <= spoilt[0] + 2 for step in fulls), "the next one is a full one"
    assert found["last_committed_step"] == fxckpt.durable_steps(root)[-1] == 14
    assert found["checkpoints_failed"] == (how == "damaged") and (how == "removed" or spoilt[0] not in journalled(root))
    assert bool(list(root.glob("journal-slot-*.bad"))) == (how == "damaged")
    life.end()
    again = Life(root)
    assert again.restored.step == 14 and again.at == life.states[14]


def test_steps_behind_a_checkpoint_that_cannot_be_read_back_are_not_counted_as_durable(root, one_thread):
    life = Life(root, read_back="off").train(11)
    life.opt.ckpt.flush()
    run, full = life.opt.ckpt._run, last_full(root)
    assert full < 11
    [slot] = [each for each in run.store._pool._committed if each.path.endswith(f"step-{full:09d}")]
    file = root / f"step-{full:09d}" / "model.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    run.store._read_back._mode, run.store._read_back._waiting = "all", (slot, full)
    run.saver._committer.rest(lambda: False)  # or the thread that commits did
    until(lambda: life.opt.ckpt.statistics()["last_committed_step"] == fxckpt.durable_steps(root)[-1] == full - 1)
    run.saver.tally.unreported = None
    life.train(12).opt.ckpt.flush()
    assert last_full(root) == 12
    assert torch.isfinite(life.model[4].weight).all()
