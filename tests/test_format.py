"""docs/format.md is enough: a reader written from it alone, without a line of fxckpt, reads a store."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
from storing import fast_directory, start


def crc32c(data: bytes) -> int:
    """CRC-32C, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def read_checkpoint(path: Path) -> dict:
    """The record of a checkpoint, after every step of "Verifying"."""
    raw = (path / "commit.json").read_bytes()
    assert raw[:77] == b'{"sha256":"' + hashlib.sha256(raw[77:]).hexdigest().encode() + b'",'
    assert raw[77:86] == b'"format":' and raw.endswith(b"}\n")
    record = json.loads(raw)
    for file in record["files"]:
        data = (path / file["name"]).read_bytes()
        assert len(data) == file["nbytes"] and len(data) % 4096 == 0
        chunks = [data[at : at + file["chunk_bytes"]] for at in range(0, len(data), file["chunk_bytes"])]
        assert [crc32c(chunk) for chunk in chunks] == file["crc32c"]
        if file["name"] != "state.safetensors":
            check_header(data, file["name"], record)
    return record


def check_header(data: bytes, name: str, record: dict) -> None:
    """The tensors of a file are those of the record."""
    (n,) = struct.unpack("<Q", data[:8])
    header = {key: (entry["dtype"], entry["shape"], entry["data_offsets"][0] + 8 + n)
              for key, entry in json.loads(data[8 : 8 + n]).items() if key != "__metadata__"}
    tensors = [tensor for layer in record["layers"] for tensor in layer["tensors"] if tensor["file"] == name]
    assert header == {tensor["key"]: (tensor["dtype"], tensor["shape"], tensor["begin"]) for tensor in tensors}


def read_newest(store: Path) -> dict:
    """The newest checkpoint of a store."""
    named = store / "named"
    entries = [*store.iterdir(), *(named.iterdir() if named.is_dir() else ())]
    found = [path for path in entries if path.parent.name == "named" or re.match(r"step-\d{9,}(-g\d+)?$", path.name)]
    whole = [read_checkpoint(path) for path in found if not path.name.endswith((".partial", ".bad", ".tmp"))]
    return max(whole, key=lambda record: record["generation"])


@pytest.fixture
def root(tmp_path):
    with fast_directory(tmp_path) as directory:
        yield directory / "checkpoints"


def test_a_reader_written_from_the_document_reads_the_newest_checkpoint(root):
    trainer = start(root, keep=2, items=700)
    for step in (1, 2, 3):
        trainer.save(step)
    trainer.save(3, name="best")
    slot, checkpoint = trainer.begin(4)
    record = read_newest(root)
    assert (record["step"], record["generation"], record["parent"], record["name"]) == (3, 4, 3, "best")
    checkpoint.cancel()
    assert checkpoint.settled(10)
    trainer.store.abandon(slot, bad=False)
    trainer.close()


def test_the_document_says_where_the_digest_lies():
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
    example, ruler = re.search(r'(\{"sha256":"<64 lower-case hex digits>.*)\n(\^0.*)', text).groups()
    assert example.replace("<64 lower-case hex digits>", "0" * 64)[77:].startswith('"format":1')
    assert [int(place) for place in re.findall(r"\^(\d+)", ruler)] == [0, 11, 75, 77]
