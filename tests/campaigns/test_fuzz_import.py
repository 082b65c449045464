"""Whatever ``fxckpt import`` is given, it makes a checkpoint that verifies, or says no with an error of ours: no crash, no hang,
no memory beyond ``fuzzing.MEMORY``, nothing written but the store, and nothing in the source is run.

Good sources of each format are mutated: bytes and pieces of any of their files, and values in their JSON and their pickles.
These formats have no checksums, so what a flipped bit of a tensor imports is that tensor with a flipped bit.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fuzzing import BYTES, CHANGES, bounded, campaign, changed, mutated, try_one
from hypothesis import strategies as st
from safetensors.torch import save_file
from storing import fast_directory
from torch.distributed.checkpoint.metadata import Metadata

import fxckpt
from fxckpt.errors import FxckptError
from fxckpt.store.reader import Reader

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

STATE = {"a.weight": torch.randn(4, 3), "a.bias": torch.ones(4).bfloat16(), "n": torch.tensor(7)}
PAIR = {"model": STATE, "step": 3, "optimizer": {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 3)}},
    "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}, {"lr": 0.2, "params": [1]}],
}}  # fmt: skip


def torch_file(place: Path) -> Path:
    torch.save(PAIR, place / "x.pt")
    return place / "x.pt"


def old_torch_file(place: Path) -> Path:
    torch.save(PAIR, place / "x.pt", _use_new_zipfile_serialization=False)
    return place / "x.pt"


def safetensors_file(place: Path) -> Path:
    save_file(STATE, place / "x.safetensors")
    return place / "x.safetensors"


def hugging_face(place: Path) -> Path:
    names = list(STATE)
    for at, part in enumerate((names[:1], names[1:])):
        save_file({name: STATE[name] for name in part}, place / f"model-{at}.safetensors")
    places = {name: f"model-{int(at > 0)}.safetensors" for at, name in enumerate(names)}
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    (place / "config.json").write_text(json.dumps({"model_type": "x", "layers": [1, 2]}))
    return place


def with_dcp(place: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(PAIR, checkpoint_id=place, no_dist=True)
    return place


FORMATS: dict[str, Callable[[Path], Path]] = {
    "torch.save": torch_file, "old torch.save": old_torch_file, "safetensors": safetensors_file,
    "Hugging Face": hugging_face, "DCP": with_dcp,
}  # fmt: skip


def with_json(raw: bytes, changes: list) -> bytes:
    """The JSON of a file changed: all of it, or the header of a file of safetensors. Other files as they are."""
    begin = 8 if raw[8:9] == b"{" else 0
    end = 8 + int.from_bytes(raw[:8], "little") if begin else len(raw)
    if raw[begin : begin + 1] != b"{":
        return raw
    text = json.dumps(changed(json.loads(raw[begin:end]), changes)).encode()
    return (len(text).to_bytes(8, "little") if begin else b"") + text + raw[end:]


def with_pickle(raw: bytes, steps: list) -> bytes:
    """The pickle in a zip archive mutated, its checksum made right. Other files as they are."""
    if raw[:2] != b"PK":
        return raw
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, mutated(old.read(name), steps) if name.endswith(".pkl") else old.read(name))
    return out.getvalue()


@pytest.fixture
def place(tmp_path):
    with fast_directory(tmp_path) as directory:
        yield directory


def import_of(source: Path, place: Path) -> str | None:
    """Import it; None, or the error that says no."""
    shutil.rmtree(place / "d", ignore_errors=True)
    before = {path: path.stat().st_size for path in (place / "s").rglob("*")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = fxckpt.import_checkpoint(source, place / "d")
    except FxckptError as error:
        assert len(str(error)) < 20_000
        return str(error)
    finally:
        assert {path: path.stat().st_size for path in (place / "s").rglob("*")} == before
    Reader(done.path).verify()
    return None


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_what_is_imported_from_any_bytes_verifies_or_is_refused(kind, place, counted):
    (place / "s").mkdir()
    source = FORMATS[kind](place / "s")
    good = {path: path.read_bytes() for path in sorted((place / "s").iterdir())}
    outcomes = {"imported": 0, "refused": 0}

    def one(drawn: tuple) -> None:
        which, steps, changes, inside = drawn
        path = list(good)[which % len(good)]
        raw = with_json(good[path], changes) if changes else good[path]
        path.write_bytes(with_pickle(raw, steps) if inside else mutated(raw, steps))
        outcomes["refused" if import_of(source, place) else "imported"] += 1
        path.write_bytes(good[path])

    campaign(st.tuples(st.integers(0, 9), st.lists(BYTES, max_size=3), st.none() | CHANGES, st.booleans()), one, 25)
    for outcome, many in outcomes.items():
        counted(f"hostile sources of {kind} that were {outcome}", many)
    assert outcomes["refused"] > 0


# ---- what chance does not find ----


REMEMBERED = b"\x80\x02Nr\xff\xff\xff\x0f."  # the 2**28th object that it remembers is None
LONG = b"\x80\x04\x8e" + struct.pack("<Q", 1 << 33) + b"."  # a text of 8 GiB is to come
ARRAY = b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"."
OF_A_CLASS = (b"ctorch.distributed.checkpoint.metadata\nMetadata\n" + b"N}" + pickle.dumps("planner_data", 0)[:-1] +
              b"I7\ns\x86b.")  # fmt: skip


@pytest.mark.parametrize("metadata", [REMEMBERED, LONG, ARRAY, OF_A_CLASS], ids=["remembered", "text", "array", "class"])
def test_a_few_bytes_of_metadata_take_no_memory_and_change_no_class(metadata, place):
    (place / "s").mkdir()
    source = with_dcp(place / "s")
    (source / ".metadata").write_bytes(metadata)
    refused = []
    with bounded():
        try_one(lambda _: refused.append(import_of(source, place)), None)
    assert refused[0] is not None and Metadata.planner_data is None


def test_a_tensor_of_dcp_that_its_pieces_do_not_cover_is_refused(place):
    """What no piece covers would be whatever the memory held."""
    (place / "s").mkdir()
    source = with_dcp(place / "s")
    found = pickle.loads((source / ".metadata").read_bytes())
    key = next(key for key, each in found.state_dict_metadata.items() if key.endswith("a.weight"))
    found.state_dict_metadata[key] = dataclasses.replace(found.state_dict_metadata[key], size=torch.Size([8, 3]))
    (source / ".metadata").write_bytes(pickle.dumps(found))
    assert "are not the whole of it" in import_of(source, place)
