"""Every block of code and every command of every page: run, or marked with the reason why not."""

from __future__ import annotations

import re
import shlex

import pytest
from doc_blocks import Block, blocks, commands, indented_code, inline_commands, old_and_new, pages
from doc_pages import matches
from repository import ROOT

from fxckpt.cli import parser

WITH_OTHERS = "docs/integrations.md"
"""Run where the packages are loaded that it is about: in ``integrations/test_documented_diffs.py``."""


def runnable(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.is_run]


def test_every_block_has_a_language_that_is_run_or_a_mark_with_a_reason():
    assert [fault for page in pages() for block in blocks(page) for fault in block.faults()] == []
    assert [code for page in pages() for code in indented_code(page)] == []
    assert sum(len(runnable(page)) for page in pages()) > 20


@pytest.mark.parametrize("page", [page for page in pages() if runnable(page) and page != WITH_OTHERS])
def test_every_block_of_a_page_runs(page, fork_server, root, tmp_path):
    script = tmp_path / "page.py"
    lines = [block.line for block in runnable(page)]
    script.write_text(f"from doc_pages import run_blocks\nrun_blocks({page!r}, {lines})\n")
    run = fork_server.start(script, tmp_path / "page", FXCKPT_DOCS_FOLDER=str(root.parent))
    output = run.wait()
    assert run.returncode == 0, output
    assert output.count("ran ") == len(lines), output


# ---- commands that are not run: they are there ----


def faults_of_command(command: str) -> list[str]:
    """What is wrong with a command as far as looking tells: no such subcommand, option, target, file or extra."""
    words = shlex.split(command, comments=True)
    while words and "=" in words[0]:
        words = words[1:]
    if words[:3] == ["python", "-m", "fxckpt"]:
        words = words[2:]
    checks = {"fxckpt": _fxckpt, "make": _make, "python": _script, "sh": _script, "pip": _pip}
    return checks[words[0]](words[1:]) if words and words[0] in checks else []


def _fxckpt(words: list[str]) -> list[str]:
    """In running text what a command must be given is often left out."""
    for more in ([], ["9"], ["9", "9"], ["9", "-o", "9"]):
        try:
            parser().parse_args([*words, *more])
        except SystemExit as error:
            if not error.code:  # --version
                return []
            continue
        return []
    return [f"fxckpt {' '.join(words)} is no command"]


def _make(words: list[str]) -> list[str]:
    targets = re.findall(r"^([a-z][\w -]*):(?! export)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = {target for line in targets for target in line.split()}
    return [f"make {word}: no such target" for word in words if "=" not in word and word not in known]


def _script(words: list[str]) -> list[str]:
    return [] if words[0] == "train.py" or (ROOT / words[0]).exists() else [f"{words[0]} is not there"]


def _pip(words: list[str]) -> list[str]:
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    asked = [extra for word in words for extra in re.findall(r"fxckpt\[(\w+)\]", word)]
    return [f"there is no extra {extra}" for extra in asked if extra not in known]


def test_every_command_of_every_page_exists_even_where_none_is_run(capsys):
    named = [(page, command) for page in pages() for command in inline_commands(page)]
    named += [(block.name, command) for page in pages() for block in blocks(page) for command in commands(block)]
    assert [f"{where}: {fault}" for where, command in named for fault in faults_of_command(command)] == []
    assert len(named) > 80


# ---- the tests of the tests ----


@pytest.mark.parametrize(
    "command",
    ["fxckpt lst", "fxckpt ls --what", "make no-such", "python tools/what.py", 'pip install "fxckpt[what]"', "A=1 make what"],
)
def test_a_command_that_is_not_there_is_found(command, capsys):
    assert len(faults_of_command(command)) == 1


def test_a_block_that_is_neither_run_nor_marked_is_found():
    def block(language: str, text: str = "", mark: str = "") -> Block:
        return Block("page.md", 3, language, text, mark)

    skipped = block("sh", "ls\n", "skip: the machine has none")
    wrong = block(""), block("bash"), block("text", "$ ls\n"), block("sh", "ls\n", "skip"), block("sh", "ls\n", "skip: x")
    assert all(each.faults() for each in wrong)
    assert not any(each.faults() for each in (block("sh", "ls\n"), block("text", "a\n"), skipped))
    assert block("sh", "ls\n").is_run and not skipped.is_run


def test_a_diff_has_two_sides():
    assert old_and_new("+ import a\n- b\n+ c\n  d:\n      e\n") == ("b\nd:\n    e\n", "import a\nc\nd:\n    e\n")
    assert old_and_new(" d:\n+    e\n-    f\n") == ("d:\n    f\n", "d:\n    e\n")


@pytest.mark.parametrize(
    "shown, said, same",
    [
        ("12 steps, 3.5 MB", "7 steps, 812 kB", True),
        ("good /data/run7/a", "good /tmp/x/y/a", True),
        ("good  a\n…\nbad  z", "good a\ngood b\nbad z", True),
        ("good  a\n...\nbad  z", "good a\nbad z", True),
        ("CRC-32C 97c223f2", "CRC-32C 00aa11bb", True),
        ("remove slot-1\nremove slot-2", "remove slot-7", True),
        ("12 steps", "12 turns", False),
        ("layer h.1.up", "layer h.2.up", False),
        ("good a\nbad b", "good a", False),
        ("good a", "bad\ngood a", False),
    ],
)
def test_what_is_shown_is_compared_but_for_numbers(shown, said, same):
    assert matches("fxckpt ls", shown, said) is same
