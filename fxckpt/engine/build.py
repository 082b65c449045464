"""How the C engine is built: one limited-API extension from ``csrc/*.c``, in cffi's API mode.

setuptools runs this file by path (``cffi_modules`` in setup.py), from the root of the source tree.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c11", "-O3", "-Wall", "-Wextra", "-Werror", "-pthread", "-D_GNU_SOURCE"]


def make_builder() -> FFI:
    """Describes the extension ``fxckpt.engine._engine``, with relative paths as source distributions want."""
    builder = FFI()
    builder.cdef((ROOT / "fxckpt/engine/cdef.h").read_text())
    builder.set_source(
        "fxckpt.engine._engine",
        '#include "engine.h"',
        sources=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.c")),
        depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob("*.h")),
        include_dirs=["csrc"],
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread", "-lm"],
        py_limited_api=True,
    )
    return builder


ffibuilder = make_builder()
