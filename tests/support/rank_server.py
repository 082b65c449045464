"""A process that ranks are forked from: it is told of lives, a line each, and answers with what each rank found and left."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from repository import SUPPORT
from waiting import TIMEOUT

Ranks = list[dict[str, Any]]
"""What each of a life's ranks found and left; None of one that was killed."""


class RankServer:
    """The process of ``rank_lives.py``, which says what a life is."""

    def __init__(self, line: TextIO, log: Path):
        self._line, self._log = line, log

    def live(self, asked: dict[str, Any]) -> Ranks:
        """One life."""
        self._line.write(json.dumps(asked) + "\n")
        self._line.flush()
        answered = self._line.readline()
        assert answered, f"the process that ranks are forked from has ended:\n{self._log.read_text()}"
        return json.loads(answered)


@contextlib.contextmanager
def started(server: Any, folder: Path) -> Iterator[RankServer]:
    """For the time of the block, forked by a fork server, which has torch; what it says is in ``folder``."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        process = server.start(SUPPORT / "rank_lives.py", folder / "run", stays=True, RANK_SERVER=port)
        listening.settimeout(TIMEOUT)
        connection, _ = listening.accept()
    with connection, connection.makefile("rw") as line:
        yield RankServer(line, process.log)
    process.wait()
