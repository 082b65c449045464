"""The engine's C test programs, each under the sanitizers that can see what it provokes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SANITIZERS = {"memory": "address,undefined", "races": "thread"}
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all",
         "-pthread", "-I", str(ROOT / "csrc")]
SECONDS = "2"
SEED = os.environ.get("FXCKPT_TEST_SEED", "1")
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}


def compiler() -> list[str]:
    """The command of the C compiler; the test that asks for it is skipped where there is none."""
    command = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    if not shutil.which(command[0]):
        pytest.skip(f"no C compiler: {command[0]} is not on the path (set CC)")
    return command


def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def sanitizer_missing(sanitizer: str, directory: Path) -> str:
    """What the compiler says if it cannot build or run an empty program with this sanitizer; else nothing."""
    source, program = directory / "empty.c", directory / f"empty-{sanitizer}"
    source.write_text("int main(void) { return 0; }\n")
    built = run([*compiler(), f"-fsanitize={sanitizer}", "-pthread", str(source), "-o", str(program)])
    return built.stderr if built.returncode else run([str(program)]).stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles the engine once for each sanitizer, and links programs to it."""
    libraries: dict[str, Path] = {}

    def engine(sanitizer: str) -> Path:
        if sanitizer not in libraries:
            directory = tmp_path_factory.mktemp("engine")
            if missing := sanitizer_missing(sanitizer, directory):
                pytest.skip(f"{compiler()[0]} cannot use -fsanitize={sanitizer}: {missing.strip()[:300]}")
            sources = sorted(str(path) for path in (ROOT / "csrc").glob("*.c"))
            built = run([*compiler(), *FLAGS, f"-fsanitize={sanitizer}", "-c", *sources], cwd=directory)
            assert built.returncode == 0, built.stderr
            libraries[sanitizer] = directory
        return libraries[sanitizer]

    def program(name: str, sanitizer: str) -> str:
        directory = engine(sanitizer)
        objects = sorted(str(path) for path in directory.glob("*.o"))
        source = str(ROOT / "tests/c" / f"{name}.c")
        output = str(directory / name)
        built = run([*compiler(), *FLAGS, f"-fsanitize={sanitizer}", source, *objects, "-o", output])
        assert built.returncode == 0, built.stderr
        return output

    return program


@pytest.mark.parametrize("name, sanitizer", [
    ("stress", "memory"), ("stress", "races"),
    ("faults", "memory"), ("faults", "races"),
    ("geometry", "memory"),
    ("ring", "memory"), ("ring", "races"),
])
def test_c_program_is_clean(build, tmp_path, name, sanitizer):
    """``tests/c/<name>.c`` says at its top what it does; what a sanitizer finds ends it with a report."""
    program = build(name, SANITIZERS[sanitizer])
    done = run([program, str(tmp_path), SECONDS, SEED], env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, f"seed {SEED}\n{done.stdout}\n{done.stderr}"
