"""docs/format.md is enough: ``plain_reader.py``, written from it alone, loads a store in a process without fxckpt."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import plain_reader
import pytest
import torch
from repository import ROOT, SUPPORT
from small_models import GPT, Loader
from small_training import Training
from storing import start

DOCUMENT = (ROOT / "docs" / "format.md").read_text()


def read_elsewhere(store: Path) -> dict:
    """What the reader finds, in an isolated process that has no way to fxckpt."""
    command = [sys.executable, "-I", str(SUPPORT / "plain_reader.py"), str(store)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=store.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Plain:
    """Extra state of all kinds of plain values."""

    def state_dict(self) -> dict:
        return {"big": 1 << 70, "nan": float("nan"), "pair": (1, "ä"), "none": None, "raw": b"\x00\xff", "keys": {3: [True]}}

    def load_state_dict(self, state: dict) -> None:
        raise AssertionError("not loaded here")


@pytest.mark.usefixtures("one_thread")
def test_a_reader_written_from_the_document_loads_the_tensors_and_state_of_a_real_run(root):
    training = Training(root, make=GPT, loader=Loader.of_tokens(), keep=2, extra={"plain": Plain()}).train(3).end()
    found = read_elsewhere(root)
    assert found["ours"] == [] and set(found["members"]) >= plain_reader.MEMBERS
    assert (found["step"], found["path"]) == (3, str(root / "step-000000003"))
    assert found["ties"] == {"head.weight": "tokens.weight"}
    assert found["lr"] == training.opt.param_groups[0]["lr"] and found["extra"] == ["plain"]
    stored = {
        name: each[2] for file in ("model.safetensors", "optimizer.safetensors") for name, each in found["tensors"][file].items()
    }
    live = {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in training.reference[3].items()
    }
    assert stored == live
    assert found["tensors"]["model.safetensors"]["positions"][:2] == ["F32", [6, 16]]
    late = plain_reader.newest(str(root))
    decoded = plain_reader.decode(late[1]["state"]["late"], late[2]["state.safetensors"])["plain"]
    assert (decoded["big"], decoded["pair"], decoded["raw"], decoded["keys"]) == (1 << 70, (1, "ä"), b"\x00\xff", {3: [True]})
    assert decoded["nan"] != decoded["nan"] and decoded["none"] is None
    generator = plain_reader.decode(late[1]["state"]["early"], late[2]["state.safetensors"])["random"]
    assert any(isinstance(each, tuple) and len(each[3]) == torch.get_rng_state().numel() for each in generator.values())


def test_the_plain_reader_finds_the_newest_and_passes_over_what_is_damaged_or_unfinished(root, capsys):
    trainer = start(root, keep=2, items=700)
    for step in (1, 2, 3):
        trainer.save(step)
    trainer.save(3, name="best")
    slot, checkpoint = trainer.begin(4)
    _, record, _ = plain_reader.newest(str(root))
    assert (record["step"], record["generation"], record["parent"], record["name"]) == (3, 4, 3, "best")
    checkpoint.cancel()
    assert checkpoint.settled(10)
    trainer.store.abandon(slot, bad=False)
    trainer.close()
    for name, byte in (("named/best/model.safetensors", 5000), ("step-000000003/commit.json", 300)):
        data = bytearray((root / name).read_bytes())
        data[byte] ^= 1
        (root / name).write_bytes(data)
    assert plain_reader.newest(str(root))[1]["step"] == 2
    assert "a chunk of model.safetensors" in capsys.readouterr().err


def test_the_members_of_a_record_are_those_of_the_document(root):
    trainer = start(root, items=700)
    record = plain_reader.read_record(str(trainer.save(1)))
    trainer.close()
    table = DOCUMENT.split("## `commit.json`")[1].split("### Verifying")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert set(record) == listed


def test_the_document_says_where_the_digest_lies():
    example, ruler = re.search(r'(\{"sha256":"<64 lower-case hex digits>.*)\n(\^0.*)', DOCUMENT).groups()
    assert example.replace("<64 lower-case hex digits>", "0" * 64)[77:].startswith('"format":1')
    assert [int(place) for place in re.findall(r"\^(\d+)", ruler)] == [0, 11, 75, 77]
