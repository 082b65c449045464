"""What the engine says of the CUDA driver, against the headers of two toolkits: types, versions, layouts, values.

The headers are in two wheels of NVIDIA's, which ``make test`` puts beside the virtual environment's packages; they are read,
not shipped.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from c_programs import SOURCES, compiler, run
from repository import ROOT

PLACES = [Path(sys.prefix) / "cuda-headers", Path(sysconfig.get_path("purelib"))]
HEADERS = {"12.8": "nvidia/cuda_runtime/include", "13": "nvidia/cu13/include"}
VERSIONS = {"12.8": "CUDA_VERSION 1208", "13": "CUDA_VERSION 13"}


def include(version: str) -> Path:
    """The folder with this version's cuda.h."""
    for folder in (place / HEADERS[version] for place in PLACES):
        header = folder / "cuda.h"
        if header.exists() and VERSIONS[version] in header.read_text(errors="replace"):
            return folder
    pytest.skip(f"no headers of CUDA {version} here: make test installs them")


def compiled(sources: Path, headers: Path) -> subprocess.CompletedProcess:
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    return run([*compiler(), *flags, "-I", str(sources), "-isystem", str(headers), str(SOURCES / "headers.c")])


@pytest.mark.parametrize("version", HEADERS)
def test_the_engine_and_the_toolkits_headers_agree(version):
    done = compiled(ROOT / "csrc", include(version))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "ours, wrong",
    [
        ("FX_CU_HOST_POINTERS = 91", "FX_CU_HOST_POINTERS = 92"),
        ("NEEDED(EventRecord, 2000)", "NEEDED(EventRecord, 3020)"),
        ("OPTIONAL(MemcpyBatchAsync, 12080)", "OPTIONAL(MemcpyBatchAsync, 13000)"),
        ("    unsigned flags;\n", "    unsigned long flags;\n"),
        ("CUevent event, unsigned flags)", "CUevent event)"),
    ],
    ids=["value", "version", "newer-version", "layout", "type"],
)
def test_what_they_disagree_on_does_not_compile(tmp_path, ours, wrong):
    headers, folder = include("13"), tmp_path / "cuda"
    folder.mkdir()
    text = (ROOT / "csrc/cuda/driver.h").read_text()
    assert text.count(ours) == 1
    (folder / "driver.h").write_text(text.replace(ours, wrong))
    (tmp_path / "engine.h").write_text((ROOT / "csrc/engine.h").read_text())
    done = compiled(tmp_path, headers)
    assert done.returncode != 0 and "error" in done.stderr
