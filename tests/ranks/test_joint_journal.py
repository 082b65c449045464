"""A journal of ranks that write one store together: each writes its share of the gradients, and all make the same steps again.

``FXCKPT_LIVES`` says how many lives the campaign has (``make ranks``), of each layout.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digests import differences, digest, snapshot
from joint_ranks import Job, Normed
from rank_server import Ranks

import fxckpt
from fxckpt.cli import main
from fxckpt.errors import Corrupt, RanksDisagree, SetupError
from fxckpt.journal.replay import Replay
from fxckpt.store import names
from fxckpt.store.journaled import Broken, durable_steps
from fxckpt.store.parts import part_of
from fxckpt.store.reader import Candidate, Reader, candidates, checkpoints, records
from fxckpt.store.record import Record

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {"ddp": 2, "fsdp": 2, "tp": 2, "hsdp": 4, "fsdp_tp": 4}
"""With their ranks."""

OPTIMIZERS = {"ddp": "adamw", "single": "adamw", "fsdp": "adamw", "tp": "sgd", "hsdp": "foreach", "fsdp_tp": "fused"}
"""Of those that torch steps in this layout: its fused kernels take no DTensors beside plain tensors."""

LIVES = int(os.environ.get("FXCKPT_LIVES", "2"))
SEED = int(os.environ.get("FXCKPT_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)


def begin(job: Job, steps: int = 0, **options: Any) -> list[Any]:
    """Start all, behind what they load; each has made so many steps, of which records can follow."""
    found = job.begin(**{"journal": 10, "make": Normed, **options})
    for _ in range(steps):  # each waited for: here, one's first step has the other bind its tensors anew, and that costs a record
        job.train(1)
        assert job.flush() == [None, None]
    return found


def recorded(root: Path) -> dict[int, Candidate]:
    """The records that are there, by step. None may be damaged."""
    found = records(root)
    assert all(isinstance(each, Candidate) for each in found), found
    return {each.record.step: each for each in found}


def now(job: Job, rank: int) -> dict[str, torch.Tensor]:
    return snapshot(job.runs[rank].model, job.runs[rank].opt)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def test_each_gradient_is_written_by_one_rank_and_each_has_its_own_buffers(job, root):
    begin(job, 8)
    assert job.end() == []
    assert durable_steps(root)[-1] == 8 and len(recorded(root)) >= 4
    for each in recorded(root).values():
        Reader(each.path).verify()
        written = [[t.key for t in rank.tensors(names.GRADIENTS)] for rank in each.record.ranks]
        params = sorted(f"gradient/{name}" for name, _ in job.runs[0].model.named_parameters())
        assert sorted([*written[0], *written[1]]) == params and all(written)
        assert [rank.tensors(names.MODEL)[0].key for rank in each.record.ranks] == ["norm.running_mean"] * 2
    assert [run.opt.ckpt.statistics()["records_committed"] for run in job.runs] == [len(recorded(root))] * 2


def test_all_go_on_from_a_record_with_the_bits_of_a_run_that_went_on(job, root, monkeypatch):
    begin(job, 7)
    for rank, run in enumerate(job.runs):
        run.model.norm.running_mean.fill_(rank + 1.0)
    job.train(1)
    job.end()
    again = Job(root, monkeypatch)
    found = begin(again)
    assert [each.step for each in found] == [8, 8] and all(each.path == recorded(root)[8].path for each in found)
    for rank in range(2):
        assert differences(now(again, rank), job.runs[rank].reference[8]) == []
    assert not torch.equal(*(run.model.norm.running_mean for run in again.runs))
    again.train(3)
    whole = Job(root.parent / "whole", monkeypatch)
    begin(whole, 7)
    for rank, run in enumerate(whole.runs):
        run.model.norm.running_mean.fill_(rank + 1.0)
    whole.train(4)
    for rank in range(2):
        assert again.runs[rank].losses == whole.runs[rank].losses[8:]
        assert differences(again.runs[rank].reference[11], whole.runs[rank].reference[11]) == []
    for each in (again, whole):
        each.end()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_in_the_share_of_one_rank_takes_all_to_the_step_before(rank, job, root, caplog):
    begin(job, 8)
    reference = [run.reference[6] for run in job.runs]
    job.end()
    flip(recorded(root)[7].path / names.of_rank(names.GRADIENTS, rank, 2))
    found = begin(job)
    assert [each.step for each in found] == [6, 6]
    assert any("journal-000000007" in path for path, _ in found[rank].skipped)
    assert [differences(now(job, each), reference[each]) for each in range(2)] == [[], []]
    job.train(2)
    assert job.end() == [] and max(recorded(root)) == 6, "what lay behind it is gone"


def test_a_checkpoint_that_rotted_takes_its_steps_with_it_on_all_ranks(job, root):
    begin(job, 11, journal=4)
    job.end()
    fulls = [each.step for each in checkpoints(root)]
    flip(root / names.step_name(fulls[-1]) / names.of_rank(names.OPTIMIZER, 1, 2))
    wanted = max(step for step in durable_steps(root) if step < fulls[-1])
    assert [each.step for each in begin(job)] == [wanted, wanted]
    job.end()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_one_rank_cannot_make_again_is_loaded_by_none(rank, job, root, monkeypatch, caplog):
    begin(job, 8)
    reference = [run.reference[6] for run in job.runs]
    job.end()
    compare = Replay._compare

    def differs(self, index, reader):
        if job._here.rank == rank and reader.record.step == 7:
            raise Broken(index, Corrupt(reader.path, "it is not what training had"))
        compare(self, index, reader)

    monkeypatch.setattr(Replay, "_compare", differs)
    assert [each.step for each in begin(job)] == [6, 6]
    assert "is not what training had; looking for an older step" in caplog.text
    assert [differences(now(job, each), reference[each]) for each in range(2)] == [[], []]
    job.end()


def test_a_step_can_be_asked_for_and_what_lay_behind_it_is_cut_off(job, root):
    begin(job, 8)
    reference = [run.reference[6] for run in job.runs]
    job.end()
    assert job.begin(load=False, journal=10, make=Normed) == []
    assert [each.step for each in job.load(step=6)] == [6, 6]
    assert [differences(now(job, rank), reference[rank]) for rank in range(2)] == [[], []]
    job.train(1)
    assert job.flush() == [None, None]
    assert max(recorded(root)) == 6 and durable_steps(root)[-1] == 7
    job.end()


def test_ranks_that_take_other_steps_for_records_lose_none_that_was_acknowledged_and_soon_take_none(job, root, caplog):
    begin(job, on_error="warn")
    job.runs[1].opt.ckpt._run.chain.next = lambda full, stepper: None
    for _ in range(14):
        job.train(1)
        assert job.flush() == [None, None]
    assert [each.step for each in checkpoints(root)][-3:] == [12, 13, 14] and recorded(root) == {}
    assert caplog.text.count("no journal: the ranks do not agree on which steps can be records of it") == 1
    assert [run.opt.ckpt.statistics()["checkpoints_failed"] for run in job.runs] == [0, 0]
    job.end()


def test_a_rank_whose_gradients_differ_is_named_at_that_record(job, root, caplog):
    begin(job, 6)
    job.runs[1].model.inner[2].weight.register_hook(lambda grad: grad * 1.5)
    job.train(1)
    job.flush()
    assert "replicas differ at step 7" in caplog.text and "gradient/inner.2.weight" in caplog.text
    job.end()


def test_another_number_of_ranks_and_one_process_make_the_steps_again(job, root, monkeypatch):
    begin(job, 8)
    reference = {key: value for key, value in job.runs[0].reference[8].items() if not key.startswith("norm.run")}
    job.end()
    model = Normed()
    assert fxckpt.load(root, model=model).step == 8
    found = {key: value for key, value in snapshot(model).items() if key in reference}
    assert differences(found, {key: reference[key] for key in found}) == []
    three = Job(root, monkeypatch, world=3)
    assert [each.step for each in begin(three)] == [8, 8, 8]
    for rank in range(3):
        assert [key for key in differences(now(three, rank), reference) if not key.startswith("norm.run")] == []
    three.end()


def test_the_commands_know_records_of_several_ranks(job, root, capsys, tmp_path):
    begin(job, 8)
    reference = job.runs[0].reference[8]
    job.end()
    assert main(["ls", str(root), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in rows if row["journal"]] == sorted(recorded(root))
    assert main(["verify", str(root), "--replay"]) == 0
    assert "made again" in capsys.readouterr().out
    assert main(["inspect", str(root), "8"]) == 0
    assert "written by 2 ranks together" in capsys.readouterr().out
    assert main(["export", str(root), str(tmp_path / "model.pt"), "--format", "torch", "--optimizer"]) == 0
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    wanted = {key: value for key, value in reference.items() if "/" not in key}
    assert differences({**wanted, **{k: v for k, v in found["model"].items() if k in wanted}}, wanted) == []


def test_one_process_goes_on_from_a_record_of_several(job, root, monkeypatch):
    from small_training import Training

    begin(job, 8)
    reference = job.runs[0].reference[8]
    job.end()
    monkeypatch.undo()  # what makes this process one of several
    alone = Training(root, make=Normed, journal=10)
    assert fxckpt.load(optimizer=alone.opt).step == 8
    assert differences(alone.now(), reference) == []
    alone.train(3).end()
    assert durable_steps(root)[-1] == 11


def test_records_are_given_up_with_their_checkpoint_and_files_go_back_and_forth(job, root):
    begin(job, 2, keep=1, max_async=1, journal=4)
    for _ in range(16):
        job.train(1)
        job.flush()
    bases = {each.record.generation for each in candidates(root)}
    assert {each.record.journal.base for each in recorded(root).values()} <= bases
    assert len(list(root.glob("journal-*"))) <= 2 * 3 + 1
    assert len(list((root / "ranks" / "00001").glob("journal-slot-*"))) <= 2
    assert len(list(root.rglob("gradients-00002-of-00002.safetensors*"))) <= 2 * 3 + 1 + 2
    job.end()


def test_the_same_journal_is_asked_for_on_all_ranks(job, root):
    def differ(rank: int) -> Any:
        from small_training import Training

        return Training(root, make=Normed, journal=4 + rank)

    found = job.each(differ)
    assert all(isinstance(each, SetupError) and "need the same journal=" in str(each) for each in found)


def test_a_length_that_each_rank_would_measure_for_itself_is_none(job, root, caplog):
    begin(job, journal="auto")
    job.train(3)
    job.end()
    assert [each.step for each in checkpoints(root)] == [1, 2, 3] and recorded(root) == {}
    assert caplog.text.count('no journal: journal="auto" goes by what each rank measures') == 2


def test_a_failed_record_is_followed_by_a_full_checkpoint_on_all(job, root, monkeypatch):
    begin(job, 6, on_error="warn")
    other = job.runs[1].opt.ckpt._run.store
    monkeypatch.setattr(other, "commit", lambda *a: (_ for _ in ()).throw(fxckpt.SaveFailed("write", "part", None, 5)))
    job.train(1)
    failed = job.flush()
    assert isinstance(failed[0], RanksDisagree) and "rank 1 failed" in str(failed[0])
    monkeypatch.undo()
    job.train(2)
    assert job.flush() == [None, None]
    assert checkpoints(root)[-1].step == 8 and max(recorded(root)) == 9
    job.end()


# ---- in processes of their own ----


@pytest.fixture
def live(rank_server, tmp_path):
    """Lives of two ranks or more, in a folder of the test."""

    def life(directory: str, steps: int, layout: str = "fsdp", world: int = 2, **more: Any) -> Ranks:
        asked = {"script": "sharded_run", "cwd": str(tmp_path), "dir": directory, "layout": layout, "world": world}
        options = {"update": "native", "journal": 5, "optimizer": OPTIMIZERS.get(layout, "adamw")}
        return rank_server.live({**asked, "steps": steps, **options, **more})

    return life


def only(ranks: Ranks, what: str) -> Any:
    """What all ranks of a life say."""
    assert all(each is not None and "error" not in each for each in ranks), ranks
    found = {each[what] for each in ranks if each is not None}
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize("layout", LAYOUTS if LIVES > 3 else ["ddp", "fsdp"])
def test_killed_ranks_lose_no_step_that_was_acknowledged_and_end_with_the_same_bits(layout, live, tmp_path):
    draw, steps, world = random.Random(f"{SEED}{layout}"), 8 + 5 * LIVES, LAYOUTS[layout]
    log = tmp_path / "killed.log"
    plain, whole = live("", steps, layout, world, load=False), live("whole", steps, layout, world, log="parts")
    at = 0
    for _ in range(LIVES):
        which, when = draw.sample(range(world), draw.randint(1, world)), min(at + draw.randint(1, 7), steps)
        live("killed", steps, layout, world, log="parts", kill=[which, when, draw.random() * 0.03])
        at = int(log.read_text().splitlines()[-1].split()[0]) if log.exists() else 0
    last = live("killed", steps, layout, world, log="parts")
    assert only(last, "left") == only(whole, "left") == only(plain, "left"), f"seed {SEED}"
    assert only(whole, "records") > steps // 2
    known = dict(line.split()[:2] for line in (tmp_path / "whole.log").read_text().splitlines())
    before = acknowledged = 0
    for step, found, committed in (line.split() for line in log.read_text().splitlines()):
        assert int(step) > before or int(step) >= acknowledged, f"seed {SEED}"  # else a life begins, with what it loaded
        assert known[step] == found, f"seed {SEED}"
        before, acknowledged = int(step), max(acknowledged, int(committed))


@pytest.mark.parametrize("layout", LAYOUTS if LIVES > 3 else ["fsdp"])
def test_steps_that_ranks_made_on_parts_are_made_again_by_the_commands_rank_by_rank(layout, live, tmp_path, capsys):
    world = LAYOUTS[layout]
    left = [only(live(directory, 9, layout, world, journal=n), "left") for directory, n in (("logged", 5), ("full", 1))]
    assert left[0] == left[1] and 9 in recorded(tmp_path / "logged")
    assert main(["verify", str(tmp_path / "logged"), "--replay"]) == 0 and "made again" in capsys.readouterr().out
    for directory in ("logged", "full"):
        target = str(tmp_path / f"{directory}.pt")
        assert main(["export", str(tmp_path / directory), target, "--format", "torch", "--optimizer"]) == 0
    logged, full = (torch.load(tmp_path / f"{directory}.pt", weights_only=False) for directory in ("logged", "full"))
    assert differences(logged["model"], full["model"]) == [] and digest(logged["optimizer"]) == digest(full["optimizer"])


def rewrite(path: Path, rank: int) -> None:
    """Have the digests of a rank other than 0 be of other bits than training had, and all else verify."""
    first = Record.from_bytes((path / names.COMMIT).read_bytes(), "")
    name = names.of_rank(names.PART, rank, first.world_size)
    part = Record.from_bytes((path / name).read_bytes(), "")
    assert part.journal is not None
    vars(part.journal)["digests"] = {label: crc ^ 1 for label, crc in part.journal.digests.items()}
    made, raw = part_of(part)
    (path / name).write_bytes(raw)
    parts = tuple(made if each.name == name else each for each in first.parts or ())
    (path / names.COMMIT).write_bytes(replace(first, parts=parts).to_bytes())


def test_a_part_that_does_not_come_out_as_training_had_it_takes_all_ranks_back(live, tmp_path):
    live("a", 9, journal=20)
    rewrite(recorded(tmp_path / "a")[9].path, 1)
    assert main(["verify", str(tmp_path / "a")]) == 0 and main(["verify", str(tmp_path / "a"), "--replay"]) == 3
    assert only(live("a", 0, journal=20), "start") < 9


@pytest.mark.parametrize(("kind", "rank"), [(names.GRADIENTS, 1), (names.MODEL, 0), (names.OWN, 1), (names.STATE, 1)])
def test_a_flipped_bit_in_a_record_of_parts_costs_that_step_and_none_before_it(kind, rank, live, tmp_path):
    live("a", 9, journal=20)
    flip(recorded(tmp_path / "a")[9].path / names.of_rank(kind, rank, 2))
    assert only(live("a", 0, journal=20), "start") == 8


def test_ranks_that_hold_other_parts_go_on_from_the_full_checkpoint(live, tmp_path, capfd):
    live("a", 9)
    full = checkpoints(tmp_path / "a")[-1].step
    assert full < 9
    for layout, world in (("fsdp", 3), ("single", 1)):
        assert only(live("a", 0, layout, world), "start") == full
    assert only(live("a", 0), "start") == 9


def test_a_weight_that_is_clamped_behind_steps_is_stored_whole_by_all_ranks(live, tmp_path):
    plain, whole = live("", 14, load=False, clamp=3), live("whole", 14, clamp=3, boundaries=True)
    live("again", 10, clamp=3, boundaries=True)
    last = live("again", 14, clamp=3, boundaries=True)
    assert only(last, "left") == only(whole, "left") == only(plain, "left") and only(last, "from").startswith("journal")
    kinds = {layer.kind for each in recorded(tmp_path / "whole").values() for layer in each.record.layers}
    assert kinds == {"gradients", "update", "buffers"}


def test_gradients_that_are_views_of_buckets_are_copied_before_the_next_backward_fills_these(live):
    more = {"options": {"gradient_as_bucket_view": True}, "boundaries": True}
    plain, whole = live("", 14, "ddp", load=False, **more), live("a", 14, "ddp", **more)
    assert only(whole, "left") == only(plain, "left") and only(whole, "records") > 5
    assert only(live("a", 0, "ddp", **more), "loaded") == only(whole, "left")
