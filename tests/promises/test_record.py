"""The record and the tagged state: what comes back is what was given, in type and value, or it is an error by name."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import math
import random
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.errors import Corrupt, StateError
from fxckpt.store.checks import structure_of
from fxckpt.store.dtypes import raw_tensor
from fxckpt.store.record import FileRecord, LayerRecord, Record, TensorRecord
from fxckpt.store.typed_json import decode_state, encode_state


def typed(key):
    """A key or set as text that tells 1, 1.0 and True apart, and does not depend on a set's order."""
    inner = sorted(map(typed, key)) if isinstance(key, (set, frozenset)) else repr(key)
    return f"{type(key)} {inner}"


def same(a, b):
    """Equal in type and value all the way down; floats by their bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        alike = (a.dtype, a.shape, a.requires_grad, a.device) == (b.dtype, b.shape, b.requires_grad, b.device)
        return alike and bytes(raw_tensor(a).data) == bytes(raw_tensor(b).data)
    if isinstance(a, dict):
        extra = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        return extra and len(a) == len(b) and all(
            same(x, y) and same(a[x], b[y]) for x, y in zip(a, b))  # fmt: skip
    if isinstance(a, deque):
        return a.maxlen == b.maxlen and same(list(a), list(b))
    if isinstance(a, (set, frozenset)):
        return typed(a) == typed(b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def through_file(value):
    """Encode, write the record, read it, decode; tensors as numpy or raw bytes as a reader has them."""
    tensors = {}
    encoded = encode_state(value, tensors)
    record = Record.from_bytes(a_record(state=encoded).to_bytes(), "commit.json")
    return decode_state(record.state, {key: raw_tensor(tensor) for key, tensor in tensors.items()})


def a_record(**changes):
    """A record with something in every field."""
    tensor = TensorRecord("model.safetensors", "h.0.weight", 4096 - 24, 24, (2, 3), "F32")
    layers = (LayerRecord(0, "h.0", "update", 7, 1.5, 6, 24, (tensor,)), LayerRecord(1, "bn", "buffers", 7, 1.5, 0, 0, ()))
    record = Record(
        store_id="id",
        generation=12,
        parent=11,
        step=7,
        iteration=9,
        updates=6,
        time=1234.5678,
        files=(FileRecord("model.safetensors", 4096, 4096, (7,)),),
        layers=layers,
        ties={"head.weight": "h.0.weight"},
        optimizers=[{"lr": 0.1}],
        state={"a": [1, None]},
    )
    return dataclasses.replace(record, **changes)


TEXT = st.text(st.characters(codec=None), max_size=8)  # surrogates included
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(1 << 200), 1 << 200), st.floats(), st.complex_numbers(),
    TEXT,
    st.binary(max_size=9), st.binary(max_size=9).map(bytearray), st.floats(width=32).map(np.float32),
    st.floats().map(np.float64), st.integers(-5, 5).map(np.int8), st.integers(0, 1 << 60).map(np.uint64),
    st.booleans().map(np.bool_), st.floats(width=16).map(np.float16), TEXT.map(np.str_),
    st.builds(range, st.integers(), st.integers()),
    st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda:1"),
    torch.Size([2, 0])]))  # fmt: skip
KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT, st.binary(max_size=4),
                 st.tuples(st.integers(), TEXT), st.frozensets(st.integers()), st.integers(0, 9).map(np.int64),
                 st.sampled_from(["!", "v", "__metadata__"]))  # fmt: skip
TENSORS = st.one_of(
    st.tuples(st.sampled_from(["f4", ">f4", "f2", "i8", "u2", "?", "c8", "c16", "M8[ns]", "U3", "S2", "g", ">i4"]),
              st.lists(st.integers(0, 3), max_size=3)).map(lambda a: np.ones(a[1], "i1").astype(a[0])),
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16, torch.complex64,
                               torch.complex128, torch.float8_e4m3fn, torch.uint16, torch.uint8]),
              st.lists(st.integers(0, 3), max_size=3)).map(lambda a: torch.ones(a[1]).to(a[0])))  # fmt: skip


def containers(inner):
    """Everything that holds something."""
    dicts = st.dictionaries(KEYS, inner, max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), dicts, dicts.map(OrderedDict),
        st.dictionaries(TEXT, inner, max_size=4), st.dictionaries(KEYS, st.integers(), max_size=4).map(Counter),
        st.tuples(st.sampled_from([None, int, list, dict, set, float]), dicts).map(lambda a: defaultdict(*a)),
        st.tuples(st.lists(inner, max_size=4), st.one_of(st.none(), st.integers(4, 9))).map(lambda a: deque(*a)),
        st.sets(KEYS, max_size=4), st.frozensets(KEYS, max_size=4))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.one_of(SCALARS, TENSORS), containers, max_leaves=20))
def test_any_state_comes_back_exactly(value):
    assert same(value, through_file(value))


@pytest.mark.parametrize("value", [
    math.nan, -math.nan, struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0], math.inf, -math.inf, -0.0, 5e-324,
    1e22, 0.1, 1.0, True, 1, {True: "bool", 2: "int"}, {1: "int", 0: "zero"}, 2**53, -(2**53), 2**4000, 10**5000,
    complex(-0.0, math.nan),
    "\ud800\udc00", {"\ud83d\ude00": 1}, {"!": 1}, {"!": "tuple", "v": []}, np.float64(-0.0),
    np.datetime64("2020-01-01"),
    np.str_(""), np.bytes_(b"ab"), np.longdouble(1) / 3, Counter({30: 1, 80: -2}), Counter({"a": 0.5}),
    deque([1, 2], maxlen=2), deque(maxlen=0),
    defaultdict(None, {1: 2}), torch.Size([]), (), set(), frozenset({1, "1"}), np.random.get_state(),
    random.getstate(),
    np.random.default_rng(3).bit_generator.state, np.random.Generator(np.random.PCG64DXSM(1)).bit_generator.state,
    {"last_epoch": 3, "milestones": Counter({2: 1}), "_last_lr": [0.1]}, torch.get_rng_state(),
    np.zeros((0, 3), ">c16"), torch.zeros(3, 0, dtype=torch.bfloat16), np.array(["a", "bcd"]), torch.tensor(5),
    torch.ones(3, requires_grad=True), torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), False),
    torch.complex(torch.ones(2), torch.ones(2)).conj(), torch.arange(12).reshape(3, 4).t(),
    {10**5000: 1}, np.str_("a\0"), torch.tensor([1 + 2j]).imag, torch.tensor([[1, 2], [3, 4]]).t()[:, 1:],
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_state_that_plain_json_would_change_comes_back_exactly(value):
    back = through_file(value)
    assert same(value, back)


def test_dict_order_and_shared_tensors_are_kept_as_copies():
    shared = torch.arange(3.0)
    value = {"b": shared, "a": shared, "list": [shared]}
    back = through_file(value)
    assert list(back) == ["b", "a", "list"]
    back["b"][0] = 9
    assert back["a"][0] == 0 and shared[0] == 0


def test_what_is_stored_is_the_state_at_the_call_however_late_it_is_written():
    tensors, live, array = {}, torch.zeros(3), np.zeros(2)
    encoded = encode_state({"ema": live, "counts": array}, tensors)
    live += 1
    array += 1
    back = decode_state(encoded, tensors)
    assert back["ema"].sum() == 0 and back["counts"].sum() == 0


def test_tensor_keys_come_from_the_path_and_never_collide():
    tensors = {}
    one = torch.ones(1)
    encode_state({"a/b": one, "a": {"b": one * 2}, "l": [one], "\ud800": one, 1: one}, tensors, "extra/ema")
    assert list(tensors) == ["extra/ema/a/b", "extra/ema/a/b#2", "extra/ema/l/0", "extra/ema/\\ud800", "extra/ema/1"]


class Color(enum.IntEnum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


class Sub(dict):
    pass


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_tensor_comes_back_with_the_order_of_its_elements(coalesced):
    made = torch.sparse_coo_tensor(torch.tensor([[3, 1, 3]]), torch.arange(6.0).reshape(3, 2), (5, 2), check_invariants=True)
    made = made.coalesce() if coalesced else made
    back = through_file({"momentum": made})["momentum"]
    assert (back.shape, back.dtype, back.is_coalesced()) == (made.shape, made.dtype, coalesced)
    assert torch.equal(back._indices(), made._indices()) and torch.equal(back._values(), made._values())


@pytest.mark.parametrize("value", [
    Color.RED, Point(1, 2), Sub(), object(), lambda: 0, defaultdict(lambda: 0), torch.eye(2).to_sparse_csr(), range,
    float,
    torch.empty(2, device="meta"), np.array([object()], dtype=object), np.zeros(1, dtype=[("a", "i4")]),
    np.zeros(1, dtype=[("a", "i4")])[0],
    np.ma.array([1]), np.dtype("f4"),
    {frozenset({Color.RED}): 1}, {torch.ones(1): 1}, torch.Generator(), ..., memoryview(b"a"),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_it_cannot_hold_is_an_error_that_names_the_path(value):
    with pytest.raises(StateError, match=r"^sched/inner/3"):
        encode_state({"inner": {3: value}}, {}, "sched")


def test_a_value_that_contains_itself_is_an_error_and_not_a_crash():
    loop = []
    loop.append(loop)
    with pytest.raises(StateError, match="contains itself"):
        encode_state({"a": loop}, {})


def test_encoding_does_not_import_torch():
    code = ("import sys; from fxckpt.store.typed_json import encode_state; import numpy as np;"
            "encode_state({'a': np.ones(3), 'b': {1: (2,)}}, {}); assert 'torch' not in sys.modules")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("encoded", [
    {"!": "no such tag"}, {"!": "tuple"}, {"!": "int", "v": "zz"}, {"!": "float", "v": "00"},
    {"!": "torch", "key": "absent"},
    {"!": "torch", "key": "t", "dtype": "load", "shape": [2]},
    {"!": "torch", "key": "t", "dtype": "float32", "shape": [3]},
    {"!": "array", "key": "t", "dtype": "|O", "shape": [1]}, {"!": "torch.dtype", "v": "load"},
    {"!": "dict", "v": [[[], 1]]},
    {"!": "dict", "v": [[1, 1], [1, 2]]}, {"!": "dict", "v": [[1]]}, {"!": "defaultdict", "of": "eval", "v": []},
    {"!": ["tuple"], "v": []}, {"!": "bytes", "v": "*"}, {"!": "torch.device", "v": "nowhere"},
    {"!": "array", "key": "t", "dtype": "<f4", "shape": [-1, -2]},
    {"!": "numpy", "dtype": "|O", "v": "0000000000000000"},
])  # fmt: skip
def test_malformed_state_is_corrupt_and_runs_nothing(encoded):
    with pytest.raises(Corrupt):
        decode_state({"a": encoded}, {"t": np.zeros(2, np.float32)})


LONG_RANGE = {"!": "range", "v": ["0x0", "0xffffff", "0x1"]}


@pytest.mark.parametrize("encoded", [
    *({"!": kind, "v": LONG_RANGE} for kind in ("tuple", "set", "frozenset", "torch.Size", "dict", "OrderedDict", "Counter")),
    {"!": "deque", "v": LONG_RANGE, "max": None}, {"!": "defaultdict", "of": "int", "v": LONG_RANGE},
    {"!": "numpy.text", "v": 10_000_000}, {"!": "numpy.text", "v": LONG_RANGE},
    *({"!": "array", "key": "empty", "dtype": dtype, "shape": [10_000_000]} for dtype in ("U", "S", "V0")),
])  # fmt: skip
def test_a_few_bytes_of_state_stand_for_no_more_than_they_hold(encoded):
    """What a record of a hundred bytes says must not take a gigabyte."""
    with pytest.raises(Corrupt):
        decode_state({"a": encoded}, {"empty": np.zeros(0, np.float32)})


def test_a_record_comes_back_equal_and_is_one_json_object():
    record = a_record()
    raw = record.to_bytes()
    assert Record.from_bytes(raw, "x") == record
    assert json.loads(raw)["format"] == 1
    assert record.layers[0].offset == 4072 and record.layers[1].offset == 0


def test_every_flipped_bit_of_a_record_is_noticed():
    raw = a_record().to_bytes()
    for at in range(len(raw)):
        for bit in range(8):
            bad = bytearray(raw)
            bad[at] ^= 1 << bit
            with pytest.raises(Corrupt):
                Record.from_bytes(bytes(bad), "commit.json")


@pytest.mark.parametrize("cut", [0, 1, 50, 76, 77, -1])
def test_a_cut_record_is_corrupt(cut):
    with pytest.raises(Corrupt, match=r"^commit\.json"):
        Record.from_bytes(a_record().to_bytes()[:cut], "commit.json")


def signed(body):
    """A record file of this body with the right digest."""
    import hashlib

    text = (body if isinstance(body, str) else json.dumps(body))[1:].encode()
    return b'{"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text


def changed(path, value):
    """The parsed body of a good record with the member at ``path`` replaced."""
    body = json.loads(a_record().to_bytes())
    del body["sha256"]
    *way, last = path
    inner = body
    for step in way:
        inner = inner[step]
    inner[last] = value
    return body


FILE, TENSOR, LAYER = ("files", 0), ("layers", 0, "tensors", 0), ("layers", 0)


@pytest.mark.parametrize("path, value", [
    (["format"], 2), (["format"], True), (["generation"], -1), (["generation"], 1.0), (["generation"], True),
    (["extra"], 1), (["parent"], 12),
    (["files"], {}), (["files"], None), (["time"], "now"), (["time"], 10**400), (["rank"], 1), (["name"], 5),
    (["ties"], {"a": 1}), (["layers"], [1]),
    ([*FILE, "name"], "../x"), ([*FILE, "name"], "/etc/passwd"), ([*FILE, "name"], "commit.json"),
    ([*FILE, "name"], ".."),
    ([*FILE, "chunk_bytes"], 0), ([*FILE, "chunk_bytes"], 100), ([*FILE, "crc32c"], []),
    ([*FILE, "crc32c"], [1 << 32]),
    ([*FILE, "crc32c"], ["7"]), ([*FILE, "nbytes"], 1 << 63), ([*TENSOR, "begin"], 4073), ([*TENSOR, "nbytes"], 25),
    ([*TENSOR, "shape"], [2, -3]), ([*TENSOR, "dtype"], "F31"), ([*TENSOR, "dtype"], []),
    ([*TENSOR, "file"], "other"), ([*LAYER, "kind"], "x"),
    ([*LAYER, "tensors"], "abc"),
])  # fmt: skip
def test_a_signed_but_malformed_record_is_corrupt(path, value):
    with pytest.raises(Corrupt):
        Record.from_bytes(signed(changed(path, value)), "commit.json")


@pytest.mark.parametrize(
    "body",
    [
        '{"a":' + "[" * 1_000_000,
        '{"format":1}',
        "{}",
        "{1}",
        '{"format":1,"format":1}',
        '{"state":' + "9" * 10_000 + "}",
        '{"a":NaN}',
    ],
    ids=lambda body: body[:20],
)
def test_signed_garbage_is_corrupt_and_no_recursion_error(body):
    with pytest.raises(Corrupt):
        Record.from_bytes(signed(body), "commit.json")


def test_a_state_at_the_depth_limit_fits_a_record():
    value = 1
    for _ in range(64):
        value = {1: value}
    assert through_file(value) == value


@pytest.mark.parametrize(
    "text",
    [b'"' + b"a" * 10_000_000 + b'"', b'"' + b"\\\\" * 5_000_000 + b'"', b'["' + b'\\"[' * 3_000_000 + b'"]'],
    ids=["plain", "escapes", "quotes"],
)
def test_a_long_string_costs_no_more_than_a_few_times_its_size(text):
    tracemalloc.start()
    try:
        assert structure_of(text).depth == text.startswith(b"[")
        assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    finally:
        tracemalloc.stop()
