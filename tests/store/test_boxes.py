"""Boxes: what two have in common is read from where it lies to where it belongs, whatever the two tilings are."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import plain_reader
import pytest
from boxed import grid, part_of_array, write_boxed
from fuzzing import sealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxckpt.cli import main
from fxckpt.errors import Corrupt
from fxckpt.store import boxes as arithmetic
from fxckpt.store import names
from fxckpt.store import reader as readers
from fxckpt.store.boxes import are_disjoint
from fxckpt.store.reader import Reader
from fxckpt.store.record import Record

W = names.MODEL, "w"


def tilings(shape, most=5):
    """Lists of boxes that are all of a tensor, each once: one is cut in two again and again, perhaps into nothing and all."""
    start = [((0,) * len(shape), tuple(shape))]
    if not shape:
        return st.just(start)
    cuts = st.lists(st.tuples(st.integers(0, 99), st.integers(0, len(shape) - 1), st.floats(0, 1)), max_size=most - 1)
    return cuts.map(lambda given: _cut(start, given))


def _cut(tiling, cuts):
    for which, dim, where in cuts:
        offset, shape = tiling.pop(which % len(tiling))
        at = round(where * shape[dim])
        for begin, size in ((0, at), (at, shape[dim] - at)):
            moved = (*offset[:dim], offset[dim] + begin, *offset[dim + 1 :])
            tiling.append((moved, (*shape[:dim], size, *shape[dim + 1 :])))
    return tiling


SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.sampled_from([(3000,), (70, 40), (5, 3, 200), (1, 1, 1, 1)])
STORED = SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), tilings(shape), tilings(shape)))
ITEMS = st.sampled_from([("U8", np.uint8), ("BF16", np.uint16), ("F32", np.float32), ("F64", np.float64)])


def address(array):
    """Memory as ``read_into`` takes it: of an array in the usual order without sizes and strides."""
    return (array.ctypes.data, None, None) if array.flags.c_contiguous else (array.ctypes.data, array.shape, array.strides)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(STORED, ITEMS, st.booleans(), st.sampled_from([1, 64, 1 << 16]))
def test_every_box_of_one_tiling_is_read_out_of_any_other(stored, item, in_columns, sheet):
    shape, tiling, wanted = stored
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, math.prod(shape) * np.dtype(item[1]).itemsize, np.uint8).view(item[1]).reshape(shape)
    arithmetic.SHEET_BYTES, before = sheet, arithmetic.SHEET_BYTES
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = write_boxed(Path(scratch) / "step", {W: whole}, {W: tiling}, max(len(tiling), 2), dtype=item[0])
            reader = Reader(path)
            for box in wanted:
                target = np.zeros(box[1], item[1], order="F" if in_columns else "C")
                reader.read_into({W: address(target)}, boxes={W: box})
                assert target.tobytes() == part_of_array(whole, box).tobytes()
            target = np.zeros(shape, item[1])
            reader.read_into({W: address(target)})
            assert target.tobytes() == whole.tobytes()
    finally:
        arithmetic.SHEET_BYTES = before


def test_boxes_are_disjoint_or_one_element_of_two_is_found():
    for shape, parts in (((7, 5), (3, 2)), ((64,), (64,)), ((4, 4, 4), (2, 1, 4)), ((2, 9), (4, 2))):
        tiling = sorted(each for each in grid(shape, parts) if all(each[1]))
        assert are_disjoint(tiling)
        for box in tiling:
            assert not are_disjoint(sorted([*tiling, (box[0], (1,) * len(shape))]))
    assert are_disjoint([((), ())]) and not are_disjoint([((), ()), ((), ())])


# ---- the records of ranks as one ----

X = np.arange(60, dtype=np.float32).reshape(10, 6)
M = names.OPTIMIZER, "exp_avg/w"


def test_boxes_of_all_parts_are_one_tensor_in_the_order_of_their_offsets(tmp_path):
    boxes = grid((10, 6), (2, 2))
    path = write_boxed(tmp_path / "a", {W: X, M: X, (names.MODEL, "b"): X[0]}, {W: boxes, M: boxes[::-1]}, 4)
    record = Reader(path).record
    assert {(names.kind_of(t.file), t.key): t.shape for t in record.tensors()} == {
        W: (10, 6),
        M: (10, 6),
        (names.MODEL, "b"): (6,),
    }
    w, m = (next(t for t in record.tensors() if t.key == key) for key in ("w", "exp_avg/w"))
    assert [piece.offset for piece in w.pieces] == [piece.offset for piece in m.pieces] == [(0, 0), (0, 3), (5, 0), (5, 3)]
    assert (w.nbytes, w.whole, w.offset, w.file) == (240, None, None, w.pieces[0].file)
    assert [names.written_as(piece.file) for piece in m.pieces] == [names.OPTIMIZER] * 4 and m.file.startswith("optimizer-00004")
    assert [layer.nbytes for layer in record.layers] == [264, 240]
    Reader(path).verify()
    assert Reader(path, rank=3).record.tensors() == record.tensors()


@pytest.mark.parametrize("shape, parts", [((3, 4), (8, 1)), ((0, 4), (2, 1)), ((4, 0), (1, 2))])
def test_boxes_without_elements_are_no_pieces(tmp_path, shape, parts):
    whole = np.ones(shape, np.float32)
    reader = Reader(write_boxed(tmp_path / "a", {W: whole}, {W: grid(shape, parts)}, math.prod(parts)))
    reader.verify()
    (tensor,) = reader.record.tensors()
    assert tensor.shape == shape and len(tensor.pieces) == (3 if whole.size else 0)
    found = np.zeros(shape, np.float32)
    reader.read_into({W: address(found)})
    assert (found == whole).all()


@pytest.mark.parametrize("change", [
    {"whole": (11, 6)}, {"whole": (10, 7)}, {"offset": (0, 0)}, {"offset": (4, 0)}, {"dtype": "I32"}, {"key": "v"},
    {"whole": None, "offset": None},
])  # fmt: skip
def test_boxes_that_do_not_make_one_tensor_are_damage(tmp_path, change):
    with pytest.raises(Corrupt, match=r"in parts|not all of it|in two parts"):
        Reader(write_boxed(tmp_path / "a", {W: X}, {W: grid((10, 6), (2, 1))}, change=change))


def test_two_boxes_that_overlap_are_damage_though_their_sizes_add_up(tmp_path):
    with pytest.raises(Corrupt, match="not all of it, each once"):
        Reader(write_boxed(tmp_path / "a", {W: X}, {W: [((0, 0), (5, 6)), ((2, 0), (5, 6))]}))


@pytest.mark.parametrize("change", [
    {"offset": None}, {"whole": None}, {"offset": [6, 0]}, {"offset": [5]}, {"whole": [10], "offset": [5]}, {"offset": [5, 1]},
    {"offset": [5, -1]}, {"whole": [10, 6.0]}, {"whole": "ab"}, {"offset": [5, True]}, {"more": 1}, {"format": 3}, {"format": 1},
])  # fmt: skip
def test_a_box_that_is_none_of_its_tensor_is_damage(tmp_path, change):
    path = write_boxed(tmp_path / "a", {W: X}, {W: grid((10, 6), (2, 1))}) / "part-00002-of-00002.json"
    body, good = json.loads(path.read_bytes()), Record.from_bytes(path.read_bytes(), "part").layers[0].tensors[0]
    assert (good.whole, good.offset, good.shape) == ((10, 6), (5, 0), (5, 6))
    (body if "format" in change else body["layers"][0]["tensors"][0]).update(change)
    with pytest.raises(Corrupt):
        Record.from_bytes(sealed(body), "part")


def test_a_record_has_the_new_number_only_if_it_has_boxes(tmp_path):
    first = write_boxed(tmp_path / "a", {W: X}, {W: grid((10, 6), (1, 1))}) / names.COMMIT
    second = write_boxed(tmp_path / "b", {W: X}, {}) / names.COMMIT
    formats = [json.loads(each.read_bytes()) for each in (first, second, first.parent / "part-00002-of-00002.json")]
    assert [each["format"] for each in formats] == [4, 3, 3]
    assert [sorted(each["layers"][0]["tensors"][0].keys() & {"whole", "offset"}) for each in formats[:2]] == [
        ["offset", "whole"],
        [],
    ]


# ---- what is read ----


def reads_of(monkeypatch):
    """What is read from now on: (file, chunks)."""
    found, real = [], readers.read_verified
    monkeypatch.setattr(
        readers,
        "read_verified",
        lambda *a, **how: (found.append((Path(a[0]).name, [chunk for each in how["only"] for chunk in each])), real(*a, **how)),
    )
    return found


def test_only_chunks_that_hold_something_wanted_are_read_and_no_other_file_is_opened(tmp_path, monkeypatch):
    big = np.arange(64 * 1024, dtype=np.float32).reshape(64, 1024)  # a row is a chunk
    path = write_boxed(tmp_path / "a", {W: big, M: big}, {W: grid(big.shape, (4, 1)), M: grid(big.shape, (4, 1))}, 4)
    for file in path.glob("*-0000[134]-of-00004.safetensors"):
        file.unlink()
    reader, read, found = Reader(path), reads_of(monkeypatch), np.zeros((3, 1024), np.float32)
    reader.read_into({W: address(found)}, boxes={W: ((20, 0), (3, 1024))})
    assert (found == big[20:23]).all()
    assert [(file, len(chunks)) for file, chunks in read] == [("model-00002-of-00004.safetensors", 3)]
    reader.read_into({}, boxes={})
    assert len(read) == 1


def test_a_column_of_long_rows_is_read_without_what_lies_between(tmp_path, monkeypatch):
    wide = np.arange(4 * 65536, dtype=np.float32).reshape(4, 65536)  # a row is 64 chunks
    reader = Reader(write_boxed(tmp_path / "a", {W: wide}, {W: grid(wide.shape, (2, 1))}))
    read, found = reads_of(monkeypatch), np.zeros((4, 16384), np.float32)
    reader.read_into({W: address(found)}, boxes={W: ((0, 16384), (4, 16384))})
    assert (found == wide[:, 16384:32768]).all() and sum(len(chunks) for _, chunks in read) <= 4 * 17


def test_what_is_read_to_be_cut_takes_little_memory_at_a_time(tmp_path, monkeypatch):
    tall = np.arange(4096 * 32, dtype=np.float32).reshape(4096, 32)
    monkeypatch.setattr(arithmetic, "SLAB_BYTES", 4096)
    monkeypatch.setattr(readers, "_LANDING", 8192)
    reader = Reader(write_boxed(tmp_path / "a", {W: tall}, {W: grid(tall.shape, (2, 1))}))
    taken, empty, found = [], np.empty, np.zeros((4096, 5), np.float32)
    monkeypatch.setattr(readers.np, "empty", lambda *a, **how: (taken.append(a[0]), empty(*a, **how))[1])
    reader.read_into({W: address(found)}, boxes={W: ((0, 3), (4096, 5))})
    assert (found == tall[:, 3:8]).all() and max(taken) == 4096


def test_a_flipped_bit_where_something_wanted_lies_is_named_and_elsewhere_is_not_seen(tmp_path):
    big = np.ones((64, 1024), np.float32)
    path = write_boxed(tmp_path / "a", {W: big}, {W: grid(big.shape, (2, 1))})
    file, found = path / "model-00002-of-00002.safetensors", np.zeros((1, 1024), np.float32)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    Reader(path).read_into({W: address(found)}, boxes={W: ((32, 0), (1, 1024))})
    with pytest.raises(Corrupt, match=r"layer 'model'.*CRC-32C"):
        Reader(path).read_into({W: address(found)}, boxes={W: ((63, 0), (1, 1024))})
    with pytest.raises(Corrupt):
        Reader(path).verify()


@pytest.mark.parametrize("box", [((0, 0), (11, 6)), ((5, 1), (5, 6)), ((0,), (5,))])
def test_a_box_that_the_tensor_has_not_is_an_error_before_anything_is_read(tmp_path, box):
    reader, found = Reader(write_boxed(tmp_path / "a", {W: X}, {W: grid((10, 6), (2, 1))})), np.zeros((11, 6), np.float32)
    with pytest.raises(ValueError, match="has no box of"):
        reader.read_into({W: address(found)}, boxes={W: box})


def test_a_store_without_boxes_gives_boxes_too(tmp_path):
    reader, found = Reader(write_boxed(tmp_path / "a", {W: X}, {})), np.zeros((4, 2), np.float32)
    reader.read_into({W: address(found)}, boxes={W: ((3, 2), (4, 2))})
    assert (found == X[3:7, 2:4]).all()


# ---- torch's own reader of such files ----


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_boxes_by_what_the_headers_say(tmp_path):
    import torch
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    tensors = {W: X, M: X + 1, (names.MODEL, "b"): X[0], (names.MODEL, "n"): np.float32(3).reshape(())}
    path = write_boxed(tmp_path / "a", tensors, {W: grid((10, 6), (4, 1)), M: grid((10, 6), (1, 4))}, 4)
    state = {key: torch.zeros(array.shape) for (_, key), array in tensors.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    for (_, key), array in tensors.items():
        assert (state[key].numpy() == array).all(), key


def test_a_reader_written_from_the_document_alone_finds_every_element(tmp_path):
    tensors = {W: X, M: X + 1, (names.MODEL, "b"): X[0], (names.MODEL, "n"): np.float32(3).reshape(())}
    path = write_boxed(tmp_path / "a", tensors, {W: grid((10, 6), (2, 2)), M: grid((10, 6), (4, 1))}, 4)
    found = plain_reader.read_together(str(path))
    for (kind, key), array in tensors.items():
        assert found[f"{names.written_as(kind).removesuffix('.safetensors')}/{key}"] == (
            "F32",
            list(array.shape),
            array.tobytes(),
        )
    overlapping = [((0, 0), (5, 6)), ((4, 0), (5, 6))]
    with pytest.raises(plain_reader.Damaged, match="in two boxes"):
        plain_reader.read_together(str(write_boxed(tmp_path / "b", {W: X}, {W: overlapping})))


# ---- commands ----


@pytest.fixture
def store(tmp_path):
    """Two checkpoints of four ranks, whose tensors lie in boxes of other layouts: one element differs."""
    changed = X.copy()
    changed[9, 5] += 1
    for step, array, parts in ((1, X, (4, 1)), (2, changed, (2, 2))):
        tensors = {W: array, M: X, (names.MODEL, "b"): X[0], (names.MODEL, "n"): np.float32(3).reshape(())}
        boxes = {W: grid((10, 6), parts), M: grid((10, 6), parts), (names.MODEL, "n"): [((), ())]}
        state = {"early": {"modules": {}}, "late": {"plain": {}}}
        write_boxed(tmp_path / "d" / names.step_name(step), tensors, boxes, 4, step=step, state=state)
    (tmp_path / "d" / "store.json").write_text('{"format": 1, "store_id": "boxed"}')
    return tmp_path / "d"


def test_commands_show_tensors_in_boxes_as_one_each(store, capsys):
    assert main(["ls", str(store)]) == main(["verify", str(store)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(store), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 4 tensors lie in boxes, up to 4 each" in shown
    assert re.search(r"^w +F32 +10×6 +4 boxes, the first in model-00001-of-00004.safetensors$", shown, re.MULTILINE), shown
    assert re.search(r"^b +F32 +6 +model-00001-of-00004.safetensors +\d+$", shown, re.MULTILINE)
    assert main(["inspect", str(store), "1", "--json"]) == 0
    (w,) = (t for layer in json.loads(capsys.readouterr().out)["layers"] for t in layer["tensors"] if t["key"] == "w")
    assert [(box["offset"], box["shape"]) for box in w["boxes"]] == [
        ([at, 0], [n, 6]) for at, n in ((0, 3), (3, 3), (6, 3), (9, 1))
    ]


def test_checkpoints_in_other_boxes_are_compared_by_element(store, capsys):
    assert main(["diff", str(store), "--tensors", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["w"]["parameters"]["changed"], rows["w"]["parameters"]["largest"]) == (1, 1.0)
    assert rows["exp_avg/w"]["state"]["changed"] == rows["b"]["parameters"]["changed"] == 0
    assert all(row["only_in"] is None for row in rows.values()) and rows["n"]["parameters"]["elements"] == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["torch", "safetensors", "dcp"])
def test_a_checkpoint_in_boxes_is_exported_gathered(store, form, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file

    out = tmp_path / "out"
    assert main(["export", str(store), str(out), "--format", form, "--which", "1"]) == 0
    if form == "torch":
        found = torch.load(out, weights_only=True)
    elif form == "safetensors":
        found = load_file(next(out.glob("*.safetensors")))
    else:
        found = {"w": torch.zeros(10, 6), "b": torch.zeros(6), "n": torch.zeros(())}
        torch.distributed.checkpoint.load({"model": found}, checkpoint_id=str(out), no_dist=True)
    assert (found["w"].numpy() == X).all() and (found["b"].numpy() == X[0]).all() and found["n"] == 3


def test_verify_names_the_box_that_is_damaged(store, capsys):
    file = store / names.step_name(1) / "optimizer-00003-of-00004.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert main(["verify", str(store)]) == 3
    shown = capsys.readouterr().out
    assert "optimizer-00003-of-00004.safetensors" in shown and "layer 'optim'" in shown
