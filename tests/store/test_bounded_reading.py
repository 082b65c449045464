"""Records and headers that somebody else made: no memory, no time and no terminal of ours is theirs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError, deserialize
from storing import a_record, start

from fxckpt.cli import main
from fxckpt.errors import Corrupt, SetupError
from fxckpt.store import checks
from fxckpt.store.checks import parse_json, structure_of
from fxckpt.store.layout import parse_header
from fxckpt.store.reader import Reader, read_record
from fxckpt.store.record import Record
from fxckpt.terminal import one_line, plain

MOST_MIB = 700
"""What reading may take beside what importing takes."""


def sealed(body: bytes) -> bytes:
    """The record with this body, its digest right."""
    return b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body


def grown(record: bytes, filling: bytes, count: int) -> bytes:
    """The record with a state of ``count`` times ``filling``, its digest right."""
    return sealed(record[77:].replace(b'"state":', b'"state":[' + filling * count + b'0],"other":', 1))


@pytest.mark.parametrize(("text", "depth", "containers", "values"), [
    (b"", 0, 0, 0),
    (b"[]", 1, 1, 1),
    (b"[[],{}]", 2, 3, 4),
    (b'{"a":[1,2]}', 2, 2, 3),
    (rb'["[[[{,,","\"[[","\\",[]]', 2, 2, 5),
    (b"]]]][", 0, 1, 1),
])  # fmt: skip
def test_what_json_is_made_of_is_counted_outside_strings(text, depth, containers, values, monkeypatch):
    for size in (1, 2, 3, 1 << 20):
        monkeypatch.setattr(checks, "_BLOCK", size)
        found = structure_of(text)
        assert (found.depth, found.containers, found.values) == (depth, containers, values)


@pytest.mark.parametrize("filling", [b"[],", b'{"a":0},', b'"ab",'], ids=repr)
def test_a_record_of_endless_values_is_refused_in_little_memory(root, filling):
    trainer = start(root)
    path = trainer.save(1)
    trainer.close()
    raw = (path / "commit.json").read_bytes()
    (path / "commit.json").write_bytes(grown(raw, filling, (80 << 20) // len(filling)))
    code = "import resource, sys\nfrom fxckpt.cli import main\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    code += "status = main(['ls', sys.argv[1]])\nprint(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)"
    said = subprocess.run([sys.executable, "-c", code, str(root)], check=True, capture_output=True, text=True, timeout=100).stdout
    status, mib = map(int, said.splitlines()[-1].split())
    assert status == 3 and "more than the" in said and mib < MOST_MIB, said


def test_a_record_that_is_too_large_is_not_read_at_all(root):
    trainer = start(root)
    path = trainer.save(1)
    trainer.close()
    os.truncate(path / "commit.json", 1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Corrupt, match="more than the"):
        read_record(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_what_no_reader_takes_is_not_written(monkeypatch):
    record = a_record(1, state=[[] for _ in range(100)])
    record.to_bytes()
    monkeypatch.setattr(checks, "MAX_CONTAINERS", 100)
    with pytest.raises(SetupError, match="as tensors or arrays"):
        record.to_bytes()


def test_a_header_of_endless_entries_is_refused(monkeypatch):
    monkeypatch.setattr(checks, "MAX_VALUES", 1000)
    text = json.dumps({f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(1000)}).encode()
    with pytest.raises(Corrupt, match="more than the 1000"):
        parse_header(len(text).to_bytes(8, "little") + text, 8 + len(text))
    with pytest.raises(Corrupt, match="nested 5 levels"):
        parse_json(b"[[[[[]]]]]", "x", depth=4, what="it")


@pytest.mark.parametrize("header", ['"__metadata__":{"a":"\\ud800"}', '"__metadata__":{"\\ud800":"a"}',
                                    '"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'])  # fmt: skip
def test_half_a_character_in_a_header_is_damage_as_it_is_to_safetensors(header):
    text = b"{" + header.encode() + b"}"
    raw = len(text).to_bytes(8, "little") + text
    with pytest.raises(Corrupt, match="header"):
        parse_header(raw, len(raw))
    with pytest.raises(SafetensorError):
        deserialize(raw)


def test_one_long_text_for_which_there_is_no_memory_is_damage():
    """As large as a record may be, and one value: two copies of it fit into memory, and three do not."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    raw = b'["' + b"a" * (checks.MAX_BYTES - 4) + b'"]'
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + checks.MAX_BYTES * 3 // 2, before[1]))
    try:
        with pytest.raises(Corrupt, match="of 134217728 bytes does not fit into memory"):
            parse_json(raw, "f", depth=9, what="the record")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_file_that_is_larger_than_memory_is_damage(root):
    trainer = start(root)
    path = trainer.save(1)
    trainer.close()
    record = read_record(str(path))
    state = next(file for file in record.files if file.name == "state.safetensors")
    others = tuple(file for file in record.files if file is not state)
    nbytes = 1 << 46
    changed = dataclasses.replace(state, nbytes=nbytes, chunk_bytes=1 << 30, crc32c=(0,) * (nbytes >> 30))
    (path / "commit.json").write_bytes(dataclasses.replace(record, files=(*others, changed)).to_bytes())
    try:
        os.truncate(path / "state.safetensors", nbytes)
    except OSError:
        pytest.skip("this file system has no files of this size")
    with pytest.raises(Corrupt):
        Reader(path).state_tensors()


# ---- terminals ----

CODES = "\x1b]0;pwned\x07\x1b[2J\x9b31m\r\x08\x7f\u202e"


def test_what_cannot_be_printed_is_escaped_and_the_rest_is_not():
    assert one_line("a\x1b[2J\n\x9b\u202eé⁂") == "a\\x1b[2J\\n\\x9b\\u202eé⁂"
    assert plain("a\nb\x1b") == "a\nb\\x1b" and one_line("\ud800") == "\\ud800"
    assert plain("héllo\nworld") == "héllo\nworld"


def is_clean(text: str) -> bool:
    return not any(code in text for code in CODES if not code.isprintable())


@pytest.fixture
def hostile(root):
    """A store whose names hold control codes."""
    trainer = start(root)
    path = trainer.save(1)
    trainer.save(2)
    trainer.close()
    record = read_record(str(path))
    layers = tuple(dataclasses.replace(layer, name=layer.name + CODES) for layer in record.layers)
    optimizers = [{"class": CODES, "groups": [{"params": [], "settings": {CODES: CODES}}]}]
    state = {"early": {"extra": {CODES: 1}}, "late": {}}
    ties = {CODES: CODES}
    changed = dataclasses.replace(record, layers=layers, metrics={CODES: 1.0}, ties=ties, optimizers=optimizers, state=state)
    (path / "commit.json").write_bytes(changed.to_bytes())
    return root


@pytest.mark.parametrize("command", [
    ["ls"], ["ls", "--json"], ["inspect", "{}", "1"], ["inspect", "{}", "1", "--tensors"], ["inspect", "{}", "1", "--json"],
    ["verify"], ["prune", "{}", "--dry-run"], ["diff", "{}", "1", "2"], ["inspect", "{}", CODES],
], ids=lambda command: " ".join(command[:1] + command[2:]).replace(CODES, "codes"))  # fmt: skip
def test_no_command_prints_control_codes_of_a_store(hostile, command, capsys):
    with (hostile / "step-000000001/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")  # verify names the layers that are damaged
    arguments = [each.replace("{}", str(hostile)) for each in command]
    main(arguments if len(arguments) > 1 and "{}" in "".join(command) else [arguments[0], str(hostile), *arguments[1:]])
    out, err = capsys.readouterr()
    assert out + err and is_clean(out + err)


def test_no_error_and_no_line_of_the_log_has_control_codes(hostile, caplog, capsys):
    with (hostile / "step-000000001/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(Corrupt) as caught:
        Reader(hostile / "step-000000001").verify()
    assert "pwned" in str(caught.value) and is_clean(str(caught.value))
    logging.getLogger("fxckpt").error("a name: %s", CODES)
    logging.getLogger("fxckpt").error(caught.value)
    assert "pwned" in caplog.text and is_clean(caplog.text)


def test_a_record_with_such_names_is_still_read_as_it_is(hostile):
    record = Record.from_bytes((hostile / "step-000000001/commit.json").read_bytes(), "x")
    assert record.metrics == {CODES: 1.0}
