"""The engine's C test programs, each under the sanitizers that can see what it provokes.

``FXCKPT_C_SECONDS`` says how long each runs (``make faults``: a minute).
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest
from c_programs import ENGINE, FLAGS, SOURCES, build_driver, compiler, run
from repository import ROOT

SANITIZERS = {"memory": "address,undefined", "races": "thread"}
LONG = os.environ.get("FXCKPT_C_SECONDS")
SECONDS = LONG or "1"
TRAINING = LONG or "2"  # on the fake driver: shorter ones complete too few checkpoints on a busy machine
SEED = os.environ.get("FXCKPT_TEST_SEED", "1")
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}


def sanitizer_missing(sanitizer: str, directory: Path) -> str:
    """What the compiler says if it cannot build or run an empty program with this sanitizer; else nothing."""
    source, program = directory / "empty.c", directory / f"empty-{sanitizer}"
    source.write_text("int main(void) { return 0; }\n")
    built = run([*compiler(), f"-fsanitize={sanitizer}", "-pthread", str(source), "-lm", "-o", str(program)])
    return built.stderr if built.returncode else run([str(program)]).stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the engine once for each sanitizer, and links programs to it."""

    @functools.cache
    def engine(sanitizer: str) -> Path:
        directory = tmp_path_factory.mktemp("engine")
        if missing := sanitizer_missing(sanitizer, directory):
            pytest.skip(f"{compiler()[0]} cannot use -fsanitize={sanitizer}: {missing.strip()[:300]}")
        built = run([*compiler(), *FLAGS, f"-fsanitize={sanitizer}", "-c", *ENGINE], cwd=directory)
        assert built.returncode == 0, built.stderr
        return directory

    @functools.cache
    def program(name: str, sanitizer: str) -> str:
        directory = engine(sanitizer)
        objects = sorted(str(path) for path in directory.glob("*.o"))
        source = str(SOURCES / f"{name}.c")
        output = str(directory / name)
        built = run([*compiler(), *FLAGS, f"-fsanitize={sanitizer}", source, *objects, "-o", output, "-ldl", "-lm"])
        assert built.returncode == 0, built.stderr
        return output

    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The fake driver, compiled once for each sanitizer."""
    return functools.cache(lambda sanitizer: build_driver(tmp_path_factory.mktemp("driver"), f"-fsanitize={sanitizer}"))


@pytest.mark.parametrize(
    "name, sanitizer",
    [
        ("stress", "memory"),
        ("stress", "races"),
        ("faults", "memory"),
        ("faults", "races"),
        ("geometry", "memory"),
        ("ring", "memory"),
        ("ring", "races"),
    ],
)
def test_c_program_is_clean(build, tmp_path, name, sanitizer):
    """``c/<name>.c`` says at its top what it does; what a sanitizer finds ends it with a report."""
    program = build(name, SANITIZERS[sanitizer])
    done = run([program, str(tmp_path), SECONDS, SEED], env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, f"seed {SEED}\n{done.stdout}\n{done.stderr}"


def test_the_core_knows_no_place_that_chunks_go_to():
    """Disk, ring and mock are behind csrc/core/sink.h."""
    texts = {path.name: path.read_text() for path in (ROOT / "csrc/core").glob("*.c")}
    known = [name for name, text in texts.items() if re.search(r'#include "(io|monitor|testing)/|fx_relay', text)]
    assert texts and known == []


# ---- the CUDA path, on the fake driver ----


@pytest.mark.parametrize(
    "sanitizer, settings",
    [
        ("memory", {}),
        ("races", {}),
        ("memory", {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),  # one hardware queue: a wait for what comes later would hang
        ("memory", {"FAKE_CUDA_OLD": "1"}),  # a driver without batches of copies
    ],
    ids=["memory", "races", "one-queue", "old-driver"],
)
def test_copies_keep_the_order_of_events_on_a_device_that_is_late(build, driver, tmp_path, sanitizer, settings):
    """``c/cuda.c``: also each call of the driver fails once, and the device is lost at each call once."""
    program = build("cuda", SANITIZERS[sanitizer])
    short = ["0"] if settings else []  # only training
    command = [program, str(tmp_path), TRAINING, SEED, driver(SANITIZERS[sanitizer]), *short]
    done = run(command, env=os.environ | ENVIRONMENT | settings)
    assert done.returncode == 0, f"seed {SEED}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def mutable(tmp_path_factory):
    """``c/cuda.c`` and the engine with the switch that leaves one wait or record out."""
    directory = tmp_path_factory.mktemp("mutations")
    program = str(directory / "cuda")
    built = run(
        [
            *compiler(),
            *FLAGS[:-2],
            "-DFX_MUTATIONS",
            "-I",
            str(ROOT / "csrc"),
            "-fno-sanitize=all",
            str(SOURCES / "cuda.c"),
            *ENGINE,
            "-o",
            program,
            "-ldl",
            "-lm",
        ]
    )
    assert built.returncode == 0, built.stderr
    return program, build_driver(directory)


def mutations() -> list[str]:
    """The names in csrc/cuda/cuda.h, in order; the first one is none."""
    text = (ROOT / "csrc/cuda/cuda.h").read_text()
    body = text[text.index("enum fx_mutation {") : text.index("    MUTATIONS\n")]
    return [line.strip().split(",")[0] for line in body.splitlines()[1:] if line.strip()]


@pytest.mark.parametrize("mutation", mutations())
def test_an_order_of_events_without_one_of_its_waits_is_caught(mutable, tmp_path, mutation):
    program, driver = mutable
    number = str(mutations().index(mutation))
    for attempt in range(1 if mutation == "NO_MUTATION" else 8):  # on a busy machine a copy may be late when it should be early
        seed = str(int(SEED) + attempt)
        done = run([program, str(tmp_path), "3", seed, driver, number])
        if done.returncode != 0:
            break
    if mutation == "NO_MUTATION":
        assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    else:
        assert done.returncode != 0 and "not so" in done.stderr, f"{mutation} goes unseen up to seed {seed}\n{done.stderr}"
