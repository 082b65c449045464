"""Where the repository's files lie, and how a script of the tests finds them."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent


def python_path() -> str:
    """The ``PYTHONPATH`` of a script that imports fxckpt and what is beside this file."""
    return os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
