"""Compiles the C sources of the tests."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from repository import ROOT

SOURCES = ROOT / "tests" / "engine" / "c"
ENGINE = sorted(map(str, (ROOT / "csrc").rglob("*.c")))  # with the instruments
FLAGS = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-g",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fno-sanitize-recover=all",
    "-pthread",
    "-DFX_TESTING",
    "-I",
    str(ROOT / "csrc"),
]


def compiler() -> list[str]:
    """The command of the C compiler; the test that asks for it is skipped where there is none."""
    command = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    if not shutil.which(command[0]):
        pytest.skip(f"no C compiler: {command[0]} is not on the path (set CC)")
    return command


def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def build_driver(directory: Path, *flags: str) -> str:
    """The fake driver (``fake_cuda.c``) as a shared library; returns its path."""
    output = str(directory / "libfakecuda.so")
    built = run(
        [*compiler(), *FLAGS, *flags, "-fPIC", "-shared", "-fvisibility=hidden", str(SOURCES / "fake_cuda.c"), "-o", output]
    )
    assert built.returncode == 0, built.stderr
    return output
