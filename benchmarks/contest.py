"""Contestants that take turns: a process for each, which answers within a time limit or is killed; and a folder they share."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

LIMIT = 600.0  # seconds that a contestant may take for one answer
T = TypeVar("T")


class Died(RuntimeError):
    """A contestant's process ended, or did not answer in time."""


class Contestant:
    """A process that runs ``target(*arguments, pipe)``, and this end of its pipe. Not a daemon: some start further processes."""

    def __init__(self, label: str, target: Callable[..., None], *arguments: Any, kind: str = "spawn", limit: float = LIMIT):
        """``kind`` is how the process begins, ``limit`` the seconds it may take for one answer."""
        context = multiprocessing.get_context(kind)
        self.label, self.limit = label, limit
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(*arguments, theirs))  # type: ignore[attr-defined]
        self.process.start()
        atexit.register(self.kill)
        theirs.close()

    def answer(self) -> Any:
        """The next thing that it sends. Raises Died, and has killed it, if there is none."""
        try:
            if self.pipe.poll(self.limit):
                return self.pipe.recv()
            why = f"no answer within {self.limit:.0f} s"
        except (EOFError, ConnectionResetError):
            why = "its process died; what it said is beside this"
        self.kill()
        raise Died(f"{self.label}: {why}")

    def ask(self, question: Any) -> Any:
        """Send, and wait for the answer."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
            self.pipe.send(question)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL, if it runs still."""
        atexit.unregister(self.kill)
        self.process.kill()
        self.process.join()

    def join(self) -> None:
        """Its own end, which is killed for if it takes too long."""
        self.process.join(self.limit)
        self.kill()


def in_turn(number: int, everyone: Sequence[T]) -> list[T]:
    """Whose turn it is in this round: in each one another is first, so that each one follows another in turn."""
    turn = number % len(everyone)
    return [*everyone[turn:], *everyone[:turn]]


def ratios(mine: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Of the same rounds, with their median."""
    each = [a / b for a, b in zip(mine, base)]
    return {"ratio": statistics.median(each), "ratios": each}


@contextlib.contextmanager
def scratch(parent: str) -> Iterator[Path]:
    """A folder on the disk that is measured, gone at the end; what is compiled lies in it, too."""
    folder = Path(tempfile.mkdtemp(prefix=".bench-", dir=parent)).resolve()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compile-cache"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that it is gone then, too
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(numbers: dict, path: str | Path | None) -> None:
    """As JSON, if a file was asked for; whole or not at all."""
    if path:
        new = Path(f"{path}.new")
        new.write_text(json.dumps(numbers, indent=1) + "\n")
        new.rename(path)


def absent(package: str) -> str | None:
    """Why a peer's package cannot be used; None if it can, or none is needed."""
    try:
        importlib.import_module(package or "torch")
    except ImportError as error:
        return str(error)
    return None


def progress(text: str) -> None:
    """What is being done, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
