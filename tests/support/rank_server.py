"""A process that ranks are forked from: it is told of lives, a line each, and answers with what each rank found and left."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from process_runs import environment
from repository import SUPPORT
from waiting import TIMEOUT

Ranks = list[dict[str, Any]]
"""What each of a life's ranks found and left; None of one that was killed."""


class RankServer:
    """The process of a script of this folder."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def live(self, asked: dict[str, Any]) -> Ranks:
        """One life."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def rank_server(script: str, cache: Path, folder: Path) -> Iterator[RankServer]:
    """For the time of the block. ``cache``: of compiled code; what it says on stderr is in ``folder``."""
    with (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, str(SUPPORT / script)], text=True, env=environment(cache),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
        )  # fmt: skip
        yield RankServer(process)
        process.stdin.close()
        process.wait(TIMEOUT)
