"""``python -m fxckpt``."""

from __future__ import annotations

import sys

from fxckpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
