"""How the C engine is built: one limited-API extension from ``csrc/``, in cffi's API mode.

setuptools runs this file by path (``cffi_modules`` in setup.py), from the root of the source tree. Tests build another
extension, with their instruments (``csrc/testing``). With ``FXCKPT_WERROR=1`` a warning of the compiler is an error.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c11", "-O3", "-Wall", "-Wextra", "-pthread", "-D_GNU_SOURCE"]
WERROR = ["-Werror"] if os.environ.get("FXCKPT_WERROR") == "1" else []


def sources(suffix: str, *, testing: bool) -> list[str]:
    """The engine's files that end so: as paths from the root, as source distributions want them; for tests, absolute."""
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob(f"*{suffix}"))
    return [str(ROOT / path) for path in found] if testing else [path for path in found if "/testing/" not in path]


def make_builder(name: str = "fxckpt.engine._engine", *, testing: bool = False) -> FFI:
    """Describes the extension; with ``testing``, that of ``tests/support/instruments.py``."""
    builder = FFI()
    builder.cdef((ROOT / "fxckpt/engine/cdef.h").read_text())
    if testing:
        builder.cdef((ROOT / "csrc/testing/cdef.h").read_text())
    builder.set_source(
        name,
        '#include "testing/instruments.h"' if testing else '#include "engine.h"',
        sources=sources(".c", testing=testing),
        depends=sources(".h", testing=testing),
        include_dirs=[str(ROOT / "csrc") if testing else "csrc"],
        extra_compile_args=[*FLAGS, *WERROR, *(["-DFX_TESTING"] if testing else [])],
        extra_link_args=["-pthread", "-lm"],
        py_limited_api=True,
    )
    return builder


ffibuilder: FFI = make_builder()
