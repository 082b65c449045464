"""Write the tutorial's script as it is before fxckpt and with its lines changed: python tools/tutorial_scripts.py FOLDER.

Makes ``plain.py``, the block of Python, and ``resumed.py``, the same with the lines of the diff changed as a
reader does.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"


def scripts() -> tuple[str, str]:
    """The plain script, and the changed one. Raises ValueError for a hunk that fits nowhere, or in two places."""
    text = TUTORIAL.read_text()
    plain = _block(text, "python")
    changed = plain
    for hunk in re.split(r"^ \.\.\.\n", _block(text, "diff"), flags=re.MULTILINE):
        old, new = (_side(hunk, sign) for sign in "-+")
        if changed.count(old) != 1:
            raise ValueError(f"these lines are not once in the script:\n{old}")
        changed = changed.replace(old, new)
    return plain, changed


def _block(text: str, language: str) -> str:
    """The first one in this language."""
    return text.split(f"```{language}\n", 1)[1].split("```", 1)[0]


def _side(hunk: str, sign: str) -> str:
    return "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] in (" ", sign, ""))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, script in zip(("plain.py", "resumed.py"), scripts()):
        (folder / name).write_text(script)
