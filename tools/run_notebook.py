"""Run the cells of a notebook in order, without Jupyter, and store what they print: python tools/run_notebook.py FILE [OUT].

For notebooks whose cells are plain Python and print what they show. Runs in the current directory; without OUT, FILE gets what
is printed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def run_notebook(notebook: dict[str, Any]) -> None:
    """Run it, and replace the outputs of its cells. Raises what a cell raises."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    for number, cell in enumerate(cells, 1):
        with _printed() as lines:
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []


@contextmanager
def _printed() -> Iterator[list[str]]:
    """What is written to standard output, by processes that are forked meanwhile, too; complete at the end of the block."""
    lines: list[str] = []
    sys.stdout.flush()
    before = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            lines += file.read().decode().splitlines(keepends=True)


if __name__ == "__main__":
    path, out = Path(sys.argv[1]), Path(sys.argv[-1])
    loaded = json.loads(path.read_text())
    run_notebook(loaded)
    out.write_text(json.dumps(loaded, indent=1, ensure_ascii=False) + "\n")
