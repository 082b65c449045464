"""The package around the code: a cheap import, honest errors, what is shipped, the demo's verdict."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import ROOT

TEXT = {".py", ".c", ".h", ".md", ".toml", ".txt", ".sh", ".in", ".json", ".yml", ""}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end, with changes to the environment; returns its status and what it printed."""
    return subprocess.run(
        [str(word) for word in command], env={**os.environ, **environment}, cwd=cwd, text=True, capture_output=True, timeout=240
    )


def python(code: str) -> str:
    """What a fresh interpreter prints when it runs ``code``."""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def project_files() -> list[Path]:
    """What git tracks or would; every file of a source tree without git."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_import_is_cheap():
    code = """
import sys, threading, fxckpt
heavy = ("torch", "numpy", "_cffi_backend", "fxckpt.engine._engine")
print([name for name in heavy if name in sys.modules], threading.active_count())
"""
    assert python(code).strip() == "[] 1"


def test_import_works_without_the_engine_and_its_use_says_how_to_build_it(tmp_path):
    code = f"""
import sys
sys.modules["fxckpt.engine._engine"] = None  # as if it was never built
import fxckpt, torch
model = torch.nn.Linear(2, 2)
try:
    fxckpt.compile_step(torch.optim.SGD(model.parameters(), 0.1), {str(tmp_path / "d")!r}, model=model)
except fxckpt.errors.EngineMissing as error:
    print(error)
"""
    message = python(code)
    assert "pip install" in message or "build_ext" in message


def test_backend_is_registered_with_torch_compile_by_name():
    code = """
import fxckpt, torch
from importlib.metadata import entry_points
(point,) = entry_points(group="torch_dynamo_backends", name="fxckpt")
print(callable(point.load()), callable(fxckpt.backend), "fxckpt" in torch._dynamo.list_backends())
"""
    assert python(code).strip() == "True True True"


def test_no_machine_paths_and_no_notes_to_self_in_tracked_files():
    folders = "|".join(("work", "farm", "root", "home/[a-z]+", "Users"))
    wrong = re.compile(rf"(?<![\w.])/({folders})/|\b({'|'.join(('TO' + 'DO', 'FIX' + 'ME'))})\b")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in project_files()
        if path.suffix in TEXT
        for match in wrong.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_between_pages_leads_to_a_file_and_a_heading_that_are_there():
    wrong = []
    for page in (each for each in project_files() if each.suffix == ".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            there = page.parent / name if name else page
            if "://" not in target and (not there.exists() or (anchor and anchor not in anchors(there))):
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert wrong == []


@pytest.mark.slow
def test_wheel_holds_the_engine_the_types_and_the_licence(tmp_path):
    tree = tmp_path / "tree"
    for path in project_files():
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    options = ("-q", "--no-build-isolation", "--no-deps", "-w", tmp_path)
    done = run(sys.executable, "-m", "pip", "wheel", *options, tree)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {"fxckpt/py.typed", "fxckpt/engine/cdef.h", "fxckpt/engine/_engine.abi3.so"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    assert "fxckpt = fxckpt.torch_backend:backend" in points and "fxckpt = fxckpt.cli:main" in points
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "examples/"))]


def toolchain(python: str | Path, **environment: str) -> tuple[int, str]:
    """Exit status of tools/check_toolchain.sh and what it prints."""
    done = run("/bin/sh", ROOT / "tools/check_toolchain.sh", python, **environment)
    return done.returncode, done.stderr


def test_toolchain_check_accepts_what_built_this():
    assert toolchain(sys.executable) == (0, "")


def test_toolchain_check_says_what_to_install_for_a_missing_compiler(tmp_path):
    status, message = toolchain(sys.executable, PATH=str(tmp_path), CC="", CXX="")
    assert status == 1
    assert "C compiler" in message and "C++ compiler" in message and "build-essential" in message
    assert "Python.h" not in message


def pretend_python(folder: Path, question: str, answer: str) -> Path:
    """An interpreter that answers ``answer`` (shell) where the script it is given contains ``question``."""
    pretender = folder / "python"
    pretender.write_text(f'#!/bin/sh\ncase "$2" in *\'{question}\'*) {answer};; esac\nexec "{sys.executable}" "$@"\n')
    pretender.chmod(0o755)
    return pretender


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        ('["include"]', "echo /nowhere; exit 0", ["Python.h", "-dev"]),
        ("ensurepip", "exit 1", ["venv module", "-venv"]),
        ("(3, 10)", "exit 1", ["Python 3.10 or newer", "make PYTHON="]),
    ],
)
def test_toolchain_check_says_what_else_is_missing(tmp_path, question, answer, words):
    status, message = toolchain(pretend_python(tmp_path, question, answer))
    assert status == 1
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("target", ["test", "demo"])
def test_make_stops_before_installing_when_the_compiler_is_missing(tmp_path, target):
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py", "tools/check_toolchain.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = run("make", target, f"PYTHON={sys.executable}", cwd=tmp_path, CC="no-such-compiler", MAKEFLAGS="")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr and "build-essential" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("fails, called", [("lint", ["lint"]), ("test", ["lint", "test"]), ("neither", ["lint", "test"])])
def test_ci_runs_make_lint_and_make_test_and_fails_with_them(tmp_path, fails, called):
    fake = tmp_path / "make"
    fake.write_text(f'#!/bin/sh\necho "called: $*"\n[ "$1" != {fails} ] || exit 3\n')
    fake.chmod(0o755)
    done = run("bash", ROOT / ".ci/run", cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == (0 if fails == "neither" else 3)
    assert done.stdout == "".join(f"called: {target}\n" for target in called)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.stem)
def test_python_in_the_documents_compiles(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        compile(block, path.name, "exec")


def test_every_line_about_security_names_a_test_that_there_is():
    text = (ROOT / "docs/security.md").read_text()
    lines = [
        line for line in text.split("## Reading", 1)[1].splitlines() if re.match(r"\| (?!---|can|they|cannot|\| test)", line)
    ]
    assert len(lines) > 20 and [line for line in lines if "test_" not in line and "as above" not in line] == []
    for place, name in re.findall(r"`([a-z_/]+): (test_\w+)`", text):
        folder, _, file = place.partition("/")
        assert f"def {name}(" in (ROOT / "tests" / folder / f"test_{file}.py").read_text(), name


def test_demo_fails_when_a_digest_differs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import demo

    runs = [demo.Outcome(), demo.Outcome(), demo.Outcome()]
    for outcome, first in zip(runs, (1, 1, 5)):
        for step in range(first, 9):
            assert outcome.read(f"step {step}/8  loss 3.2783  12.5 ms  committed {step - 1}\n")
        outcome.read("parameters sha256 aa11\n")
        outcome.read("optimizer  sha256 bb22\n")
        outcome.seconds = 1.0
    assert demo.report(*runs)
    runs[2].read("optimizer  sha256 cc33\n")
    assert not demo.report(*runs)
    assert "DIFFERENT" in capsys.readouterr().out
    assert not demo.report(demo.Outcome(first=1), runs[1], demo.Outcome(first=5, seconds=1.0))


SMALL = {
    "train_gpt.py": ["--steps", "9", "--layers", "1", "--width", "32", "--heads", "2", "--length", "32", "--batch", "2"],
    "train_resnet.py": ["--steps", "9", "--width", "8", "--batch", "16"],
}


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("FXCKPT_MODELS") != "full", reason="minutes of Inductor: make models; make demo kills train_gpt.py too"
)
@pytest.mark.parametrize("example", sorted(SMALL))
def test_example_killed_and_started_again_ends_with_the_bits_of_an_uninterrupted_run(example, tmp_path):
    def command(folder: str) -> list[str]:
        return [sys.executable, "-u", str(ROOT / "examples" / example), *SMALL[example], "--dir", str(tmp_path / folder)]

    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "ATEN_CPU_CAPABILITY": "default"}  # compiles faster
    whole = run(*command("whole"), **cache)
    assert whole.returncode == 0, whole.stderr
    with subprocess.Popen(command("killed"), env={**os.environ, **cache}, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        seen = next((line for line in process.stdout if re.search(r"^step [5-8]/.*committed [4-8]", line)), None)
        process.kill()
    assert seen is not None, "it ended before it could be killed"
    again = run(*command("killed"), **cache)
    assert again.returncode == 0, again.stderr
    assert int(re.search(r"^step (\d+)/", again.stdout, re.MULTILINE)[1]) > 4
    digests = [re.findall(r"sha256 (\w{64})", output) for output in (whole.stdout, again.stdout)]
    assert digests[0] and digests[0] == digests[1]
