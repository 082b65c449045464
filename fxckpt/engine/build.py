"""How the C engine is built: one limited-API extension from ``csrc/``, in cffi's API mode.

setuptools runs this file by path (``cffi_modules`` in setup.py), from the root of the source tree. Tests build another
extension, with their instruments (``csrc/testing``). With ``FXCKPT_WERROR=1`` a warning of the compiler is an error.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c11", "-O3", "-Wall", "-Wextra", "-pthread", "-D_GNU_SOURCE"]
WERROR = ["-Werror"] if os.environ.get("FXCKPT_WERROR") == "1" else []


def sources(suffix: str, *, testing: bool) -> list[str]:
    """The engine's files that end so, as paths from the root."""
    found = (path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob(f"*{suffix}"))
    return sorted(path for path in found if testing or not path.startswith("csrc/testing/"))


def make_builder(name: str = "fxckpt.engine._engine", *, testing: bool = False) -> FFI:
    """Describes the extension, with relative paths as source distributions want."""
    headers = ["csrc/testing/instruments.h"] if testing else ["csrc/engine.h"]
    declared = ["fxckpt/engine/cdef.h", *(["csrc/testing/cdef.h"] if testing else [])]
    builder = FFI()
    for path in declared:
        builder.cdef((ROOT / path).read_text())
    builder.set_source(
        name,
        "".join(f'#include "{header.removeprefix("csrc/")}"\n' for header in headers),
        sources=sources(".c", testing=testing),
        depends=sources(".h", testing=testing),
        include_dirs=["csrc"],
        extra_compile_args=[*FLAGS, *WERROR, *(["-DFX_TESTING"] if testing else [])],
        extra_link_args=["-pthread", "-lm"],
        py_limited_api=True,
    )
    return builder


ffibuilder = make_builder()
