"""Promise 8: the files are plain safetensors, laid out so that every tensor is aligned and the file fills blocks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load as load_torch

from fxckpt.errors import Corrupt, SetupError
from fxckpt.store.dtypes import DTYPES, item_size
from fxckpt.store.layout import BLOCK, TensorSpec, lay_out, parse_header

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
TYPES = st.sampled_from(sorted(set(DTYPES) - {"F8_E8M0"}))  # torch 2.13's safetensors has no name for that one
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SPECS = st.lists(st.tuples(NAMES, TYPES, SHAPES), max_size=12, unique_by=lambda spec: spec[0]).map(
    lambda items: [TensorSpec(*item, layer) for layer, item in enumerate(items)])  # fmt: skip


def content(layout, seed=0):
    """The file that ``layout`` describes, with random data."""
    data = np.random.default_rng(seed).integers(0, 2, layout.nbytes - len(layout.header), np.uint8)
    return layout.header + data.tobytes()


@settings(max_examples=150, deadline=None)
@given(SPECS)
@example([])
@example([TensorSpec("", "F32", (), 0), TensorSpec('\0"\\\n\u2028🔥', "BF16", (0, 3), 0)])
def test_any_layout_is_a_file_that_safetensors_opens_with_the_same_bytes(specs):
    layout = lay_out("model.safetensors", specs)
    raw = content(layout)
    loaded = load_torch(raw)
    assert loaded.keys() == {spec.key for spec in specs}
    for placed in layout.tensors:
        tensor = loaded[placed.spec.key]
        assert tuple(tensor.shape) == placed.spec.shape
        stored = raw[placed.begin : placed.begin + placed.nbytes]
        assert bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) == stored


@settings(max_examples=150, deadline=None)
@given(SPECS)
def test_files_fill_blocks_without_holes_and_every_tensor_is_aligned(specs):
    layout = lay_out("x", specs)
    assert layout.nbytes % BLOCK == 0 and layout.nbytes > 0
    at = len(layout.header)
    for placed in layout.tensors:
        assert placed.begin == at
        assert placed.nbytes == math.prod(placed.spec.shape) * item_size(placed.spec.dtype)
        assert placed.begin % item_size(placed.spec.dtype) == 0
        at += placed.nbytes
    assert at == layout.nbytes


@settings(max_examples=100, deadline=None)
@given(SPECS)
def test_parse_header_gives_back_what_was_laid_out(specs):
    layout = lay_out("x", specs, {"format": "pt"})
    parsed = parse_header(layout.header, layout.nbytes)
    assert [(p.spec.key, p.spec.dtype, p.spec.shape, p.begin, p.nbytes) for p in parsed.values()] == sorted(
        [(p.spec.key, p.spec.dtype, p.spec.shape, p.begin, p.nbytes) for p in layout.tensors],
        key=lambda row: (row[3], row[4], [p.spec.key for p in layout.tensors].index(row[0])))  # fmt: skip


def test_tensors_of_one_item_size_keep_emit_order():
    specs = [TensorSpec("b", "F32", (2,), 0), TensorSpec("a", "I64", (), 1), TensorSpec("c", "BF16", (1,), 2),
             TensorSpec("a2", "I32", (2,), 3)]  # fmt: skip
    assert [placed.spec.key for placed in lay_out("x", specs).tensors] == ["c", "b", "a2", "a"]


def test_the_file_on_disk_is_opened_by_safetensors_with_metadata(tmp_path):
    layout = lay_out("x", [TensorSpec("w", "F64", (3,), 0)], {"step": "7"})
    (tmp_path / "x").write_bytes(layout.header + np.arange(3.0).tobytes())
    assert load_file(tmp_path / "x")["w"].tolist() == [0.0, 1.0, 2.0]
    with safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"step": "7"}


@pytest.mark.parametrize("specs, why", [
    ([TensorSpec("a", "F32", (1,), 0)] * 2, "two tensors"),
    ([TensorSpec("__metadata__", "F32", (1,), 0)], "reserved"),
    ([TensorSpec("a", "C128", (1,), 0)], "C128"),
    ([TensorSpec("a", "F32", (-1,), 0)], "shape"),
    ([TensorSpec("\ud800", "F32", (1,), 0)], "Unicode"),
])  # fmt: skip
def test_what_no_file_can_hold_is_refused_by_name(specs, why):
    with pytest.raises(SetupError, match=why):
        lay_out("x", specs)


def with_header(text, data=b""):
    """A file with this header text."""
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + data


GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize("raw", [
    b"", b"\0" * 7, b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}", with_header("[]"), with_header(" {}"),
    with_header("{"), with_header("{}x"), with_header(b'{"\xff":1}'), with_header("{" * 100_000),
    with_header("[" * 1_000_000), with_header("{}", b"trailing"), with_header('{"__metadata__":{"a":1}}'),
    with_header(json.dumps({"a": GOOD | {"extra": 1}}), b"ab"),
    with_header(json.dumps({"a": GOOD | {"dtype": "X"}}), b"ab"),
    with_header(json.dumps({"a": GOOD | {"dtype": []}}), b"ab"), with_header(json.dumps({"a": 5}), b"ab"),
    with_header(json.dumps({"a": GOOD | {"shape": [True, 2]}}), b"ab"),
    with_header(json.dumps({"a": GOOD | {"shape": [-1, -2]}}), b"ab"),
    with_header(json.dumps({"a": GOOD | {"shape": [3]}}), b"ab"),
    with_header(json.dumps({"a": GOOD | {"data_offsets": [1, 3]}}), b"abc"),
    with_header(json.dumps({"a": GOOD | {"data_offsets": [2, 0]}}), b"ab"),
    with_header(json.dumps({"a": GOOD, "b": GOOD}), b"ab"), with_header(json.dumps({"a": GOOD}), b"a"),
    with_header(json.dumps({"a": GOOD, "b": GOOD}).replace('"b"', '"a"'), b"ab"),
    with_header(json.dumps({"a": GOOD | {"shape": [1 << 70, 0], "data_offsets": [0, 0]}}), b""),
])  # fmt: skip
def test_a_malformed_header_is_corrupt_and_nothing_else(raw):
    with pytest.raises(Corrupt):
        parse_header(raw, len(raw), "x")


@settings(max_examples=200, deadline=None)
@given(SPECS, st.data())
def test_a_flipped_header_bit_is_corrupt_or_parses_to_a_gapless_cover(specs, data):
    layout = lay_out("x", specs)
    raw = bytearray(layout.header)
    raw[data.draw(st.integers(0, min(len(raw), 600) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        parsed = parse_header(bytes(raw), layout.nbytes, "x")
    except Corrupt:
        return
    assert sum(placed.nbytes for placed in parsed.values()) <= layout.nbytes


def test_a_header_that_says_more_than_the_bytes_given_is_corrupt():
    layout = lay_out("x", [])
    with pytest.raises(Corrupt):
        parse_header(layout.header[:100], layout.nbytes, "x")
