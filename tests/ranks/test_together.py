"""Ranks that name one directory write each checkpoint together, a part each, and rank 0 commits it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from digests import differences
from joint_ranks import Job, Normed
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import fxckpt
from fxckpt.cli import main
from fxckpt.errors import Corrupt, RanksDisagree, SetupError, StoreLocked
from fxckpt.ranks.briefs import Brief
from fxckpt.ranks.words import KEPT, Begun, Committed, Done, GivenUp, Said, answer
from fxckpt.saving.share import shared_out
from fxckpt.store import names
from fxckpt.store.reader import Reader, candidates, checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

DONE = Done("slot-0.partial", 7, "0" * 64, Brief({"own-00002-of-00002.safetensors": 4096}, "1" * 32, "2" * 32, {}, {}))


def newest(root: Path) -> Path:
    return max(candidates(root), key=lambda each: each.record.generation).path


def test_each_tensor_is_written_once_and_the_parts_are_as_large(job, root):
    assert [each.step for each in job.begin()] == [0, 0]
    job.train(3)
    assert job.end() == []
    assert [each.step for each in checkpoints(root)] == [1, 2, 3]
    record = candidates(root)[0].record
    keys = [(names.kind_of(each.file), each.key) for each in record.tensors()]
    assert len(keys) == len(set(keys)) and {key for kind, key in keys if kind == names.MODEL} == set(
        dict(job.runs[0].model.named_parameters())
    )
    sizes = [sum(each.nbytes for each in rank.tensors()) for rank in record.ranks]
    assert max(sizes) < 1.3 * min(sizes), sizes
    Reader(newest(root)).verify()


def test_all_go_on_from_one_step_with_the_bits_of_a_run_that_went_on(job, root, monkeypatch):
    job.begin()
    job.train(5)
    job.end()
    assert [each.step for each in job.begin()] == [5, 5]
    job.train(3)
    whole = Job(root.parent / "whole", monkeypatch)
    whole.begin()
    whole.train(8)
    assert differences(job.runs[1].reference[8], whole.runs[1].reference[8]) == []
    assert job.runs[1].losses == whole.runs[1].losses[5:]
    for each in (job, whole):
        each.end()


def test_what_each_rank_has_for_itself_comes_back_to_it(job, root):
    job.begin(make=Normed)
    for rank, run in enumerate(job.runs):
        run.model.norm.running_mean.fill_(rank + 1.0)
    job.train(2)
    before = [run.model.norm.running_mean.clone() for run in job.runs]
    assert not torch.equal(*before)
    job.end()
    job.begin(make=Normed)
    after = [run.model.norm.running_mean for run in job.runs]
    assert all(map(torch.equal, before, after))
    job.end()


def test_gradients_that_wait_for_a_step_come_back_to_their_rank(job, root):
    def accumulate(rank: int) -> list[torch.Tensor]:
        run = job.runs[rank]
        with one_at_a_time:
            run.train(1)
            for _ in range(rank + 1):
                x, y = next(run.loader)
                cross_entropy(run.forward(x), y).backward()
        run.opt.ckpt.save(name="amid")
        return [param.grad.clone() for param in run.model.parameters()]

    one_at_a_time = threading.Lock()
    job.begin(every=100)
    before = job.each(accumulate)
    at = [run.loader.state_dict()["at"] for run in job.runs]
    assert not torch.equal(before[0][0], before[1][0]) and at[0] != at[1]
    job.end()
    job.begin(load=False)
    assert [each.step for each in job.load(name="amid")] == [1, 1]
    for run, grads in zip(job.runs, before):
        assert all(torch.equal(param.grad, grad) for param, grad in zip(run.model.parameters(), grads))
    assert [run.loader.state_dict()["at"] for run in job.runs] == at
    job.end()


def test_any_reader_of_safetensors_finds_the_model_by_the_index(job, root):
    job.begin(make=Normed)
    job.train(1)
    job.end()
    index = json.loads((newest(root) / names.INDEX).read_text())
    found = {key: load_file(newest(root) / file)[key] for key, file in index["weight_map"].items()}
    assert found.keys() == job.runs[0].model.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in job.runs[0].reference[1].items() if key in found)


def test_one_process_loads_what_several_wrote(job, root, tmp_path):
    job.begin(make=Normed)
    job.train(2)
    job.end()
    model = Normed()
    assert fxckpt.load(root, model=model).step == 2


def test_the_file_of_a_rank_is_written_in_place_again_when_its_checkpoint_is_given_up(job, root):
    job.begin(keep=1, max_async=1)
    seen = set()
    for _ in range(8):
        job.train(1)
        job.flush()
        seen |= {path.stat().st_ino for path in root.rglob("model-00002-of-00002.safetensors*")}
    assert len(seen) <= 3
    assert len([name for name in os.listdir(root) if name.startswith(("step-", "slot-"))]) == 2
    job.end()


def test_a_named_save_and_two_of_one_step_are_of_all_ranks(job, root):
    job.begin(every=2)
    job.train(2)
    assert job.each(lambda rank: job.runs[rank].opt.ckpt.save(name="best") and None) == [None, None]
    job.each(lambda rank: job.runs[rank].opt.ckpt.save() and None)
    job.end()
    found = checkpoints(root)
    assert [(each.step, each.name) for each in found if each.name] == [(2, "best")]
    for each in found:
        Reader(each.path).verify()
    job.begin(every=2)
    assert [each.step for each in job.load(name="best")] == [2, 2]
    job.end()


def test_a_job_that_goes_on_from_before_a_named_save_takes_it_again(job, root):
    job.begin(every=2)
    job.train(3)
    assert job.each(lambda rank: job.runs[rank].opt.ckpt.save(name="best") and None) == [None, None]
    job.end()
    job.begin(load=False, every=2)
    assert [each.step for each in job.load(step=2)] == [2, 2]
    job.train(2)
    assert job.each(lambda rank: job.runs[rank].opt.ckpt.save(name="best") and None) == [None, None]
    assert all("'best' already" in str(each) for each in job.each(lambda rank: job.runs[rank].opt.ckpt.save(name="best")))
    job.end()
    [found] = [each for each in checkpoints(root) if each.name]
    assert found.step == 4 and Reader(found.path).record.world_size == 2
    Reader(found.path).verify()


def test_a_rank_that_cannot_write_its_part_costs_all_that_checkpoint_and_is_named(job, root, monkeypatch, caplog):
    job.begin(on_error="warn")
    job.train(1)
    job.flush()
    other = job.runs[1].opt.ckpt._run.store
    monkeypatch.setattr(other, "commit", lambda *a: (_ for _ in ()).throw(fxckpt.SaveFailed("write", "part", None, 5)))
    job.train(1)
    failed = job.flush()
    assert isinstance(failed[1], fxckpt.SaveFailed) and isinstance(failed[0], RanksDisagree) and "rank 1 failed" in str(failed[0])
    monkeypatch.undo()
    job.train(2)
    assert job.flush() == [None, None]
    assert [each.step for each in checkpoints(root)] == [1, 3, 4]
    job.end()


def test_a_checkpoint_that_one_rank_drops_is_dropped_by_all_and_the_next_one_is_not(job, root):
    job.begin(every=1)
    job.train(1)
    job.flush()
    job.train(1)
    job.runs[1].opt.ckpt._run.closing.drop("for the test")
    job.train(2)
    assert job.flush() == [None, None]
    assert [each.step for each in checkpoints(root)] == [1, 3, 4]
    assert [run.opt.ckpt._run.saver.tally.failed for run in job.runs] == [0, 0]
    job.end()


def test_ranks_that_train_in_different_ways_are_told_so_at_the_first_checkpoint(job, root):
    job.begin()
    job.runs[1].opt.param_groups[0]["lr"] *= 2
    job.train(1)
    failed = job.flush()
    assert "rank 1 has other optimizers.0.groups.0.settings.lr than rank 0 (0.018" in str(failed[0])
    assert isinstance(failed[1], RanksDisagree) and checkpoints(root) == []
    job.end()


def test_some_with_one_directory_and_some_with_others_is_neither(root, monkeypatch):
    job = Job(root, monkeypatch, world=3)
    failed = job.begin(at=lambda rank: root / ("a" if rank else "b"))
    assert all(isinstance(each, SetupError) and "These are neither" in str(each) for each in failed) and len(failed) == 3


def test_each_with_a_directory_of_its_own_has_a_store_of_its_own(job, root):
    job.begin(at=lambda rank: root / f"rank{rank}")
    job.train(1)
    job.end()
    assert [[each.step for each in checkpoints(root / f"rank{rank}")] for rank in range(2)] == [[1], [1]]


def test_one_name_on_different_disks_is_refused_with_the_way_out(job, root, monkeypatch):
    monkeypatch.setattr("fxckpt.compiled_optimizer.together.read_store_id", lambda directory: "another")
    monkeypatch.setattr("fxckpt.compiled_optimizer.together.APPEARS", 0.1)
    failed = job.begin()
    assert isinstance(failed[1], SetupError) and "it is on another disk" in str(failed[1])
    assert isinstance(failed[0], RanksDisagree) and "rank 1" in str(failed[0])


def test_a_rank_of_an_earlier_life_that_still_writes_keeps_the_next_life_out(job, root):
    assert job.begin() and job.runs
    failed = Job.begin(job)  # the first ones are still there
    assert isinstance(failed[0], (StoreLocked, SetupError, RanksDisagree))
    assert isinstance(failed[1], RanksDisagree) and "rank 0 could not open" in str(failed[1])


def test_damage_in_the_part_of_one_takes_all_back(job, root):
    job.begin()
    job.train(3)
    job.end()
    flip(newest(root) / "optimizer-00002-of-00002.safetensors")
    assert [each.step for each in job.begin()] == [2, 2]
    job.end()


def flip(path: Path) -> None:
    """One bit in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("file", ["part-00002-of-00002.json", "commit.json", names.INDEX, "state-00002-of-00002.safetensors"])
@pytest.mark.parametrize("how", [flip, Path.unlink])
def test_every_file_of_every_rank_is_vouched_for(file, how, job, root):
    job.begin()
    job.train(1)
    job.end()
    how(newest(root) / file)
    with pytest.raises(Corrupt):
        Reader(next(root.glob("step-*"))).verify()


def test_the_part_of_another_checkpoint_is_none_of_this_one(job, root):
    job.begin()
    job.train(2)
    job.end()
    part = "part-00002-of-00002.json"
    (root / names.step_name(2) / part).write_bytes((root / names.step_name(1) / part).read_bytes())
    with pytest.raises(Corrupt, match="SHA-256"):
        Reader(root / names.step_name(2))
    (root / names.step_name(1) / "commit.json").write_bytes((root / names.step_name(1) / part).read_bytes())
    with pytest.raises(Corrupt, match="one rank's part"):
        Reader(root / names.step_name(1))


# ---- what they say to each other, and who writes what ----


def test_a_message_tells_of_the_newest_and_comes_back_as_it_went():
    said, begun = Said("third"), Begun()
    keys = [begun.next(step, None) for step in range(2 * KEPT)]
    for key in keys:
        said.say(key, DONE)
    said.say(begun.next(7, "best"), Committed(9, "named/best"))
    again = Said.from_bytes(said.to_bytes().encode())
    assert again == said and len(said.words) == KEPT
    assert answer(again, "third", keys[-1], begun) == DONE
    assert answer(again, "fourth", keys[-1], begun) is None  # of another life


def test_who_says_something_of_a_later_one_has_nothing_to_say_of_this_one():
    said, begun = Said(), Begun()
    first, second = begun.next(1, None), begun.next(1, None)
    assert first != second and answer(said, "", first, begun) is None
    said.say(second, DONE)
    assert answer(said, "", first, begun) == GivenUp("") and answer(said, "", second, begun) == said.words[second]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_tensors_are_shared_out_by_size_and_each_goes_to_one(world):
    sizes = {(number % 2, f"{number}.weight"): 1000 + 37 * number % 501 for number in range(200)}
    parts = shared_out(sizes, world)
    assert sum(map(len, parts)) == len(sizes) and set().union(*parts) == set(sizes)
    loads = [sum(sizes[place] for place in part) for part in parts]
    assert max(loads) * world / sum(loads) < 1.01
    assert shared_out(dict(reversed(sizes.items())), world) == parts


def test_a_slot_that_was_got_ready_and_not_used_says_nothing_of_the_next_one_in_it(job, root):
    job.begin(keep=2)
    for number in range(3):
        job.train(2)
        job.flush()
        assert job.each(lambda rank: job.runs[rank].opt.ckpt.save(name=f"best{number}") and None) == [None, None]  # noqa: B023
    job.train(4)
    assert job.flush() == [None, None]
    assert all(run.opt.ckpt._run.saver.tally.skipped == 0 for run in job.runs)
    assert [each.step for each in checkpoints(root) if each.name is None] == [9, 10]
    job.end()


def test_commands_read_what_all_ranks_wrote_as_one_checkpoint(job, root, tmp_path, capsys):
    job.begin(make=Normed)
    job.train(2)
    job.end()
    assert main(["export", str(root), str(tmp_path / "m.pt"), "--format", "torch", "--optimizer"]) == 0
    found = torch.load(tmp_path / "m.pt")
    assert all(torch.equal(found["model"][key], value) for key, value in job.runs[0].model.state_dict().items())
    assert len(found["optimizer"]["state"]) == len(list(job.runs[0].model.parameters()))
    capsys.readouterr()
    assert main(["diff", str(root), "--json"]) in (0, 1)
    assert "only in" not in capsys.readouterr().out
    assert main(["verify", str(root)]) == 0
