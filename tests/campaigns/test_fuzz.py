"""Whatever the small files of a store hold, reading them is an answer or ``Corrupt``: no crash, no hang, no memory that a
file's size does not explain, and never a load of something that was not saved.

Files that were good are mutated: bytes and pieces of them, and, with digests and checksums made right again as only a program
could, values in their JSON. ``FXCKPT_FUZZ_SECONDS`` (``make fuzz``: an hour) is shared by the campaigns; a few seconds each
otherwise. A failure prints the smallest input that hypothesis finds.
"""

from __future__ import annotations

import copy
import faulthandler
import hashlib
import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from digests import differences, snapshot, stored
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from torch import nn

import fxckpt
from fxckpt.engine import crc32c
from fxckpt.errors import Corrupt, FxckptError, NoCheckpoint, NotAStore
from fxckpt.store.identity import read_store_id
from fxckpt.store.layout import parse_header
from fxckpt.store.reader import Reader, candidates, checkpoints, read_record
from fxckpt.store.record import Record
from fxckpt.store.typed_json import decode_state

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

CAMPAIGNS = 6
SECONDS = float(os.environ.get("FXCKPT_FUZZ_SECONDS", "6")) / CAMPAIGNS
EXAMPLES = 50  # at a time; then the clock is looked at
MEMORY = 512 << 20  # bytes that reading files of some ten kilobytes may take beyond what the process has; most is virtual
HANG = 120.0  # seconds after which one input counts as a hang, on a busy machine too


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store of steps 1 and 2, with extra state of many kinds, and what was trained."""
    directory = tmp_path_factory.mktemp("fuzz") / "d"
    model, opt, extra = build(0)
    fxckpt.compile_step(opt, directory, model=model, every=1, keep=2, update="native", extra={"e": extra})
    held = {}
    for step in (1, 2):
        model(torch.randn(4, 3)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        opt.ckpt.note(loss=1.5, bad=float("nan"))
        held[step] = snapshot(model, opt)
    opt.ckpt.flush()
    opt.ckpt.shutdown()
    return directory, held


class Extra:
    """State of many kinds."""

    def __init__(self) -> None:
        self.state: Any = {"t": torch.ones(2, 3), 1: (2, None), "s": {3}, "b": b"x", "r": range(3), "n": float("nan")}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def build(seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model, torch.optim.Adam(model.parameters(), lr=0.1), Extra()


@contextmanager
def bounded():
    """A bound on memory, and an end to what hangs. Lifted before pytest reports, which takes memory of its own; so does what
    is logged, which pytest keeps."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def campaign(strategy: st.SearchStrategy, test: Callable[[Any], None]) -> None:
    """Try inputs until the time is over; each input has ``HANG`` seconds before the process ends with a traceback."""

    def one(drawn: Any) -> None:
        faulthandler.dump_traceback_later(HANG, exit=True)
        test(drawn)
        faulthandler.cancel_dump_traceback_later()

    end, tried = time.monotonic() + SECONDS, 0
    while tried == 0 or time.monotonic() < end:
        options = settings(max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                           phases=(Phase.generate, Phase.shrink))  # fmt: skip
        with bounded():
            options(given(strategy)(one))()
        tried += EXAMPLES
    print(f"{tried} inputs in {SECONDS:.0f} s")


# ---- mutations ----

TOKENS = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\0", b"null", b"-1", b"1e999", b"NaN", b"9" * 5000, b"[" * 3000,
          b'{"a":' * 3000, b'"\\ud800"', b"\xff", b"18446744073709551616", b"0.0", b"{}", b"true", b" " * 5000]  # fmt: skip

PLACE = st.integers(0, 1 << 16)
BYTES = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.integers(1, 300)),
    st.tuples(st.just("end"), PLACE, st.just(0)),
    st.tuples(st.just("put"), PLACE, st.sampled_from(TOKENS) | st.binary(max_size=40)),
    st.tuples(st.just("write"), PLACE, st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("again"), PLACE, st.integers(1, 300)),
)


def mutated(raw: bytes, steps: list) -> bytes:
    """Some bytes changed, cut out, inserted, overwritten or repeated."""
    for kind, place, what in steps:
        at = place % (len(raw) + 1)
        if kind == "flip" and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ 1 << what]) + raw[at + 1 :]
        elif kind == "cut":
            raw = raw[:at] + raw[at + what :]
        elif kind == "end":
            raw = raw[:at]
        elif kind == "put":
            raw = raw[:at] + what + raw[at:]
        elif kind == "write":
            raw = raw[:at] + what + raw[at + len(what) :]
        elif kind == "again":
            raw = raw[:at] + raw[at : at + what] + raw[at:]
    return raw


ENDLESS = {"!": "range", "v": ["0x0", "0x7fffffffffff", "0x1"]}

JUNK = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, 0.0, -0.5, 1e308, "", "!", "a", "..",
                     "/etc/passwd", "model.safetensors", "\ud800", "\0", "x" * 300, "U8", "F32", "C64", "<f4", "O", "torch",
                     "U", "S", "V0", ENDLESS])
    | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["!", "v", "key", "dtype", "shape", "of", "max",
                  "a"]) | st.text(max_size=3), inner, max_size=4)
    | st.fixed_dictionaries({"!": st.sampled_from(["int", "float", "str", "complex", "bytes", "bytearray", "range", "tuple",
                  "deque", "set", "frozenset", "dict", "OrderedDict", "Counter", "defaultdict", "numpy", "numpy.text", "array",
                  "torch", "torch.dtype", "torch.device", "torch.Size"]), "v": inner},
                  optional={"max": inner, "of": inner, "dtype": inner, "shape": inner, "key": inner}),
    max_leaves=8)  # fmt: skip

CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from(["set", "drop", "twice"]), JUNK), min_size=1, max_size=3)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, item in inner for each in places(item, (*path, key)))]


def changed(value: Any, changes: list) -> Any:
    """Some values replaced, left out, or given twice."""
    value = copy.deepcopy(value)
    for place, kind, junk in changes:
        paths = places(value)
        path = paths[place % len(paths)]
        if not path:
            if kind == "set":
                value = junk
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if kind == "set":
            parent[path[-1]] = junk
        elif kind == "drop":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
    return value


def sealed(body: Any) -> bytes:
    """A record with its digest made right."""
    text = json.dumps({key: item for key, item in body.items() if key != "sha256"} if isinstance(body, dict) else body,
                      separators=(",", ":")).encode()[1:] + b"\n"  # fmt: skip
    return b'{"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text


# ---- campaigns ----


def test_any_store_json_is_an_id_none_or_a_clear_refusal(trained, tmp_path):
    directory = tmp_path / "d"
    shutil.copytree(trained[0], directory)
    good = (directory / "store.json").read_bytes()

    def one(steps: list) -> None:
        (directory / "store.json").write_bytes(mutated(good, steps))
        try:
            found = read_store_id(str(directory))
        except NotAStore as error:
            assert "newer fxckpt" in str(error)
            return
        assert found is None or isinstance(found, str)
        assert [each.step for each in checkpoints(directory)] == [1, 2], "the checkpoints are there whatever it says"

    campaign(st.lists(BYTES, min_size=1, max_size=4), one)


def test_any_mutated_record_is_corrupt_unless_its_bytes_are_the_same(trained, tmp_path):
    good = (trained[0] / "step-000000002" / "commit.json").read_bytes()
    directory = tmp_path / "step-000000002"
    directory.mkdir()

    def one(steps: list) -> None:
        raw = mutated(good, steps)
        (directory / "commit.json").write_bytes(raw)
        try:
            read_record(str(directory))
        except Corrupt as error:
            assert raw != good and len(str(error)) < 2000
        else:
            assert raw == good

    campaign(st.lists(BYTES, min_size=1, max_size=4), one)


def test_any_record_with_a_right_digest_parses_to_sound_values_or_is_corrupt(trained):
    path = trained[0] / "step-000000002"
    body, tensors = json.loads((path / "commit.json").read_bytes()), Reader(path).state_tensors()

    def one(changes: list) -> None:
        try:
            record = Record.from_bytes(sealed(changed(body, changes)), "commit.json")
        except Corrupt as error:
            assert len(str(error)) < 2000
            return
        sizes = {file.name: file.nbytes for file in record.files}
        for layer in record.layers:
            for tensor in layer.tensors:
                assert 0 <= tensor.begin <= tensor.begin + tensor.nbytes <= sizes[tensor.file]
        assert Record.from_bytes(record.to_bytes(), "commit.json") == record or "nan" in str(record.metrics)
        for value in (record.optimizers, record.state):
            try:
                decode_state(value, tensors)
            except Corrupt:
                continue

    campaign(CHANGES, one)


def loading(trained, tmp_path) -> tuple[Any, Callable[[Any], None]]:
    """A record's body, and what loads the checkpoint with another one in its place: the tensors are those that were saved, or
    the load says no."""
    directory = tmp_path / "d"
    shutil.copytree(trained[0], directory)
    shutil.rmtree(directory / "step-000000001")
    file = directory / "step-000000002" / "commit.json"
    live, before = build(1), stored(directory / "step-000000002")
    random_before = torch.get_rng_state()

    def one(body: Any) -> None:
        file.write_bytes(sealed(body))
        model, opt, extra = live
        try:
            fxckpt.load(directory, model=model, optimizer=opt, extra={"e": extra})
        except FxckptError as error:
            assert len(str(error)) < 20_000
            return
        finally:
            torch.set_rng_state(random_before)
        now = {name: tensor for name, tensor in snapshot(model).items() if name in before}
        assert differences(now, {name: before[name] for name in now}) == []

    return json.loads(file.read_bytes()), one


def test_a_load_of_any_record_with_a_right_digest_is_right_or_refused(trained, tmp_path):
    """What a record says is believed once its digest is right."""
    body, one = loading(trained, tmp_path)
    campaign(CHANGES, lambda changes: one(changed(body, changes)))


def test_a_load_is_right_or_refused_with_an_endless_range_in_place_of_each_value(trained, tmp_path):
    """Chance rarely puts the worst into the one place where nobody expects it."""
    body, one = loading(trained, tmp_path)
    paths = places(body)
    assert len(paths) > 300
    with bounded():
        for place in range(len(paths)):
            one(changed(body, [(place, "set", ENDLESS)]))


def test_any_header_is_read_as_the_safetensors_package_reads_it_or_is_corrupt(trained):
    """Ours may refuse more, never less; and what both take they understand alike."""
    good = (trained[0] / "step-000000002" / "optimizer.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def one(drawn: tuple) -> None:
        steps, changes = drawn
        raw = good
        if changes:
            text = json.dumps(changed(header, changes)).encode()
            raw = len(text).to_bytes(8, "little") + text + good[8 + length :]
        raw = mutated(raw[: 8 + 600], steps) + raw[8 + 600 :]
        try:
            found = parse_header(raw, len(raw), "x")
        except Corrupt as error:
            assert len(str(error)) < 2000
            return
        try:
            theirs = dict(deserialize(raw))
        except SafetensorError as error:
            assert "dtype" in str(error) or "variant" in str(error), f"a type that the package does not know: {error}"
            return
        assert found.keys() == theirs.keys()
        for key, placed in found.items():
            assert raw[placed.begin : placed.begin + placed.nbytes] == theirs[key]["data"]
            assert (placed.spec.dtype, list(placed.spec.shape)) == (theirs[key]["dtype"], theirs[key]["shape"])

    campaign(st.tuples(st.lists(BYTES, max_size=3), st.lists(CHANGES.map(lambda each: each[0]), max_size=2)), one)


def test_a_checkpoint_with_any_header_and_right_checksums_verifies_only_if_it_is_what_was_saved(trained, tmp_path):
    """The header is changed and the record's checksums with it, as a faulty writer would: then the record and it disagree."""
    directory = tmp_path / "d"
    shutil.copytree(trained[0], directory)
    path = directory / "step-000000002"
    good, body = (path / "model.safetensors").read_bytes(), json.loads((path / "commit.json").read_bytes())
    length, saved = int.from_bytes(good[:8], "little"), stored(path)
    header = json.loads(good[8 : 8 + length])
    file = next(each for each in body["files"] if each["name"] == "model.safetensors")

    def one(drawn: tuple) -> None:
        steps, changes = drawn
        text = json.dumps(changed(header, changes)).encode()
        raw = mutated(len(text).to_bytes(8, "little") + text, steps) + good[8 + length :]
        (path / "model.safetensors").write_bytes(raw)
        file.update(nbytes=len(raw), crc32c=[crc32c(raw)])
        (path / "commit.json").write_bytes(sealed(body))
        try:
            Reader(path).verify()
        except (Corrupt, NoCheckpoint) as error:
            assert len(str(error)) < 20_000
        else:
            assert differences(stored(path), saved) == []
        assert [each.record.step for each in candidates(directory) if not isinstance(each, Corrupt)][-1] == 1

    campaign(st.tuples(st.lists(BYTES, max_size=2), st.lists(CHANGES.map(lambda each: each[0]), max_size=2)), one)


def test_what_is_tried_is_hard_enough(trained: tuple[Path, dict]):
    """The mutations reach the inside: with a right digest, records of both kinds come up, sound and unsound."""
    body = json.loads((trained[0] / "step-000000002" / "commit.json").read_bytes())
    outcomes = {"sound": 0, "corrupt": 0}

    @settings(max_examples=150, database=None, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(CHANGES)
    def one(changes: list) -> None:
        try:
            Record.from_bytes(sealed(changed(body, changes)), "commit.json")
            outcomes["sound"] += 1
        except Corrupt:
            outcomes["corrupt"] += 1

    one()
    assert min(outcomes.values()) > 15, outcomes
