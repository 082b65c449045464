"""Fail if fewer than so many percent of the package's names have a full type, for pyright; name those that do not.

Usage: tools/type_completeness.py PERCENT. The pyright is basedpyright, which comes from PyPI with all that it needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(least: float) -> int:
    """Print what is missing, and the share; 1 if it is too small."""
    bin = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [bin / "basedpyright", "--verifytypes", "fxckpt", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True)
    found = json.loads(done.stdout)["typeCompleteness"]
    share = 100 * found["completenessScore"]
    if share >= least and found["symbols"]:
        return 0
    for symbol in found["symbols"]:
        if symbol["isExported"] and not (symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]):
            print(symbol["name"])
    print(f"{share:.1f} % of the exported names have a full type; at least {least:g} % must")
    return 1


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
