"""The diffs of ``docs/integrations.md``: both sides of each run with the package that it is about."""

from __future__ import annotations

import pytest
from doc_blocks import blocks

PAGE = "docs/integrations.md"
SERVERS = {
    "fxckpt.hf": "trainers_server",
    "accelerator": "trainers_server",
    "lightning": "lightning_server",
    "fabric": "lightning_server",
}
"""Where a diff is run, by a word in it."""

DIFFS = {block.line: block.text for block in blocks(PAGE) if block.is_run}


def test_there_is_a_diff_for_each_package():
    assert [sum(word in text for text in DIFFS.values()) for word in SERVERS] == [1, 1, 1, 1]
    assert len(DIFFS) == 4


@pytest.mark.parametrize("line", DIFFS)
def test_both_sides_of_a_diff_run(line, request, root, tmp_path):
    server = request.getfixturevalue(next(name for word, name in SERVERS.items() if word in DIFFS[line]))
    script = tmp_path / "page.py"
    script.write_text(f"from doc_pages import run_blocks\nrun_blocks({PAGE!r}, [{line}])\n")
    run = server.start(script, tmp_path / "page", FXCKPT_DOCS_FOLDER=str(root.parent))
    output = run.wait()
    assert run.returncode == 0, output
    assert f"ran {PAGE}:{line}" in output
    committed = list(root.parent.glob("*/checkpoints/step-*"))
    assert committed, "the new side made no checkpoint"
