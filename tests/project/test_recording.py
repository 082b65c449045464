"""The README's recording: made by its script from a real run, small, and readable where nothing moves."""

from __future__ import annotations

import importlib.util
import re
import sys
from xml.etree import ElementTree

import pytest
from repository import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def lines(picture: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(picture).iter(f"{SVG}text")]


@pytest.fixture
def record(monkeypatch):
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("record", ROOT / "tools" / "record.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "record", module)
    spec.loader.exec_module(module)
    return module


def test_the_recording_shows_a_kill_and_a_training_that_goes_on_behind_it():
    picture = (ROOT / "docs" / "recording.svg").read_text()
    assert len(picture.encode()) < 300_000
    shown = lines(picture)
    prompts = [at for at, line in enumerate(shown) if line.startswith("$ ")]
    first, listed, second = (shown[a:b] for a, b in zip(prompts, [*prompts[1:], None]))
    assert first[0] == second[0] and first[-1] == "Killed" and listed[0] == "$ fxckpt ls ckpt"
    steps = [[int(found[1]) for line in part if (found := re.match(r"step (\d+)", line))] for part in (first, second)]
    newest = int(listed[-1].split()[0])
    assert 0 < newest <= steps[0][-1] < steps[1][-1] and newest < steps[1][0]
    again = {line.partition(":")[0]: line for line in second}
    assert all(again.get(line.partition(":")[0], line) == line for line in first[1:-1]), (
        "a step that was made again is another one"
    )


def test_waits_are_shortened_and_all_lines_stay_visible_without_animation(record):
    shown = [record.Shown(10.0, "$ a"), record.Shown(10.5, "b & <c>"), record.Shown(99.0, "d")]
    assert record._shortened([each.at for each in shown]) == [0.0, 0.5, 1.5]
    picture = record.picture(shown)
    assert lines(picture) == ["$ a", "b & <c>", "d"]
    assert 'opacity="0"' not in picture


def test_a_command_that_fails_is_no_recording(record, tmp_path):
    with pytest.raises(RuntimeError, match="nothing"):
        record._run("$ ls", ["ls", str(tmp_path / "nothing")], tmp_path)
