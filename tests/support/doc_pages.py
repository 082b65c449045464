"""Runs the blocks of one document, each in a folder of its own; ``run_blocks`` is called in a process that is the page's.

Python runs after its setting (``doc_samples.py``), of a diff both sides. Of a run that a block leaves two more steps are made and
flushed, so that what it asks for happens. Commands run in a shell, but for ``fxckpt``, which runs in a child that has torch
already. A command has to end well, unless the block shows another status; and where output is shown, it is what comes but for
numbers.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Container
from pathlib import Path
from typing import Any

import doc_samples
import torch
from doc_blocks import FULL, Block, blocks, old_and_new
from repository import ROOT

import fxckpt
from fxckpt.cli import main
from fxckpt.run.run import live_runs


def run_blocks(page: str, lines: Container[int]) -> None:
    """Run the blocks of a page that begin in these lines; tell which ran and what failed, and end the process with it."""
    failed = []
    if not FULL:
        _compile_less()
    for block in blocks(page):
        if block.line not in lines:
            continue
        try:
            _run(block)
            print("ran", block.name, flush=True)
        except (Exception, SystemExit):
            failed.append(f"{block.name} fails:\n{traceback.format_exc()}")
            _end_runs()
    print(*failed, sep="\n", flush=True)
    sys.exit(bool(failed))


def _compile_less() -> None:
    """Kernels of Inductor take seconds, and are the subject of other tests."""
    compile_step = fxckpt.compile_step
    torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]
    fxckpt.backend = functools.partial(fxckpt.backend, options={"inner": "eager"})
    fxckpt.compile_step = lambda *args, **options: compile_step(*args, **{"update": "native", **options})


def _end_runs() -> None:
    for run in list(live_runs):
        run.shutdown(timeout=30)
        live_runs.discard(run)


def _run(block: Block) -> None:
    text = block.text
    for long, short in () if FULL else doc_samples.SHORTER.items():
        text = re.sub(long, short, text, flags=re.MULTILINE)
    if block.language in ("sh", "console"):
        together = block.mark.startswith("full")  # killed in one block, and gone on with in the next one
        _run_commands(text, block.text, _folder("together") if together else _folder())
    for script in old_and_new(text) if block.language == "diff" else [text] if block.language == "python" else []:
        _run_python(script, block)


def _folder(name: str = "") -> Path:
    """Enter a folder of this name, or a new one."""
    of_all = Path(os.environ["FXCKPT_DOCS_FOLDER"])
    folder = of_all / name if name else Path(tempfile.mkdtemp(dir=of_all))
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    return folder


# ---- Python ----


def _run_python(script: str, block: Block) -> None:
    _folder()
    setting = next((code for words, code in doc_samples.SETTINGS.items() if words in block.text), doc_samples.SMALL)
    names: dict[str, Any] = {"__name__": "a_block"}
    exec(compile(setting, "the setting of the block", "exec"), names)
    exec(compile(script, block.name, "exec"), names)
    opt = names.get("opt")
    if live_runs and isinstance(opt, fxckpt.Checkpointed) and "train" in names and "epochs(" not in script:
        names["train"](2)
        opt.ckpt.flush()
    _end_runs()


# ---- commands ----


def _run_commands(text: str, shown: str, folder: Path) -> None:
    kept = next((make(folder) for words, make in doc_samples.STORES.items() if words in text), None)
    if not (folder / "examples").exists():
        os.symlink(ROOT / "examples", folder / "examples")
    status, output = 0, []
    steps = _steps(text)
    for at, (command, _) in enumerate(steps):
        said, status = _said(command, status)
        output.append(said)
        following = steps[at + 1] if at + 1 < len(steps) else ("", "")
        if "$?" not in following[0] and not (status == 137 and "Killed" in shown):
            assert status == 0, f"{command}: status {status}\n{said}"
    for (command, expected), said in zip(steps, output):
        assert matches(command, expected, said), f"{command} shows\n{expected}\nand says\n{said}"
    del kept  # a run that lived until here


def _steps(text: str) -> list[tuple[str, str]]:
    """Commands, each with the output that the block shows behind it; nothing in a block of ``sh``."""
    if not re.search(r"^\$ ", text, re.MULTILINE):
        return [(line, "") for line in text.splitlines()]
    return [tuple(part.partition("\n")[::2]) for part in re.split(r"^\$ ", text, flags=re.MULTILINE) if part]  # type: ignore[misc]


def _said(command: str, status: int) -> tuple[str, int]:
    """What a command prints, errors too, and its status. ``status``: of the one before."""
    words = shlex.split(command, comments=True)
    with tempfile.TemporaryFile() as file:
        if words[:1] == ["fxckpt"]:
            code = _in_a_child(words[1:], file.fileno())
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            shell = ["sh", "-c", f"(exit {status}); {command}"]
            code = subprocess.run(shell, stdout=file, stderr=file, env={**os.environ, "PATH": path}).returncode
        file.seek(0)
        return file.read().decode(), code


def _in_a_child(arguments: list[str], output: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 70
        try:
            code = main(arguments)
            sys.stdout.flush()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- output ----

_NUMBER = r"(?<![A-Za-z.])\d+(?:[.,:]\d+)*(?:e-?\d+)?"
_KINDS = (
    (r"(?:\.\.\.|…)", r"(?:\\S.*?)?"),
    (r"[0-9a-f]{8}(?![\w.])", r"[0-9a-f]{8}"),
    (_NUMBER, r"\\d[\\d.,:]*(?:e-?\\d+)?"),
    (r"(?<![\w])[kMGT]?B\b", r"[kMGT]?B"),
    (r"(?<![\w.])(?:s|ms|µs)\b", r"(?:s|ms|µs)"),
    (r"/data(?:/run\d)?(?=/)", r"/\\S*"),
)
_BY_MACHINE = {"fxckpt doctor": 1, "fxckpt bench": 0, "fxckpt watch": 0}
"""Commands whose words depend on the machine and the moment: which cell of a line is always the same."""


def matches(command: str, shown: str, said: str) -> bool:
    """Whether the words that a page shows are those that a command says, in their order, whatever the numbers."""
    for name, cell in _BY_MACHINE.items():
        if command.startswith(name):
            shown, said = (_cells(text, cell) for text in (shown, said))
    if not re.search(r"^(?:\.\.\.|…)$", shown, re.MULTILINE):
        shown, said = _once(shown), _once(said)
    words = (".*?" if word in ("...", "…") else _pattern(word) + r"\s+" for word in shown.split())
    return re.match(r"\s*" + "".join(words), said + "\n", re.DOTALL) is not None


def _once(text: str) -> str:
    """Of lines that follow each other and differ in numbers only, the first: how many there are depends on the disk."""
    lines = text.splitlines()
    return "\n".join(line for at, line in enumerate(lines) if not at or _pattern(line) != _pattern(lines[at - 1]))


def _cells(text: str, number: int) -> str:
    found = []
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line)
        found += [cells[number]] if len(cells) > number + 1 else []
    return "\n".join(found)


def _pattern(word: str) -> str:
    """A word of a page as a pattern, with numbers, units, digests and dots standing for any."""
    kinds = "|".join(f"(?P<k{at}>{kind})" for at, (kind, _) in enumerate(_KINDS))
    parts, end = [], 0
    for found in re.finditer(kinds, word):
        at = next(at for at in range(len(_KINDS)) if found[f"k{at}"])
        parts += [re.escape(word[end : found.start()]), _KINDS[at][1].replace("\\\\", "\\")]
        end = found.end()
    return "".join([*parts, re.escape(word[end:])])
