"""Promise 5: every byte is verified on load. Whatever is damaged in the newest checkpoint is found and named, and the newest
older good one is used instead; what was asked for by step or name is never replaced by something else.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import instruments
import pytest
import torch
from digests import differences, digest, snapshot
from torch import nn

import fxckpt
from fxckpt.store.reader import Reader, candidates

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ["model.safetensors", "optimizer.safetensors", "state.safetensors", "commit.json"]
BLOCK = 4096  # has a checksum
NEWEST, OLDER, OLDEST = "step-000000004", "step-000000003", "step-000000002"


class Counted:
    """Extra state."""

    def __init__(self, steps: int = 0):
        self.steps, self.tensor = steps, torch.zeros(10)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "tensor": self.tensor}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.tensor = state["steps"], state["tensor"]


def build(seed: int):
    """A model of 1.3 MB and its optimizer, so that files have several chunks of a MiB; a named layer in each."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(300, 700), nn.BatchNorm1d(700), nn.Linear(700, 170))
    return model, torch.optim.Adam(model.parameters(), lr=1e-2), Counted()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store with checkpoints of steps 2, 3 and 4, a named one of step 4, and what the state was at each step."""
    directory, references = tmp_path_factory.mktemp("trained") / "d", {}
    model, opt, counted = build(0)
    fxckpt.compile_step(opt, directory, model=model, every=1, keep=3, update="native", chunk_mb=1, extra={"c": counted})
    for step in range(1, 5):
        model(torch.randn(8, 300)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        counted.steps = step
        references[step] = snapshot(model, opt)
    opt.ckpt.flush()
    opt.ckpt.save("best")
    opt.ckpt.shutdown()
    return directory, references


@pytest.fixture
def store(trained, tmp_path):
    """A copy to damage."""
    shutil.copytree(trained[0], tmp_path / "d")
    return tmp_path / "d"


def load_into_new(store: Path, **asked):
    """Load into a freshly made model, optimizer and extra; returns the result and what was loaded into."""
    model, opt, counted = build(1)
    restored = fxckpt.load(store, model=model, optimizer=opt, extra={"c": counted}, **asked)
    return restored, snapshot(model, opt), counted.steps


def falls_back(store: Path, trained, file: str) -> str:
    """Loading gives step 3, whole, and says what is wrong with step 4; returns what it says."""
    drop_named(store)
    reason = falls_back_from_what_is_there(store, trained)
    assert file in reason
    return reason


def falls_back_from_what_is_there(store: Path, trained) -> str:
    """Loading gives step 3, whole; returns what it says of step 4."""
    restored, held, counted = load_into_new(store)
    assert restored.step == counted == 3 and restored.path.name == OLDER
    assert differences(held, trained[1][3]) == []
    ((path, reason),) = restored.skipped
    assert NEWEST in path, restored.skipped
    return reason


def drop_named(store: Path) -> None:
    shutil.rmtree(store / "named")


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ (1 << bit)]))


def positions(store: Path, file: str, count: int) -> list[int]:
    """The first and the last byte, bytes of the header, and random ones, which differ from run to run."""
    size = (store / NEWEST / file).stat().st_size
    chance = random.SystemRandom()
    return [
        0,
        7,
        8,
        9,
        size - 1,
        *(chance.randrange(min(size, 400)) for _ in range(3)),
        *(chance.randrange(size) for _ in range(count)),
    ]


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit_is_found_and_named_and_the_older_checkpoint_is_loaded(file, store, trained):
    drop_named(store)
    for offset in positions(store, file, 12):
        bit = random.SystemRandom().randrange(8)
        flip(store / NEWEST / file, offset, bit)
        with pytest.raises(fxckpt.Corrupt) as found:
            Reader(store / NEWEST).verify()
        where = f"bit {bit} of byte {offset} of {file}: {found.value}"
        assert Path(found.value.path).name == file, where
        if file != "commit.json":
            assert found.value.offset == offset // BLOCK * BLOCK, where
            assert found.value.layer or offset < 8192, where
        flip(store / NEWEST / file, offset, bit)
    Reader(store / NEWEST).verify()
    flip(store / NEWEST / file, positions(store, file, 0)[-1])
    (store / "named").mkdir()
    falls_back(store, trained, file)


def test_the_layer_that_a_flipped_bit_hit_is_named(store, trained):
    record = Reader(store / NEWEST).record
    for layer in record.layers:
        for tensor in layer.tensors:
            flip(store / NEWEST / tensor.file, tensor.begin + tensor.nbytes // 2)
            with pytest.raises(fxckpt.Corrupt) as found:
                Reader(store / NEWEST).verify()
            assert layer.name in found.value.layer.split(", ") and layer.name in str(found.value), tensor
            assert f"offset {found.value.offset}" in str(found.value)
            flip(store / NEWEST / tensor.file, tensor.begin + tensor.nbytes // 2)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, -1])
def test_a_file_cut_short_is_found(file, keep, store, trained):
    path = store / NEWEST / file
    size = path.stat().st_size
    with path.open("r+b") as f:
        f.truncate(size - 1 if keep == -1 else int(size * keep))
    falls_back(store, trained, file)


@pytest.mark.parametrize("file", FILES)
def test_bytes_appended_to_a_file_are_found(file, store, trained):
    with (store / NEWEST / file).open("ab") as f:
        f.write(bytes(4096))
    falls_back(store, trained, file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_zeroed_block_is_found(file, where, store, trained):
    """What a disk that lost a write gives back: 4096 bytes, or all of a smaller file."""
    path = store / NEWEST / file
    blocks = max(path.stat().st_size // 4096, 1)
    block = {"first": 0, "middle": blocks // 2, "last": blocks - 1}[where]
    raw = bytearray(path.read_bytes())
    here = slice(block * 4096, (block + 1) * 4096)
    if not any(raw[here]):
        pytest.skip("that block holds only zeros")
    raw[here] = bytes(len(raw[here]))
    path.write_bytes(raw)
    falls_back(store, trained, file)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found(file, store, trained):
    (store / NEWEST / file).unlink()
    assert "missing" in falls_back(store, trained, file)


@pytest.mark.parametrize("file", FILES[:3])
def test_a_file_of_another_checkpoint_is_found(file, store, trained):
    """A mixture of two steps, each of whose files is good in itself."""
    shutil.copyfile(store / OLDER / file, store / NEWEST / file)
    falls_back(store, trained, file)


def test_two_files_swapped_are_found(store, trained):
    newest = store / NEWEST
    (newest / "model.safetensors").rename(newest / "x")
    (newest / "optimizer.safetensors").rename(newest / "model.safetensors")
    (newest / "x").rename(newest / "optimizer.safetensors")
    falls_back(store, trained, "safetensors")


def test_a_record_edited_by_hand_is_found(store, trained):
    path = store / NEWEST / "commit.json"
    text = path.read_text()
    assert '"step":4' in text.replace(" ", "")
    path.write_text(text.replace('"step": 4', '"step": 5').replace('"step":4', '"step":5'))
    falls_back(store, trained, "commit.json")


def test_a_record_of_another_checkpoint_never_makes_a_mixture(store, trained):
    drop_named(store)
    shutil.copyfile(store / OLDER / "commit.json", store / NEWEST / "commit.json")
    assert "another checkpoint" in falls_back_from_what_is_there(store, trained)


def test_a_directory_in_a_file_s_place_makes_it_fall_back(store, trained):
    (store / NEWEST / "model.safetensors").unlink()
    (store / NEWEST / "model.safetensors").mkdir()
    assert "directory" in falls_back(store, trained, "model.safetensors")


@pytest.mark.parametrize("error", [errno.EIO, errno.EUCLEAN])
def test_whichever_read_fails_what_is_loaded_is_one_whole_step(error, store, trained):
    """Also when it fails after live tensors were written to: then all of them are written again."""
    drop_named(store)
    instruments.fail(10**9, error, "pread")  # counts from the first use of an instrument
    before = instruments.calls("pread")
    load_into_new(store)
    reads, steps = instruments.calls("pread") - before, []
    for nth in range(1, reads + 1):
        instruments.fail(nth, error, "pread")
        restored, held, counted = load_into_new(store)
        assert restored.step == counted and differences(held, trained[1][restored.step]) == [], f"read {nth}"
        assert (restored.step, len(restored.skipped)) in ((4, 0), (3, 1)), f"read {nth}"
        assert all(NEWEST in path and os.strerror(error) in reason for path, reason in restored.skipped)
        steps.append(restored.step)
    assert steps[-1] == 3 and steps.count(3) > 10


def test_the_two_newest_damaged_are_both_reported_and_the_third_is_loaded(store, trained):
    drop_named(store)
    flip(store / NEWEST / "model.safetensors", 5000)
    (store / OLDER / "commit.json").write_bytes(b"")
    restored, held, _ = load_into_new(store)
    assert restored.step == 2 and differences(held, trained[1][2]) == []
    assert [NEWEST in restored.skipped[0][0], OLDER in restored.skipped[1][0]] == [True, True]


def test_a_named_checkpoint_is_used_when_it_is_the_newest_good_one(store, trained):
    flip(store / NEWEST / "optimizer.safetensors", 5000)
    restored, held, _ = load_into_new(store)
    assert restored.step == 4 and restored.path.name == "best" and restored.skipped == ()
    assert differences(held, trained[1][4]) == []


@pytest.mark.parametrize("asked", [{"step": 4}, {"name": "best"}])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_that_was_asked_for_raises_and_touches_nothing(asked, file, store):
    path = store / NEWEST if "step" in asked else store / "named" / "best"
    if "step" in asked:
        drop_named(store)
    flip(path / file, 200)
    model, opt, counted = build(1)
    before, random_before = digest(snapshot(model, opt), counted.steps), torch.get_rng_state()
    with pytest.raises(fxckpt.Corrupt, match=file):
        fxckpt.load(store, model=model, optimizer=opt, extra={"c": counted}, **asked)
    assert digest(snapshot(model, opt), counted.steps) == before
    assert torch.equal(torch.get_rng_state(), random_before)


@pytest.mark.parametrize("file", FILES)
def test_all_damaged_is_an_error_never_a_fresh_start_and_touches_nothing(file, store):
    drop_named(store)
    for name in (NEWEST, OLDER, OLDEST):
        flip(store / name / file, 300)
    model, opt, counted = build(1)
    before = digest(snapshot(model, opt), counted.steps)
    with pytest.raises(fxckpt.Corrupt) as found:
        fxckpt.load(store, model=model, optimizer=opt, extra={"c": counted})
    assert all(name in str(found.value) for name in (NEWEST, OLDER, OLDEST))
    assert digest(snapshot(model, opt), counted.steps) == before


def test_training_goes_on_from_the_older_one_and_its_successors_win(store, trained):
    """After a fallback the damaged checkpoint is newer by its number, but not what training goes on from."""
    drop_named(store)
    flip(store / NEWEST / "model.safetensors", 70_000)
    model, opt, counted = build(1)
    fxckpt.compile_step(opt, store, model=model, every=1, keep=3, update="native", chunk_mb=1, extra={"c": counted})
    assert fxckpt.load().step == 3
    for step in (4, 5):
        model(torch.randn(8, 300)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        counted.steps = step
    opt.ckpt.flush()
    opt.ckpt.shutdown()
    restored, held, steps = load_into_new(store)
    assert (restored.step, steps, restored.skipped) == (5, 5, ())
    assert differences(held, snapshot(model, opt)) == []
    for found in candidates(store):
        if not isinstance(found, fxckpt.Corrupt) and found.record.step in (4, 5) and found.record.parent is not None:
            assert found.path.name != NEWEST or found.record.generation > 4


def test_the_bad_one_is_given_up_first_and_the_one_that_was_loaded_is_kept(store):
    """keep=2: after a fallback from 4 to 3 the next commits may take 4's and 2's directories, not 3's before 5 is durable."""
    drop_named(store)
    flip(store / NEWEST / "model.safetensors", 70_000)
    model, opt, counted = build(1)
    fxckpt.compile_step(opt, store, model=model, every=1, keep=1, update="native", chunk_mb=1, max_async=1, extra={"c": counted})
    assert fxckpt.load().step == 3
    model(torch.randn(8, 300)).square().mean().backward()
    opt.step()
    assert (store / OLDER).is_dir()  # begun, not committed
    opt.ckpt.flush()
    assert next(found.record.step for found in candidates(store) if not isinstance(found, Exception)) == 4
    opt.ckpt.shutdown()
    assert load_into_new(store)[0].step == 4


@pytest.mark.parametrize("damage", ["store.json", "lock", "junk"])
def test_damage_to_what_is_not_a_checkpoint_costs_nothing(damage, store, trained):
    drop_named(store)
    if damage == "store.json":
        (store / "store.json").write_bytes(b"\0" * 40)
    elif damage == "lock":
        (store / "lock").unlink()
    else:
        (store / "step-000000009.partial").mkdir()
        (store / "slot-7.partial").mkdir()
        (store / "step-000000008").mkdir()  # nothing a crash can leave; a person can
    model, opt, counted = build(1)
    fxckpt.compile_step(opt, store, model=model, every=1, update="native", chunk_mb=1, extra={"c": counted})
    restored = fxckpt.load()
    assert restored.step == 4 and differences(snapshot(model, opt), trained[1][4]) == []
    model(torch.randn(8, 300)).square().mean().backward()
    opt.step()
    opt.ckpt.flush()
    assert json.loads((store / "store.json").read_text())
    assert fxckpt.latest(store).step == 5


def test_a_fresh_run_reads_once_and_takes_no_step_with_parts_of_a_corrupt_checkpoint(store):
    """Nothing trained is at stake before the first step, so one pass reads and verifies; a mixture is never trained on."""
    drop_named(store)
    for name in (NEWEST, OLDER, OLDEST):
        flip(store / name / "optimizer.safetensors", os.path.getsize(store / name / "optimizer.safetensors") - 4000)
    model, opt, counted = build(1)
    fxckpt.compile_step(opt, store, model=model, every=1, update="native", chunk_mb=1, extra={"c": counted})
    with pytest.raises(fxckpt.Corrupt, match=r"(?s)none of its checkpoints.*build the model"):
        fxckpt.load()
    model(torch.randn(8, 300)).square().mean().backward()
    with pytest.raises(fxckpt.SetupError, match="parts of a corrupt checkpoint"):
        opt.step()
    with pytest.raises(fxckpt.SetupError, match="parts of a corrupt checkpoint"):
        opt.ckpt.save()


def test_a_fresh_run_that_reads_a_bad_chunk_late_falls_back_whole(store, trained):
    flip(store / NEWEST / "optimizer.safetensors", os.path.getsize(store / NEWEST / "optimizer.safetensors") - 4000)
    drop_named(store)
    model, opt, counted = build(1)
    fxckpt.compile_step(opt, store, model=model, every=1, update="native", chunk_mb=1, extra={"c": counted})
    assert fxckpt.load().step == 3
    assert differences(snapshot(model, opt), trained[1][3]) == []
    opt.ckpt.shutdown()


def test_a_run_that_has_trained_loses_nothing_to_a_corrupt_checkpoint(store):
    drop_named(store)
    model, opt, counted = build(1)
    fxckpt.compile_step(opt, store, model=model, every=100, update="native", chunk_mb=1, fresh=True, extra={"c": counted})
    model(torch.randn(8, 300)).square().mean().backward()
    opt.step()
    for name in (NEWEST, OLDER, OLDEST):
        if (store / name).exists():
            flip(store / name / "optimizer.safetensors", 300)
    before = digest(snapshot(model, opt), counted.steps)
    with pytest.raises(fxckpt.Corrupt):
        fxckpt.load(step=4)
    assert digest(snapshot(model, opt), counted.steps) == before
    opt.step()
