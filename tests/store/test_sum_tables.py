"""Checksums as tables: one rule for how fine they are, the same record as with lists, and old ones that are coarser."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storing import a_record
from torch import nn

import fxckpt
from fxckpt.engine import crc32c
from fxckpt.engine.sums import continue_sums, from_text, sums_of_blocks, table, to_text
from fxckpt.errors import Corrupt
from fxckpt.store import sum_tables
from fxckpt.store.layout import SUM_BYTES, SUMS, sum_bytes
from fxckpt.store.reader import Reader
from fxckpt.store.record import FileRecord, Record

NUMBERS = st.lists(st.one_of(st.sampled_from([0, 9, 10, (1 << 32) - 1]), st.integers(0, (1 << 32) - 1)))


def of_files(*sums: list[int], name: str = "f", state: object = None) -> Record:
    """A record whose files have these checksums."""
    files = tuple(FileRecord(f"{name}{i}", 4096 * len(each), 4096, table(each)) for i, each in enumerate(sums))
    return dataclasses.replace(a_record(1, files, ()), state={"step": 1} if state is None else state)


def sealed(body: dict) -> bytes:
    """The record with this body, as Python's JSON writes it."""
    text = json.dumps(body, separators=(",", ":"))[1:].encode() + b"\n"
    return b'{"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text


def body_of(raw: bytes) -> dict:
    """Its members, by Python's JSON alone."""
    return {name: value for name, value in json.loads(raw).items() if name != "sha256"}


@pytest.mark.parametrize("held", [0, 1, 5 << 20, 2 << 30, (2 << 30) + 1, 9 << 30, 32 << 30, 1 << 45])
def test_checksums_are_fine_and_few(held):
    found = sum_bytes(held)
    assert (2 << 20) % found == 0, "chunks are whole MiB"
    assert SUM_BYTES[0] <= found <= SUM_BYTES[1]
    assert held <= found * SUMS or found == SUM_BYTES[1]
    assert found == SUM_BYTES[0] or held > found // 2 * SUMS, "no coarser than that"


def test_each_4_kib_of_a_file_have_a_checksum_whatever_the_size_of_a_chunk(tmp_path):
    model = nn.Linear(60, 80)
    opt = torch.optim.Adam(model.parameters())
    fxckpt.compile_step(opt, tmp_path, model=model, every=1, chunk_mb=3, update="native")
    model(torch.ones(2, 60)).sum().backward()
    opt.step()
    opt.ckpt.flush()
    opt.ckpt.shutdown()
    reader = Reader(fxckpt.latest(tmp_path).path)
    reader.verify()
    assert {file.chunk_bytes for file in reader.record.files} == {4 << 10}


@settings(deadline=None)
@given(NUMBERS)
def test_the_text_of_a_table_is_that_of_a_list(sums):
    text = bytes(to_text(table(sums)))
    assert text == json.dumps(sums, separators=(",", ":"))[1:-1].encode()
    assert from_text(text) == table(sums)


@pytest.mark.parametrize("text", [b",", b"1,", b",1", b"01", b"00", b"-1", b"1.0", b"1 ", b"4294967296", b"99999999999", b"1,,2",
                                  b"184467440737095516170", b"[1]", b"1e3", b"null"])  # fmt: skip
def test_what_is_no_text_of_a_table_is_not_taken_for_one(text):
    assert from_text(text) is None


@settings(deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 9)))
def test_checksums_of_blocks_go_on_from_any_offset(block, sizes):
    data = random.Random(0).randbytes(sum(sizes))
    sums, at = sums_of_blocks(len(data), block), 0
    for size in sizes:
        continue_sums(sums, block, at, data[at : at + size])
        at += size
    assert list(sums) == [crc32c(data[at : at + block]) for at in range(0, len(data), block)]


@settings(deadline=None)
@given(st.lists(NUMBERS, max_size=4), st.booleans(), st.sampled_from(["f", 'quote"', "é", '","nbytes":1,"crc32c":[']))
def test_a_record_has_the_text_that_json_gives_it_and_reads_back(sums, many, name):
    record = of_files(*([*each, *range(1000)] if many else each for each in sums), name=name)
    raw = record.to_bytes()
    assert raw == sealed(body_of(raw))
    assert Record.from_bytes(raw, "record") == record


def test_checksums_are_taken_out_of_a_record_as_it_is_written():
    sums = [list(range(1000)), [], [1 << 31] * 1000]
    raw = of_files(*sums).to_bytes()
    text, tables = sum_tables.taken_out(raw)
    assert tables == list(map(table, sums)) and len(text) < len(raw) // 2
    assert sum_tables.put_in(text, tables) == raw
    other = of_files(*sums, state={"long": "x" * len(raw)}).to_bytes()
    assert sum_tables.taken_out(other) == (other, []), "that would be a large copy"


def test_lists_of_the_user_that_look_like_checksums_stay_what_they_are():
    state = {"x": 1, "files": [{"name": "f", "nbytes": 1, "chunk_bytes": 1, "crc32c": [5, 6]}], "layers": [], "crc32c": [7]}
    record = of_files([1, 2], list(range(1000)), state=state)
    assert Record.from_bytes(record.to_bytes(), "record") == record
    body = body_of(record.to_bytes())
    for first in body:  # a record may have its members in any order
        other = {"format": body["format"], first: body[first], **body}
        assert Record.from_bytes(sealed(other), "record") == record, first


@pytest.mark.parametrize("sums", [[1, True], [1, -1], [1, 1 << 32], [1], [1, 2, 3], [1, 2.0], [1, "2"], [1, [2]], None])
def test_a_table_that_is_none_or_of_another_length_is_refused(sums):
    body = body_of(of_files([1, 2]).to_bytes())
    body["files"][0]["crc32c"] = sums
    with pytest.raises(Corrupt, match=r"crc32c|checksum"):
        Record.from_bytes(sealed(body), "record")


def test_an_old_store_with_a_checksum_for_each_chunk_loads(tmp_path):
    model = nn.Linear(600, 800)
    opt = torch.optim.SGD(model.parameters())
    fxckpt.compile_step(opt, tmp_path, model=model, every=1, update="native")
    model(torch.ones(2, 600)).sum().backward()
    opt.step()
    opt.ckpt.flush()
    opt.ckpt.shutdown()
    path = fxckpt.latest(tmp_path).path / "commit.json"
    body = body_of(path.read_bytes())
    for file in body["files"]:
        data, size = (path.parent / file["name"]).read_bytes(), 1 << 20
        file.update(chunk_bytes=size, crc32c=[crc32c(data[at : at + size]) for at in range(0, len(data), size)])
    path.write_bytes(sealed(body))
    fresh = nn.Linear(600, 800)
    fxckpt.load(tmp_path, model=fresh)
    assert torch.equal(fresh.weight, model.weight)
