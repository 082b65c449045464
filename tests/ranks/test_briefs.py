"""What ranks say of their parts in short: rank 0 reads no part of a checkpoint in which nothing is new, and misses nothing."""

from __future__ import annotations

import base64
import json
from array import array
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from joint_ranks import Job, Normed, plain
from storing import a_record

import fxckpt
from fxckpt.errors import RanksDisagree
from fxckpt.ranks import first, other, taken
from fxckpt.ranks.briefs import Brief
from fxckpt.ranks.taken import Taken
from fxckpt.ranks.words import Done, GivenUp, Said
from fxckpt.store import names
from fxckpt.store.about import ALIKE, CHECKED
from fxckpt.store.checks import Malformed
from fxckpt.store.reader import Reader, candidates, checkpoints
from fxckpt.store.record import FileRecord, Journal, LayerRecord, Record, TensorRecord

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def parts_read(monkeypatch) -> list[str]:
    """The files of parts that rank 0 has read, in order."""
    found, read = [], taken.read_part
    monkeypatch.setattr(taken, "read_part", lambda part, *args: found.append(part.name) or read(part, *args))
    return found


@pytest.fixture
def three(root, monkeypatch):
    job = Job(root, monkeypatch, world=3)
    yield job
    for run in reversed(job.runs):
        run.opt.ckpt._run.saver.abandon()


def saved(job: Job, steps: int = 1) -> list[Any]:
    """So many steps, with a checkpoint of each; what ``flush`` raised behind the last one."""
    for _ in range(steps):
        job.train(1)
        failed = job.flush()
    return failed


PARTS = [names.of_rank(names.PART, rank, 3) for rank in (1, 2)]

# ---- what is read ----


@pytest.mark.parametrize("make", [plain, Normed])
def test_rank_0_reads_the_parts_of_the_first_checkpoint_and_of_no_later_one_where_nothing_is_new(make, three, root, parts_read):
    three.begin(make=make)
    saved(three)
    assert parts_read == PARTS
    assert saved(three, 5) == [None] * 3 and parts_read == PARTS
    assert three.each(lambda rank: three.runs[rank].opt.ckpt.save(name="best") and None) == [None] * 3 and parts_read == PARTS
    for each in checkpoints(root):
        Reader(each.path).verify()


def test_nor_those_of_records_of_the_journal(job, root, parts_read):
    job.begin(journal=4, make=Normed)
    saved(job, 9)
    assert any(root.glob("journal-*"))
    known = len(parts_read)
    assert saved(job, 8) == [None, None] and len(parts_read) == known


def test_a_message_does_not_grow_with_the_checkpoints_that_were_made(job):
    job.begin()
    saved(job, 6)
    assert job.runs[1].opt.ckpt._run.store._others._said.words == {}  # all of them are heard of: nobody asks for one again


# ---- what differs at a later checkpoint, or is new ----


def test_other_settings_on_one_rank_are_named_whenever_they_come(three, root, parts_read):
    three.begin(on_error="warn")
    saved(three, 3)
    three.runs[2].opt.param_groups[0]["weight_decay"] = 0.5
    failed, where = saved(three), "optimizers.0.groups.0.settings.weight_decay"
    assert f"rank 2 has other {where} than rank 0 (0.5 where rank 0 has 0.01)" in str(failed[0])
    assert isinstance(failed[1], RanksDisagree) and parts_read == [*PARTS, PARTS[1]]
    three.runs[2].opt.param_groups[0]["weight_decay"] = 0.01
    assert saved(three) == [None] * 3
    assert [each.step for each in checkpoints(root)] == [1, 2, 3, 5]


def grow(run: Any) -> None:
    """One parameter more, which is trained."""
    run.model.more = torch.nn.Parameter(torch.zeros(3))
    run.model.register_forward_hook(lambda module, args, out: out + module.more.sum())
    run.opt.add_param_group({"params": [run.model.more]})


def test_other_tensors_on_one_rank_are_named_whenever_they_come(three, root):
    three.begin(on_error="warn")
    saved(three, 3)
    grow(three.runs[1])
    failed = saved(three)
    assert "rank 1 has other optimizers.0.groups than rank 0" in str(failed[0]) and isinstance(failed[2], RanksDisagree)
    assert [each.step for each in checkpoints(root)] == [1, 2, 3]


def test_a_flipped_bit_is_named_and_only_the_records_of_those_who_differ_are_read(root, monkeypatch, parts_read, caplog):
    job = Job(root, monkeypatch, world=5)
    job.begin()
    saved(job, 3)
    assert len(parts_read) == 4 and "differ" not in caplog.text
    with torch.no_grad():
        next(job.runs[3].model.parameters()).view(-1)[3] += 1e-3
    for _ in range(4):
        parts_read.clear()
        saved(job)
        assert 0 < len(parts_read) < 4  # its own, and those that it looked at, or that looked at it
    assert "it is rank 3 that went wrong" in caplog.text
    job.end()


@pytest.fixture
def looked_at(monkeypatch) -> list[int]:
    """Of each checkpoint that was seen to be whole, how many records it has."""
    found, layers_of = [], first.layers_of
    monkeypatch.setattr(first, "layers_of", lambda records: found.append(len(records)) or layers_of(records))
    return found


def indexed(root: Any) -> dict[str, str]:
    """By the newest index, the file of each tensor; each is there."""
    newest = candidates(root)[0]
    found = json.loads((newest.path / names.INDEX).read_text())["weight_map"]
    assert found == {each.key: each.file for each in newest.record.tensors(names.MODEL) if each.file in found.values()}
    return found


def test_parameters_that_come_or_are_frozen_in_the_middle_are_in_the_index_and_all_is_seen_to_be_whole_again(
    three, root, parts_read, looked_at
):
    three.begin()
    saved(three, 3)
    assert looked_at == [3] and "more" not in indexed(root)
    for run in three.runs:
        grow(run)
    assert saved(three, 3) == [None] * 3
    assert looked_at == [3, 3] and parts_read == 2 * PARTS and "more" in indexed(root)
    for run in three.runs:
        run.model[0].weight.requires_grad_(False)
        run.opt.param_groups[0]["params"] = [p for p in run.opt.param_groups[0]["params"] if p is not run.model[0].weight]
        del run.opt.state[run.model[0].weight]
    assert saved(three, 3) == [None] * 3
    assert looked_at[2:] and len(parts_read) == 2 * len(looked_at)
    assert indexed(root).keys() == dict(run.model.named_parameters()).keys()
    three.end()


# ---- what is said in short ----

FILE = FileRecord("model-00002-of-00003.safetensors", 8192, 4096, [1, 2])
BOX = TensorRecord(FILE.name, "weight", 4096, 4096, (32, 32), "F32", (64, 32), (32, 0))
JOURNAL = Journal(5, 6, 2, "native", [{"lr": 0.1}], {}, {}, "cpu", 1)


def group(**settings: Any) -> list[dict[str, Any]]:
    return [
        {"class": "AdamW", "groups": [{"params": ["weight"], "settings": settings}], "state": {"weight": {"keys": ["exp_avg"]}}}
    ]


def a_part(tensor: TensorRecord = BOX, **fields: Any) -> Record:
    layer = LayerRecord(0, "", "update", 4, 0.0, 1, 4096, (tensor,))
    state = {ALIKE: "a", CHECKED: {"own": {FILE.name: "0/8192/4096"}, "others": {}}}
    return replace(a_record(4, (FILE,), (layer,), optimizers=group(lr=0.1), state=state, rank=1, world_size=3), **fields)


@pytest.mark.parametrize(
    "fields",
    [{"step": 5}, {"iteration": 5}, {"updates": 3}, {"optimizers": group(lr=0.2)}, {"optimizers": []}, {"journal": JOURNAL},
     {"state": {**a_part().state, ALIKE: "b"}}],
)  # fmt: skip
def test_what_must_be_alike_is_in_its_digest(fields):
    assert Brief.of(a_part(**fields)).alike != Brief.of(a_part()).alike


@pytest.mark.parametrize(
    "fields", [{"base": 4}, {"after": 5}, {"number": 1}, {"order": (1,)}, {"groups": [{"lr": 0.2}]}, {"update": None}]
)
def test_what_records_of_the_journal_must_have_alike_is_in_its_digest(fields):
    one, another = (a_part(journal=journal) for journal in (JOURNAL, replace(JOURNAL, **fields)))
    assert Brief.of(one).alike != Brief.of(another).alike


def test_what_each_rank_has_for_itself_is_in_no_digest():
    journal = replace(JOURNAL, machine="another", threads=2, digests={"": 1}, strides={"weight": [1, 32]})
    another = a_part(journal=journal, rank=2, time=9.0, state={**a_part().state, "extra": 1})
    assert Brief.of(another) == Brief.of(a_part(journal=JOURNAL))


@pytest.mark.parametrize(
    "fields",
    [{"file": "optimizer-00002-of-00003.safetensors"}, {"key": "bias"}, {"nbytes": 4}, {"dtype": "I32"}, {"shape": (16, 64)},
     {"whole": (96, 32)}, {"offset": (0, 0)}],
)  # fmt: skip
def test_where_a_tensor_lies_is_in_its_digest(fields):
    assert Brief.of(a_part(replace(BOX, **fields))).placed != Brief.of(a_part()).placed


def test_a_bit_of_a_file_or_of_what_is_compared_with_it_is_in_its_digest():
    packed = base64.b64encode(array("I", FILE.crc32c)).decode()
    reader = replace(a_part(), state={ALIKE: "a", CHECKED: {"own": {}, "others": {FILE.name: ["0/8192/4096", packed]}}})
    assert Brief.of(reader).others[FILE.name] == Brief.of(a_part()).own[FILE.name]
    flipped = Brief.of(a_part(files=(replace(FILE, crc32c=[1, 3]),)))
    assert flipped.own[FILE.name][0] == "0/8192/4096" and flipped.own[FILE.name] != Brief.of(a_part()).own[FILE.name]


# ---- what others say is looked at before it is believed ----

DONE = Done("slot-0.partial", 7, "0" * 64, Brief.of(a_part()))


def test_what_is_said_in_short_comes_back_as_it_went():
    said = Said("life", {"1.1": DONE, "2.1": GivenUp("why", True)})
    assert Said.from_bytes(said.to_bytes().encode()) == said


def changed(**fields: Any) -> bytes:
    return json.dumps(["", {"1.1": ["Done", {**asdict(DONE), **fields}]}]).encode()


BEFORE = json.dumps(["", {"1.1": ["Done", {"entry": "slot-0.partial", "sha256": "0" * 64}]}]).encode()
"""What an earlier version says."""


NO_MESSAGES = (
    b"", b"\xff", b"[" * 100_000, b"{}", b'["", []]', b'["", {"1.1": 7}]', b'["", {"1.1": ["Moved", {}]}]', BEFORE,
    changed(more=1), changed(entry="../00001"), changed(sha256=7), changed(nbytes=-1), changed(brief=None),
    changed(brief={**asdict(DONE.brief), "alike": ""}), changed(brief={**asdict(DONE.brief), "own": {"a": ["b"]}}),
    b'["", {"1.1": ["GivenUp", {"why": 7, "unlike": false}]}]',
)  # fmt: skip


@pytest.mark.parametrize("raw", NO_MESSAGES, ids=range(len(NO_MESSAGES)))
def test_what_no_rank_of_this_version_says_is_malformed(raw):
    with pytest.raises(Malformed):
        Said.from_bytes(raw)


def test_a_rank_of_another_version_costs_checkpoints_and_is_named(job, root):
    job.begin(on_error="warn")
    saved(job)
    job.runs[1].opt.ckpt._run.store._others._said.to_bytes = BEFORE.decode
    failed = saved(job, 2)
    assert all(isinstance(each, RanksDisagree) for each in failed)
    assert "what rank 1 says is not understood" in str(failed[0]) and "the same version of fxckpt" in str(failed[0])
    assert [each.step for each in checkpoints(root)] == [1]


@pytest.mark.parametrize(
    "file", ["model-00001-of-00002.safetensors", "../model-00002-of-00002.safetensors", names.COMMIT, names.STORE]
)
def test_a_rank_names_no_files_but_its_own(file):
    done = replace(DONE, brief=replace(DONE.brief, files={file: 4096}))
    with pytest.raises(RanksDisagree, match=r"rank 1 says that it wrote .*: these are no files of its own"):
        Taken(None, a_part(), {1: done})


def test_a_part_that_is_not_as_long_as_its_rank_said_is_in_no_checkpoint(job, root, monkeypatch):
    job.begin(on_error="warn")
    saved(job)
    monkeypatch.setattr(other, "Done", lambda entry, nbytes, *more: Done(entry, nbytes + 1, *more))
    failed = saved(job)
    assert isinstance(failed[0], fxckpt.SaveFailed) and "its record" in str(failed[0])
    assert [each.step for each in checkpoints(root)] == [1]


def test_a_checkpoint_that_somebody_takes_another_rank_s_file_from_has_not_all_its_files(job, root):
    job.begin()
    saved(job)
    [slot] = job.runs[0].opt.ckpt._run.store._pool._committed  # what decides whether its damage is the disk's fault
    assert slot.has_its_files()
    (root / names.step_name(1) / names.of_rank(names.PART, 1, 2)).unlink()
    assert not slot.has_its_files()
