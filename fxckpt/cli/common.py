"""What the commands share: exit statuses, choosing a checkpoint, tables, sizes, progress."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from fxckpt.errors import Corrupt, NoCheckpoint, NotAStore, SetupError
from fxckpt.store import names
from fxckpt.store.identity import check_begun
from fxckpt.store.journaled import Journaled, journaled
from fxckpt.store.reader import Candidate, Reader, candidates, directory_of, records
from fxckpt.store.record import Record
from fxckpt.terminal import one_line, plain

OK, FAILED, USAGE, CORRUPT, NOTHING, IN_USE = range(6)
"""Exit statuses; 2 is also argparse's. An interrupt gives 130."""

WHICH = ("a step (1200), the name of a named save (best), a directory in the store (step-000001200-g57), or latest; "
         "default: latest")  # fmt: skip

LOOKS = 10  # times that the newest checkpoint is looked for while a trainer takes it back


def add_store(parser: argparse.ArgumentParser) -> None:
    """The directory that most commands begin with."""
    parser.add_argument("dir", metavar="DIR", help="the store, or the directory of one checkpoint")


def look(directory: str) -> list[Candidate | Corrupt]:
    """All checkpoints of a store, newest first. Raises NotAStore also for what is not there: nobody means that here."""
    if not os.path.isdir(directory):
        raise NotAStore(f"{directory} is not a directory")
    check_begun(os.path.abspath(directory))
    return candidates(directory)


def look_at_all(directory: str) -> list[Candidate | Corrupt]:
    """Checkpoints and records of the journal, newest first; damaged ones where their steps say."""
    found = look(directory)
    for each in reversed(records(directory)):
        later = (i for i, other in enumerate(found) if _order(other) < _order(each))
        found.insert(next(later, len(found)), each)
    return found


def _order(each: Candidate | Corrupt) -> tuple[int, int]:
    """By step, and what was written later before."""
    if isinstance(each, Candidate):
        return each.record.step, each.record.generation
    name = os.path.basename(directory_of(each))
    return names.step_of(name, None) or 0, -1


def steps_of_journal(directory: str) -> list[Journaled]:
    """Each checkpoint of the store that ``directory`` is, or is in, with the records behind it."""
    root = os.path.dirname(os.path.abspath(directory)) if is_checkpoint(directory) else directory
    return journaled(candidates(root), records(root))


@contextmanager
def whole_checkpoint(directory: str, reader: Reader, below: str | None = None) -> Iterator[Reader]:
    """The checkpoint; of a record of the journal its step, made again and written to a temporary directory (``below``). Raises
    Corrupt."""
    if reader.record.journal is None:
        yield reader
        return
    from fxckpt.loading.whole import journaled_step, write_whole

    with tempfile.TemporaryDirectory(prefix="fxckpt-step-", dir=below) as scratch:
        yield Reader(write_whole(journaled_step(steps_of_journal(directory), str(reader.path)), scratch))


def is_checkpoint(directory: str) -> bool:
    """Whether this is the directory of one checkpoint rather than a store."""
    return os.path.lexists(os.path.join(directory, names.COMMIT))


def open_checkpoint(directory: str, which: str | None) -> Reader:
    """The checkpoint that the command line names, its record verified. Raises NoCheckpoint, Corrupt, NotAStore. The newest one
    of a store is the newest whose record verifies; anything else that is damaged raises."""
    if is_checkpoint(directory):
        if which is not None:
            raise SetupError(f"{directory} is one checkpoint; name the store to choose {which!r} in it")
        return Reader(directory)
    for _ in range(LOOKS - 1):
        try:
            return Reader(choose(look_at_all(directory), directory, which).path)
        except NoCheckpoint as error:
            if which not in (None, "latest") or not any(isinstance(each, Candidate) for each in look(directory)):
                raise
            say(f"fxckpt: {error}; looking again", file=sys.stderr)
    return Reader(choose(look_at_all(directory), directory, which).path)


def verify(path: str) -> Record:
    """Read every byte of a checkpoint, with a bar, and return its record. Raises Corrupt, NoCheckpoint."""
    reader = Reader(path)
    with Progress(os.path.basename(path), reader.record.nbytes) as progress:
        reader.verify(progress.advance)
    return reader.record


def choose(found: Sequence[Candidate | Corrupt], directory: str, which: str | None) -> Candidate:
    """One of a listing that is newest first. Raises NoCheckpoint (saying what there is), Corrupt if it is that one."""
    if which is None or which == "latest":
        meant = sorted(found, key=lambda each: isinstance(each, Corrupt))
    else:  # by its directory in the store, or by its step, which named saves are not called by
        called = {os.path.join(os.path.abspath(directory), name) for name in (which, os.path.join(names.NAMED, which))}
        step = int(which) if which.isdecimal() else -1
        meant = [each for each in found if directory_of(each) in called]
        meant += [each for each in found if names.step_of(os.path.basename(directory_of(each)), None) == step]
    for each in meant:
        if isinstance(each, Corrupt):
            raise each
        return each
    there = ", ".join(str(each.record.name or each.record.step) for each in found if isinstance(each, Candidate))
    raise NoCheckpoint(f"{directory} has no checkpoint {which or ''}".rstrip() + f"; there is: {there or 'none'}")


def began(found: Mapping[str, Any]) -> str:
    """That a store began as an import, in words; ``found`` is what its record says."""
    return f"from an import of {found['source']} ({found['format']}), {clock(found['time'])}"


def size_of(path: str) -> int:
    """Bytes of a file, or of the files in a directory."""
    if not os.path.isdir(path):
        return os.stat(path).st_size
    with os.scandir(path) as entries:
        return sum(each.stat().st_size for each in entries if each.is_file())


def say(text: str = "", file: TextIO | None = None) -> None:
    """Print a line or more, without control codes."""
    print(plain(text), file=file)


def print_json(value: Any) -> None:
    """One JSON object, readable; NaN and infinities as text, which JSON has no other way for."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[int] = ()) -> None:
    """Columns as wide as they need; numbers to the right, columns in ``left`` to the left."""
    cells = [[one_line(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        line = (cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        print("  ".join(line).rstrip())


def human(nbytes: float) -> str:
    """A size in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def clock(seconds: float) -> str:
    """A time since 1970, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


def duration(seconds: float) -> str:
    """A time span."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def amount(text: str) -> int:
    """``350M``, ``350MB``, ``1.5G``, ``4GiB`` (binary), ``7B`` (billions): for argparse."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtb]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and match[2] in ("", "b")):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount; write it like 350MB, 4GiB or 7B")
    unit = 1024 ** " kmgt".index(match[2]) if match[3] else _UNITS[match[2]]
    return int(float(match[1]) * unit)


class Progress:
    """A bar on standard error while something long runs; nothing at all when that is not a terminal."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = one_line(what), max(total, 1), 0
        self._begun, self._shown = time.monotonic(), 0.0
        self._visible = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        self._done += nbytes
        now = time.monotonic()
        if not self._visible or now - self._shown < 0.1:
            return
        self._shown = now
        part, speed = min(self._done / self._total, 1.0), self._done / max(now - self._begun, 1e-3)
        bar = "#" * int(24 * part)
        print(f"\r\x1b[K{self._what} [{bar:24}] {part:4.0%}  {human(speed)}/s", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if self._visible and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
