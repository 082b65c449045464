"""Whatever the small files of a store hold, reading them is an answer or ``Corrupt``: no crash, no hang, no memory that a
file's size does not explain, and never a load of something that was not saved.

Files that were good are mutated: bytes and pieces of them, and, with digests and checksums made right again as only a program
could, values in their JSON; and they are blown up. ``FXCKPT_FUZZ_SECONDS`` (``make fuzz``: an hour) is shared by the campaigns;
a few seconds each otherwise. A failure prints the smallest input that hypothesis finds. What an input may cost: ``fuzzing.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
import torch
from boxed import grid, write_boxed
from digests import differences, snapshot, stored
from fuzzing import BYTES, CHANGES, ENDLESS, bounded, campaign, changed, mutated, places, sealed, try_one
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from torch import nn

import fxckpt
from fxckpt.cli import main
from fxckpt.engine import crc32c
from fxckpt.errors import Corrupt, FxckptError, NoCheckpoint, NotAStore
from fxckpt.importing import formats
from fxckpt.store import names
from fxckpt.store.identity import read_store_id
from fxckpt.store.layout import parse_header
from fxckpt.store.reader import Reader, candidates, checkpoints, read_record
from fxckpt.store.record import Record, TensorRecord
from fxckpt.store.typed_json import decode_state

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


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


def test_any_record_of_a_part_with_right_digests_makes_whole_tensors_of_boxes_or_is_corrupt(tmp_path):
    shape = (6, 10)
    whole = np.arange(60, dtype=np.float32).reshape(shape)
    tensors = {(kind, key): whole for kind in (names.MODEL, names.OPTIMIZER) for key in ("w", "v")}
    path = write_boxed(tmp_path / "d", tensors, {place: grid(shape, (2, 2)) for place in list(tensors)[:3]}, 4)
    part, commit = path / "part-00004-of-00004.json", path / names.COMMIT
    body, first = json.loads(part.read_bytes()), json.loads(commit.read_bytes())

    def one(changes: list) -> None:
        raw = sealed(changed(body, changes))
        part.write_bytes(raw)
        first["parts"][2]["sha256"] = hashlib.sha256(raw).hexdigest()
        commit.write_bytes(sealed(first))
        try:
            reader = Reader(path)
            for tensor in reader.record.tensors():
                check_whole(tensor)
                found = np.zeros(tensor.nbytes, np.uint8)
                reader.read_into({(names.kind_of(tensor.file), tensor.key): (found.ctypes.data, None, None)}, boxes={})
        except Corrupt as error:
            assert len(str(error)) < 2000

    campaign(CHANGES, one)


def check_whole(tensor: TensorRecord) -> None:
    """Its pieces are all of it, each element once."""
    seen = np.zeros(tensor.shape if tensor.pieces else (0,), np.uint8)
    for piece in tensor.pieces:
        box = seen[tuple(slice(at, at + n) for at, n in zip(piece.offset, piece.shape))]
        assert box.shape == piece.shape
        box += 1
    assert (seen == 1).all()


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
            try_one(one, changed(body, [(place, "set", ENDLESS)]))


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
        file.update(nbytes=len(raw), chunk_bytes=1 << 20, crc32c=[crc32c(raw)])
        (path / "commit.json").write_bytes(sealed(body))
        try:
            Reader(path).verify()
        except (Corrupt, NoCheckpoint) as error:
            assert len(str(error)) < 20_000
        else:
            assert differences(stored(path), saved) == []
        assert [each.record.step for each in candidates(directory) if not isinstance(each, Corrupt)][-1] == 1

    campaign(st.tuples(st.lists(BYTES, max_size=2), st.lists(CHANGES.map(lambda each: each[0]), max_size=2)), one)


COMMANDS = [["ls"], ["inspect", "{}", "2"], ["inspect", "{}", "2", "--tensors"], ["verify"], ["watch", "{}", "--once"],
            ["prune", "{}", "--dry-run"], ["diff", "{}", "1", "2"], ["plot", "{}", "-o", "{}.svg"]]  # fmt: skip


def test_any_command_on_any_record_with_a_right_digest_ends_with_a_status_of_ours(trained, tmp_path):
    """And prints no control codes."""
    directory = tmp_path / "d"
    shutil.copytree(trained[0], directory)
    file = directory / "step-000000002" / "commit.json"
    body = json.loads(file.read_bytes())

    def one(drawn: tuple) -> None:
        changes, command, as_json = drawn
        file.write_bytes(sealed(changed(body, changes)))
        arguments = command if len(command) > 1 else [*command, "{}"]
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            status = main([each.replace("{}", str(directory)) for each in arguments] + ["--json"] * as_json)
        assert status in range(6), said.getvalue()
        assert all(each.isprintable() or each == "\n" for each in said.getvalue())

    campaign(st.tuples(CHANGES, st.sampled_from(COMMANDS), st.booleans()), one, 25)


FILLINGS = ["[],", '{"a":0},', '"ab",', "1,", "1.5,", '"\\u00e9",', "[", '{"a":[', '"' + "a" * 100_000 + '",',
            '{"!":"tuple","v":[]},', '{"!":"range","v":["0x0","0x1","0x1"]},']  # fmt: skip

SIZES = st.integers(0, 8 << 20) | st.integers(116 << 20, 150 << 20)
"""Bytes: what may be read, and what has, of each filling, more values or bytes than any may have (but of long texts, which may be
read). Records between may cost more than MEMORY: that is what their limits are for."""


def test_a_file_that_is_blown_up_is_refused_or_read_in_little_memory(trained, tmp_path):
    """The record anywhere, a header, ``store.json``."""
    directory = tmp_path / "d"
    shutil.copytree(trained[0], directory)
    path = directory / "step-000000002"
    record = (path / "commit.json").read_bytes()
    members = ["state", "optimizers", "files", "layers", "metrics", "ties", "step", "store_id"]

    def one(drawn: tuple) -> None:
        where, filling, nbytes = drawn
        if where in members:
            before, _, behind = record[77:].partition(f'"{where}":'.encode())
            blow_up(path / "commit.json", before + f'"{where}":['.encode(), filling, nbytes, b'0],"x":' + behind)
        elif where == "header":
            blow_up(directory / "x.safetensors", b'{"a":[', filling, nbytes, b"0]}", header=True)
        else:
            blow_up(directory / "store.json", b'{"format":1,"x":[', filling, nbytes, b"0]}", plain=True)
        for read in (
            lambda: checkpoints(directory),
            lambda: Reader(path).verify(),
            lambda: formats.read(f"{directory}/x.safetensors"),
        ):
            with suppress(FxckptError):
                read()
        (path / "commit.json").write_bytes(record)

    where = st.sampled_from([*members, "header", "store.json"])
    campaign(st.tuples(where, st.sampled_from(FILLINGS), SIZES), one, 4)


def blow_up(
    file: Path, before: bytes, filling: str, nbytes: int, behind: bytes, *, header: bool = False, plain: bool = False
) -> None:
    """Write a record, a file of safetensors or a plain one with so much of this in it; in little memory itself."""
    count = max((1 << 16) // len(filling), 1)
    pieces = [before, *[filling.encode() * count] * (nbytes // (count * len(filling))), behind]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    with file.open("wb") as out:
        if header:
            out.write(sum(map(len, pieces)).to_bytes(8, "little"))
        elif not plain:
            out.write(b'{"sha256":"' + digest.hexdigest().encode() + b'",')
        out.writelines(pieces)


def test_a_file_that_is_huge_and_empty_is_refused_in_little_memory(trained, tmp_path):
    """Sparse files, and records that say so: the sizes of files, of their chunks and of their tables of checksums."""
    directory = tmp_path / "d"
    shutil.copytree(trained[0], directory)
    path = directory / "step-000000002"
    good = (path / "commit.json").read_bytes()
    files = {file["name"]: (path / file["name"]).read_bytes() for file in json.loads(good)["files"]}

    def one(drawn: tuple) -> None:
        name, nbytes, chunk, crc, told = drawn
        nbytes, body = nbytes * 4096, json.loads(good)
        file = next(each for each in body["files"] if each["name"] == name)
        if told and nbytes // (chunk * 4096) < 1 << 20:
            file.update(nbytes=nbytes, chunk_bytes=chunk * 4096, crc32c=[crc] * -(-nbytes // (chunk * 4096)))
        (path / "commit.json").write_bytes(sealed(body))
        os.truncate(path / name, max(nbytes, len(files[name]) + 1))
        # Extra state is read into memory, as large as it says that it is and its file is.
        explained = name == "state.safetensors" and 64 << 20 < nbytes < 1 << 30
        for read in (lambda: Reader(path).verify(), lambda: explained or Reader(path).state_tensors()):
            with suppress(FxckptError):
                read()
        (path / name).write_bytes(files[name])
        for small in ("commit.json", "../store.json"):
            kept = (path / small).read_bytes()
            os.truncate(path / small, nbytes)
            with suppress(FxckptError):
                checkpoints(directory)
            (path / small).write_bytes(kept)

    chunks = st.integers(1, 1 << 18) | st.just(1 << 18)  # blocks: a gibibyte at most
    sizes, sums = st.integers(0, 1 << 28), st.integers(1, 2**32 - 1)
    campaign(st.tuples(st.sampled_from(sorted(files)), sizes, chunks, sums, st.booleans()), one, 10)


def test_an_input_that_costs_too_much_fails_a_campaign(monkeypatch):
    """Whether it takes private memory or maps what is shared."""
    monkeypatch.setattr(fuzzing, "MEMORY", 48 << 20)
    campaign(st.just(1 << 20), lambda nbytes: np.ones(nbytes, np.uint8), 1)
    with pytest.raises(MemoryError):  # of a size that no test before has left free in this process
        campaign(st.just(1 << 30), lambda nbytes: np.ones(nbytes, np.uint8), 1)

    def shared(nbytes: int) -> None:
        with mmap.mmap(-1, nbytes) as memory:
            for _ in range(nbytes >> 20):
                memory.write(bytes(1 << 20))

    with pytest.raises(AssertionError, match="it cost"):
        campaign(st.just(64 << 20), shared, 1)


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
