"""Promise 5: every byte is verified on load; and listing and reading are safe while a trainer writes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from pathlib import Path

import instruments
import numpy as np
import pytest
import torch
from storing import a_record, start

from fxckpt.errors import Corrupt, NoCheckpoint, NotAStore
from fxckpt.store.dtypes import RawTensor, raw_tensor
from fxckpt.store.files import write_tensors
from fxckpt.store.layout import parse_header
from fxckpt.store.reader import Reader, candidates, checkpoints, latest
from fxckpt.store.record import LayerRecord, TensorRecord
from fxckpt.store.typed_json import decode_state, encode_state


@pytest.fixture(autouse=True)
def no_faults():
    yield
    instruments.fail_none()


@pytest.fixture
def two(root):
    """A store with steps 1 and 2, closed."""
    trainer = start(root, keep=2)
    trainer.save(1)
    trainer.save(2)
    trainer.close()
    return root


NEWEST = "step-000000002"
LAYERS = {"model.safetensors": "a, b", "optimizer.safetensors": "a, b", "state.safetensors": "extra state"}


# ---- listing ----


def test_the_listing_has_what_the_contract_says(two):
    first, second = checkpoints(two)
    assert (first.step, second.step) == (1, 2) and (first.generation, second.generation) == (1, 2)
    assert second.path == two / NEWEST and second.name is None and second.time == 2.0
    assert second.nbytes == sum(path.stat().st_size for path in second.path.glob("*.safetensors"))
    layer = second.layers[0]
    assert (layer.checkpoint_id, layer.name, layer.step, layer.parameters, layer.nbytes) == (2, "a", 2, 2000, 16000)
    assert layer.shapes == ((2000,), (2000,)) and layer.dtypes == ("F32", "F32") and layer.timestamp == 2.0
    assert layer.keys == ("a.weight", "exp_avg/a.weight")
    header = parse_header((second.path / "model.safetensors").read_bytes(), 16384)
    assert layer.offset == header["a.weight"].begin


@pytest.mark.parametrize("made", [False, True])
def test_nothing_there_is_an_empty_list(root, made):
    if made:
        root.mkdir()
    assert checkpoints(root) == [] and candidates(root) == [] and latest(root) is None


def test_a_store_without_checkpoints_is_an_empty_list(root):
    start(root).close()
    assert checkpoints(root) == []


def test_a_directory_of_others_files_has_no_checkpoints_and_one_of_another_store_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    assert checkpoints(tmp_path) == [] == candidates(tmp_path) and latest(tmp_path) is None
    (tmp_path / "store.json").write_text("{}")
    for function in (checkpoints, candidates, latest):
        with pytest.raises(NotAStore):
            function(tmp_path)


def test_candidates_are_newest_first_with_damaged_ones_where_their_step_puts_them(root):
    trainer = start(root, keep=9)
    for step in (1, 2, 3, 4):
        trainer.save(step)
    trainer.save(3, name="best")
    trainer.close()
    for step in (2, 4):
        (root / f"step-00000000{step}" / "commit.json").write_bytes(b"{}")
    found = candidates(root)
    assert [each.path if isinstance(each, Corrupt) else each.record.step for each in found] == [
        str(root / "step-000000004" / "commit.json"),
        3,
        3,
        str(root / "step-000000002" / "commit.json"),
        1,
    ]
    assert found[1].record.name == "best" and [each.step for each in checkpoints(root)] == [1, 3, 3]


def test_a_record_that_is_missing_is_named(two):
    (two / NEWEST / "commit.json").unlink()
    assert isinstance(candidates(two)[0], Corrupt)
    with pytest.raises(Corrupt, match=r"commit.json: the file is missing"):
        Reader(two / NEWEST)


def test_what_has_a_suffix_or_another_name_is_no_checkpoint(two):
    for name in ("slot-7.partial", "slot-8.bad", "step-2", "step-000000009.partial", "step-000000009x", "backup"):
        shutil.copytree(two / NEWEST, two / name)
    (two / "named").mkdir()
    shutil.copytree(two / NEWEST, two / "named" / "x.partial")
    (two / "step-000000077").symlink_to(two / NEWEST)
    (two / "step-000000078").write_text("a file")
    assert [each.step for each in checkpoints(two)] == [1, 2]


def test_a_reader_of_nothing_says_so(two):
    with pytest.raises(NoCheckpoint, match="step-000000009"):
        Reader(two / "step-000000009")


# ---- verifying ----


def test_latest_verifies_and_falls_back(two, caplog):
    (two / NEWEST / "optimizer.safetensors").write_bytes(bytes(16384))
    assert latest(two, verify=False).step == 2
    assert latest(two).step == 1
    assert "optimizer.safetensors" in caplog.text
    shutil.rmtree(two / "step-000000001")
    assert latest(two) is None


def test_any_flipped_bit_is_found_and_named(two):
    draw = random.Random(0)
    for file, layers in LAYERS.items():
        path = two / NEWEST / file
        good = path.read_bytes()
        places = [*range(16), *(draw.randrange(len(good)) for _ in range(60)), len(good) - 1]
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(Corrupt) as caught:
                Reader(two / NEWEST).verify()
            assert caught.value.path == str(path)
            if file != "state.safetensors":
                assert caught.value.offset == place // 4096 * 4096
            assert caught.value.layer is None or set(caught.value.layer.split(", ")) <= set(layers.split(", "))
        path.write_bytes(good)
    Reader(two / NEWEST).verify()


def test_the_layer_named_is_the_one_whose_bytes_are_damaged(two):
    path = two / NEWEST / "model.safetensors"
    header = parse_header(path.read_bytes(), 16384)
    for key, layer in (("a.weight", "a"), ("b.weight", "b")):
        good = path.read_bytes()
        bad = bytearray(good)
        at = header[key].begin if layer == "a" else header[key].begin + header[key].nbytes - 1
        bad[at] ^= 1
        path.write_bytes(bad)
        with pytest.raises(Corrupt, match="CRC-32C") as caught:
            Reader(two / NEWEST).verify()
        assert layer in caught.value.layer.split(", ") and f"layer {caught.value.layer!r}, offset" in str(caught.value)
        path.write_bytes(good)


@pytest.mark.parametrize("file", [*LAYERS, "commit.json"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "link to itself", "socket"])
def test_something_else_in_a_file_s_place_is_damage_and_does_not_hang(two, file, kind):
    path = two / NEWEST / file
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it to read would wait for a writer
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        os.mknod(path, 0o140644)
    with pytest.raises(Corrupt, match=file):
        Reader(two / NEWEST).verify()
    assert latest(two).step == 1
    start(two, keep=2).close()


def test_a_record_of_another_checkpoint_is_damage_and_says_whose_it_is(two):
    shutil.copy(two / "step-000000001" / "commit.json", two / NEWEST)
    found = candidates(two)
    assert isinstance(found[0], Corrupt) and "step 1, generation 1" in str(found[0]) and found[1].record.step == 1
    with pytest.raises(Corrupt, match="another checkpoint"):
        Reader(two / NEWEST)


@pytest.mark.parametrize("name", ["step-000000003", "step-000000002-g7", "named/other"])
def test_a_checkpoint_under_a_name_that_is_not_its_own_is_damage(two, name):
    (two / "named").mkdir()
    shutil.copytree(two / NEWEST, two / name)
    assert [str(each.path) for each in candidates(two) if isinstance(each, Corrupt)] == [str(two / name / "commit.json")]


def test_a_copy_outside_the_store_may_have_any_name(two, tmp_path):
    for name in ("backup", "step-2", "slot-7.partial"):
        shutil.copytree(two / NEWEST, tmp_path / "elsewhere" / name)
        Reader(tmp_path / "elsewhere" / name).verify()


@pytest.mark.parametrize("file", LAYERS)
@pytest.mark.parametrize("damage", ["cut", "grown", "empty", "missing", "a directory", "zeroed", "swapped"])
def test_any_damage_to_a_file_is_found_and_the_file_is_named(two, file, damage):
    path = two / NEWEST / file
    good = path.read_bytes()
    path.unlink()
    if damage == "a directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {
                "cut": good[:-1],
                "grown": good + b"\0",
                "empty": b"",
                "swapped": good[4096:] + good[:4096],
                "zeroed": good[:-4096] + bytes(4096),
            }[damage]
        )
    with pytest.raises(Corrupt) as caught:
        Reader(two / NEWEST).verify()
    assert file in str(caught.value)
    assert latest(two).step == 1


def test_a_file_of_the_right_checksums_but_another_layout_is_found(root):
    """Written wrong, not damaged: the record says one thing and the header another."""
    trainer = start(root)
    slot = trainer.store.acquire()
    file = write_tensors(slot.held(), "model.safetensors", {"w": np.zeros(4, np.float32)})
    wrong = TensorRecord("model.safetensors", "w", 4096 - 16, 16, (2, 2), "F32")
    layer = LayerRecord(0, "w", "update", 1, 1.0, 4, 16, (wrong,))
    path = trainer.store.commit(slot, a_record(1, files=(file,), layers=(layer,)), {})
    with pytest.raises(Corrupt, match="in the header and"):
        Reader(path).verify()
    trainer.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADMSG])
def test_a_read_error_of_the_medium_is_damage(two, code):
    reader = Reader(two / NEWEST)
    instruments.fail(2, code, "pread")
    with pytest.raises(Corrupt, match="cannot be read"):
        reader.verify()
    outcomes = []
    for nth in range(1, 9):  # store.json, then each record
        instruments.fail(nth, code, "pread")
        outcomes.append([isinstance(each, Corrupt) for each in candidates(two)])
    assert [True, False] in outcomes and [False, True] in outcomes and [False, False] in outcomes


def test_trouble_of_the_reader_is_not_damage(two):
    reader = Reader(two / NEWEST)
    instruments.fail(1, errno.EMFILE, "open")
    with pytest.raises(OSError, match="Too many open files"):
        reader.verify()


# ---- reading ----


def test_tensors_are_read_to_where_they_belong(two):
    reader = Reader(two / NEWEST)
    a, b = torch.zeros(2000), torch.zeros(2000, 3)[:, 1]
    reader.read_into(
        {
            ("model.safetensors", "a.weight"): (a.data_ptr(), None, None),
            ("optimizer.safetensors", "exp_avg/b.weight"): (b.data_ptr(), tuple(b.shape), (12,)),
        }
    )
    assert (a == 2).all() and (b == 2).all()


def test_a_target_that_is_not_in_the_record_is_an_error_before_anything_is_read(two):
    a = torch.zeros(2000)
    with pytest.raises(KeyError):
        Reader(two / NEWEST).read_into(
            {
                ("model.safetensors", "a.weight"): (a.data_ptr(), None, None),
                ("model.safetensors", "nope"): (a.data_ptr(), None, None),
            }
        )
    assert (a == 0).all()


def test_files_without_a_target_are_verified_unless_asked_not_to(two):
    (two / NEWEST / "optimizer.safetensors").write_bytes(bytes(16384))
    reader, a = Reader(two / NEWEST), torch.zeros(2000)
    targets = {("model.safetensors", "a.weight"): (a.data_ptr(), None, None)}
    with pytest.raises(Corrupt):
        reader.read_into(targets)
    reader.read_into(targets, "model.safetensors")
    assert (a == 2).all()


STATE = {
    "sched": {"last_epoch": 3, "milestones": {2: 1}}, "rng": torch.get_rng_state(), "bf16": torch.arange(7).bfloat16(),
    "complex": torch.ones(2, 3, dtype=torch.complex64), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5),
    "numpy": np.arange(6, dtype=">i2").reshape(2, 3), "bool": np.array([True, False]),
    "f8": torch.ones(3).to(torch.float8_e5m2),
    "a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "big": np.random.default_rng(0).random(700_000),
}  # fmt: skip


def test_state_tensors_come_back_from_the_file_exactly(root):
    tensors: dict = {}
    encoded = encode_state(STATE, tensors, "extra")
    trainer = start(root)
    slot = trainer.store.acquire()
    path = trainer.store.commit(slot, a_record(1, state=encoded), tensors)
    trainer.close()
    reader = Reader(path)
    reader.verify()
    assert len(reader.record.files[0].crc32c) > 1, "more than one checksum"
    found = reader.state_tensors()
    assert isinstance(found["extra/bf16"], RawTensor) and isinstance(found["extra/big"], np.ndarray)
    back = decode_state(reader.record.state, found)
    assert list(back) == list(STATE) and back["sched"] == STATE["sched"]
    for key in ("rng", "bf16", "complex", "empty", "scalar", "f8", "a/b"):
        assert back[key].dtype == STATE[key].dtype and back[key].shape == STATE[key].shape
        assert bytes(raw_tensor(back[key]).data) == bytes(raw_tensor(STATE[key]).data)
    for key in ("numpy", "bool", "big"):
        assert back[key].dtype == STATE[key].dtype and np.array_equal(back[key], STATE[key])
    assert back["a"]["b"] == 0 and back["a/b"] == 1


def test_safetensors_opens_the_state_file_too(two):
    from safetensors.numpy import load_file

    assert (load_file(two / NEWEST / "state.safetensors")["rng"] == 2).all()


# ---- a trainer that writes meanwhile ----


def recycle(path: Path, to: Path) -> None:
    """What a trainer does first when it takes a checkpoint back."""
    path.rename(to)
    (to / "commit.json").unlink()


def test_a_checkpoint_taken_back_while_it_is_read_vanished_and_is_not_corrupt(two):
    reader = Reader(two / NEWEST)
    recycle(two / NEWEST, two / "slot-9.partial")
    with pytest.raises(NoCheckpoint, match="taken back"):
        reader.verify()
    with pytest.raises(NoCheckpoint):
        reader.state_tensors()


def test_another_checkpoint_under_the_same_name_is_not_corruption_of_the_old_one(two):
    reader = Reader(two / NEWEST)
    shutil.copytree(two / "step-000000001", two / "other")
    recycle(two / NEWEST, two / "slot-9.partial")
    (two / "other").rename(two / NEWEST)
    with pytest.raises(NoCheckpoint):
        reader.verify()


def test_another_record_in_the_same_directory_is_not_corruption_of_the_old_one(two):
    """The slot came round and got the name again: the same inode, another generation."""
    reader = Reader(two / NEWEST)
    for file in ("commit.json", "model.safetensors"):
        shutil.copy(two / "step-000000001" / file, two / NEWEST / file)
    with pytest.raises(NoCheckpoint):
        reader.verify()


def test_a_listing_skips_what_vanishes_under_it(two, monkeypatch):
    from fxckpt.store import reader

    original = reader.read_record

    def racing(path, *more):
        if path.endswith(NEWEST) and os.path.isdir(path):
            recycle(Path(path), two / "slot-9.partial")
        return original(path, *more)

    monkeypatch.setattr(reader, "read_record", racing)
    assert [each.step for each in checkpoints(two)] == [1]


def test_a_store_that_changes_faster_than_it_is_read_is_not_called_empty(two, monkeypatch):
    from fxckpt.store import reader

    def overtaken(self):
        raise NoCheckpoint("taken back")

    monkeypatch.setattr(reader.Reader, "verify", overtaken)
    with pytest.raises(NoCheckpoint, match="faster"):
        latest(two)


def test_readers_of_a_busy_store_never_see_damage_and_never_go_back(root, caplog):
    trainer = start(root, keep=2, max_async=1)
    trainer.save(1)
    stop, problems, looks = threading.Event(), [], []

    def read():
        newest = 0
        while not stop.is_set():
            try:
                found = latest(root)
                for each in candidates(root):
                    if isinstance(each, Corrupt):
                        raise each
                    try:
                        assert (Reader(each.path).state_tensors()["rng"] == each.record.step).all()
                    except NoCheckpoint:
                        continue
            except Exception as error:
                problems.append(error)
                return
            if found is None or found.step < newest:
                problems.append(f"{found} after step {newest}")
                return
            newest = found.step
            looks.append(newest)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(2, 120):
        trainer.save(step)
        time.sleep(0.003)
    stop.set()
    for thread in threads:
        thread.join()
    trainer.close()
    assert not problems and len(set(looks)) > 3
    assert "does not verify" not in caplog.text
