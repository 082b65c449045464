"""Log files that go on where the checkpoint was taken.

A ``CSVLogger`` deletes the file that it finds in its folder, before any callback is asked. So the file gets a second name, under
which a run that resumes finds it, drops what was logged behind the checkpoint (it is logged again), and lets the logger go on.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from typing import Any

from fxckpt.compat.lightning import has_unwritten_rows, replace_at_once

log: logging.Logger = logging.getLogger("fxckpt")

_SECOND_NAME = ".fxckpt"


def positions(loggers: Sequence[Any]) -> list[int | None]:
    """Of each logger, how many rows its file has; None if it is none of Lightning's CSV files. What a callback has logged and
    nobody has written yet is written now."""
    return [_all_rows(each, path) if (path := _csv_path(each)) is not None else None for each in loggers]


def _all_rows(logger: Any, path: str) -> int:
    if has_unwritten_rows(logger):
        logger.experiment.save()
    return _rows(path)


def keep_rows(loggers: Sequence[Any]) -> None:
    """See that a kill leaves no CSV file without the rows that it had."""
    for logger in loggers:
        if (path := _csv_path(logger)) is not None:
            replace_at_once(logger.experiment, path)


def continue_logs(loggers: Sequence[Any], saved: Sequence[int | None]) -> None:
    """Let each CSV file be written on, from the row that the checkpoint stands at; what was logged since is gone. A logger that
    numbers its folders itself has a new one, with what comes from here on."""
    for logger, rows in zip(loggers, saved):
        path = _csv_path(logger)
        if rows and path is not None and os.path.exists(path + _SECOND_NAME):
            writer = logger.experiment  # deletes the file when it is made
            writer.metrics, writer.metrics_keys = [], _put_back(path, rows)


def _csv_path(logger: Any) -> str | None:
    """Where a ``CSVLogger`` writes in this file system."""
    names = {kind.__name__ for kind in type(logger).__mro__}
    if "CSVLogger" not in names or "://" in logger.log_dir:
        return None
    return os.path.join(logger.log_dir, "metrics.csv")


def _rows(path: str) -> int:
    """How many lines, less the header; 0 where there is no file."""
    if not os.path.exists(path):
        return 0
    _name_again(path)
    with open(path, "rb") as file:
        return max(file.read().count(b"\n") - 1, 0)


def _name_again(path: str) -> None:
    """See that the file's second name is that of this file."""
    second, new = path + _SECOND_NAME, path + ".link"
    try:
        if not (os.path.exists(second) and os.path.samefile(path, second)):
            if os.path.exists(new):  # left by a kill
                os.remove(new)
            os.link(path, new)
            os.replace(new, second)
    except OSError as error:  # a file system without links
        log.debug("%s gets no second name: %s", path, error)


def _put_back(path: str, rows: int) -> list[str]:
    """The file as it was at the checkpoint; returns the names of its columns."""
    with open(path + _SECOND_NAME, "rb") as file:
        lines = file.readlines()
    with open(path + ".new", "wb") as file:
        file.writelines(lines[: rows + 1])
    os.replace(path + ".new", path)
    with open(path, newline="") as text:
        return next(csv.reader(text), [])
