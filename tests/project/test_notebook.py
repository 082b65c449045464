"""The notebook: its cells run from the first to the last, kill a training and find the same bits."""

from __future__ import annotations

import json

from repository import ROOT

NOTEBOOK = ROOT / "examples" / "kill_and_resume.ipynb"

RUN = """
import sys
sys.path.insert(0, {tools!r})
import json
from run_notebook import run_notebook
notebook = json.load(open({notebook!r}))
run_notebook(notebook)
json.dump(notebook, open("ran.ipynb", "w"))
"""


def printed(notebook: dict) -> list[str]:
    """What its cells have printed, one text a cell."""
    outputs = (cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    return ["".join(line for output in each for line in output["text"]) for each in outputs]


def test_the_notebook_kills_a_training_and_resumes_it_with_the_same_bits(fork_server, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(RUN.format(tools=str(ROOT / "tools"), notebook=str(NOTEBOOK)))
    run = fork_server.start(script, tmp_path / "there")
    output = run.wait()
    assert run.returncode == 0, output
    now = printed(json.loads((tmp_path / "there" / "ran.ipynb").read_text()))
    before = printed(json.loads(NOTEBOOK.read_text()))
    assert [bool(text) for text in now] == [bool(text) for text in before], "the outputs that are stored are of other cells"
    assert (
        now[-3:]
        == before[-3:]
        == ["the same bits of weights and optimizer\n", "begins behind step 0\n", "begins behind step 16\n"]
    )
    begins = [int(text.split()[3]) for text in now if text.startswith("begins")]
    assert begins[0] == 0 and 20 <= begins[1] < 80 and begins[2] == 0
