"""Ranks that name one directory write each checkpoint together, a part each, and rank 0 commits it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digests import differences
from joint_ranks import Job, plain
from safetensors.torch import load_file
from small_training import Training
from storing import a_record

import fxckpt
from fxckpt.errors import Corrupt, RanksDisagree, SetupError, StoreLocked
from fxckpt.loading import load as loading
from fxckpt.ranks.words import KEPT, Begun, Committed, Done, GivenUp, Said, answer
from fxckpt.saving.share import shared_out
from fxckpt.store import names
from fxckpt.store.about import diverged
from fxckpt.store.parts import _layers
from fxckpt.store.reader import Reader, candidates, checkpoints
from fxckpt.store.record import LayerRecord

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job(root, monkeypatch):
    found = Job(root, monkeypatch)
    yield found
    for run in reversed(found.runs):  # rank 0 waits until all others have heard its last word
        if hasattr(run, "opt"):
            run.opt.ckpt._run.saver.abandon()


class Normed(torch.nn.Module):
    """A model with buffers, which differ between ranks."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = plain(), torch.nn.BatchNorm1d(8)

    def forward(self, x):
        return self.inner(self.norm(x))


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
        said.say(key, Done("slot-0.partial", "0" * 64))
    said.say(begun.next(7, "best"), Committed(9, "named/best"))
    again = Said.from_bytes(said.to_bytes().encode())
    assert again == said and len(said.words) == KEPT
    assert answer(again, "third", keys[-1], begun) == Done("slot-0.partial", "0" * 64)
    assert answer(again, "fourth", keys[-1], begun) is None  # of another life


def test_who_says_something_of_a_later_one_has_nothing_to_say_of_this_one():
    said, begun = Said(), Begun()
    first, second = begun.next(1, None), begun.next(1, None)
    assert first != second and answer(said, "", first, begun) is None
    said.say(second, Done("slot-1.partial", "0" * 64))
    assert answer(said, "", first, begun) == GivenUp("") and answer(said, "", second, begun) == said.words[second]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_tensors_are_shared_out_by_size_and_each_goes_to_one(world):
    sizes = {(number % 2, f"{number}.weight"): 1000 + 37 * number % 501 for number in range(200)}
    parts = shared_out(sizes, world)
    assert sum(map(len, parts)) == len(sizes) and set().union(*parts) == set(sizes)
    loads = [sum(sizes[place] for place in part) for part in parts]
    assert max(loads) * world / sum(loads) < 1.01
    assert shared_out(dict(reversed(sizes.items())), world) == parts


# ---- replicas that check each other ----


def spoil(run, name="0.weight"):
    """One low bit of one weight, on one replica."""
    weight = dict(run.model.named_parameters())[name]
    weight.data.view(torch.int32).view(-1)[3] ^= 1


def test_a_flipped_bit_on_one_replica_is_named(job, root, caplog):
    job.begin()
    job.train(2)
    job.flush()
    assert "replicas differ" not in caplog.text
    spoil(job.runs[1])
    job.train(1)
    job.flush()
    assert "replicas differ at step 3" in caplog.text and "0.weight" in caplog.text
    assert "with two ranks nobody can tell" in caplog.text
    record = candidates(root)[0].record
    assert record.step == 3 and any("0.weight" in tensors for *_, tensors in diverged(record))
    assert diverged(candidates(root)[1].record) == []
    job.end()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_with_three_replicas_it_is_said_which_one(bad, root, monkeypatch, caplog):
    job = Job(root, monkeypatch, world=3)
    job.begin()
    job.train(2)
    job.flush()
    assert "replicas differ" not in caplog.text
    spoil(job.runs[bad])
    job.train(4)
    job.flush()
    assert f"it is rank {bad} that went wrong" in caplog.text
    assert not any(f"it is rank {other} that" in caplog.text for other in {0, 1, 2} - {bad})
    job.end()


class Alone(torch.nn.Linear):
    """Gradients that hang on no weight, as DDP has them: a wrong bit stays in its tensor. Two tensors."""

    def forward(self, x):
        return x[:, :4] + 0 * (self.weight.sum() + self.bias.sum())


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_with_three_replicas_it_is_said_which_one_whoever_writes_the_tensor(name, bad, root, monkeypatch, caplog):
    job = Job(root, monkeypatch, world=3)
    job.begin(make=lambda: Alone(8, 4))
    job.train(1)
    spoil(job.runs[bad], name)
    job.train(4)
    job.end()
    assert f"it is rank {bad} that went wrong" in caplog.text
    assert not any(f"it is rank {other} that" in caplog.text for other in {0, 1, 2} - {bad})
    assert "went wrong" not in caplog.text.split("replicas differ")[1]  # one look tells of a difference only


def test_with_raise_the_next_step_of_rank_0_says_so_and_no_such_checkpoint_is_made(job, root):
    job.begin(on_divergence="raise")
    job.train(1)
    job.flush()
    spoil(job.runs[1])
    job.train(1)
    failed = job.flush()
    assert isinstance(failed[0], fxckpt.Diverged) and isinstance(failed[1], RanksDisagree)
    assert [each.step for each in checkpoints(root)] == [1]
    job.end()


def test_replicas_without_a_difference_are_never_accused(root, monkeypatch, caplog):
    job = Job(root, monkeypatch, world=3)
    job.begin(make=Normed)
    job.train(12)
    job.flush()
    assert "differ" not in caplog.text and len(checkpoints(root)) > 5
    job.end()


def test_nobody_looks_if_that_is_asked_for(job, caplog):
    job.begin(on_divergence="off")
    spoil(job.runs[1])
    job.train(2)
    job.flush()
    assert "differ" not in caplog.text
    job.end()


# ---- what goes wrong on one rank ----


def patience(job, seconds: float) -> None:
    """How long a checkpoint waits for a disk, or for other ranks."""
    for run in job.runs:
        run.opt.ckpt._run.saver.loop.stuck_after = seconds


def test_what_one_rank_cannot_begin_the_others_do_not_wait_for(job):
    job.begin(every=2)
    job.train(1)
    assert job.each(lambda rank: job.runs[rank].opt.ckpt.save(name="best")) == [None, None]
    refused = job.each(lambda rank: job.runs[rank].opt.ckpt.save(name="best"))
    assert isinstance(refused[0], SetupError) and isinstance(refused[1], RanksDisagree)
    assert "has a checkpoint 'best' already" in str(refused[1])
    job.train(2)
    assert job.flush() == [None, None]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_save_that_one_rank_alone_calls_fails_and_says_whom_it_waited_for(alone, job, root):
    job.begin(every=2)
    patience(job, 0.5)
    job.train(1)
    with pytest.raises(fxckpt.SaveFailed, match=f"waiting for .*rank.* {1 - alone}.*All ranks must call save"):
        job.runs[alone].opt.ckpt.save(name="best")
    patience(job, 20)
    job.train(2)
    assert job.flush() == [None, None] and [each.step for each in checkpoints(root)] == [2]


def test_a_load_that_failed_on_one_rank_can_be_made_again(job, root, monkeypatch):
    job.begin()
    job.train(2)
    job.end()
    assert job.begin(load=False) == []
    restore = loading._restore

    def failing(found, target, strict, skipped, rank):
        if rank == 1:
            raise fxckpt.LayoutMismatch("for the test")
        return restore(found, target, strict, skipped, rank)

    monkeypatch.setattr(loading, "_restore", failing)
    assert [type(each) for each in job.load()] == [RanksDisagree, fxckpt.LayoutMismatch]
    monkeypatch.setattr(loading, "_restore", restore)
    assert [each.step for each in job.load()] == [2, 2]
    patience(job, 2)
    job.train(1)
    assert job.flush() == [None, None] and checkpoints(root)[-1].step == 3


def test_rank_0_tells_what_became_of_checkpoints_in_the_order_in_which_they_began(job, root):
    """Who hears of the second one takes it that the first was given up, and writes into files that rank 0 is about to move."""
    job.begin(max_async=2)
    first = job.runs[0].opt.ckpt._run.store
    slots = [first.acquire(), first.acquire()]
    for step, slot in enumerate(slots):
        first.begin(slot, step, [], step)
    first.abandon(slots[1], bad=False)
    assert not first._others._said.words
    first.abandon(slots[0], bad=False)
    assert list(first._others._said.words) == ["0.1", "1.1"]


def test_ranks_that_would_save_at_other_steps_are_refused_at_the_start(job, root):
    failed = job.each(lambda rank: Training(root, make=plain, every=2 + rank))
    assert len(failed) == 2 and all(isinstance(each, SetupError) and "the same every=" in str(each) for each in failed)


def test_one_process_goes_on_says_so_and_leaves_nothing_of_the_others(root, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        job = Job(root, patched, world=3)
        job.begin(make=Normed, keep=1)
        job.train(3)
        job.end()
    assert any((root / names.RANKS).rglob("slot-*"))
    alone = Training(root, make=Normed)
    assert fxckpt.load(optimizer=alone.opt).step == 3
    assert "was written by 3 ranks, and 1 goes on from it" in caplog.text
    assert os.listdir(root / names.RANKS) == []
    assert [each.step for each in checkpoints(alone.train(1).end() and root)][-1] == 4


def test_layers_of_one_name_are_two_layers_of_the_whole(job, root):
    """Two optimizers may share a module."""
    layer = LayerRecord(0, "h", "update", 1, 0.0, 3, 0, ())
    records = [a_record(1, (), (layer, replace(layer, parameters=4)), rank=rank) for rank in range(2)]
    assert [each.parameters for each in _layers(records)] == [3, 4]


def test_the_directory_of_ranks_is_made_anew_when_somebody_removes_it(job, root):
    job.begin()
    job.train(1)
    job.flush()
    shutil.rmtree(root / names.RANKS)
    job.train(2)
    job.flush()  # what was being written there is lost
    job.train(1)
    assert job.flush() == [None, None] and checkpoints(root)[-1].step == 4
    Reader(newest(root)).verify()
