"""``doctor --hosts``: does a directory show each host what the others do in it, as ranks that write one store together need?

The hosts meet in the directory itself. Each waits for the others, with a limit; what is written there is removed.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import statistics
import time
import zlib
from collections.abc import Callable, Iterator

from fxckpt.cli.findings import GOOD, NOTE, WRONG, Finding
from fxckpt.store import lock

MEETING = ".fxckpt-doctor-hosts"
PATIENCE = 60.0
"""Seconds that one waits for another."""

_ROUNDS = 5
_SLOW = 1.0  # seconds until a name is seen, above which it is worth a note: each commit waits for several
_LOOK = 0.002


class Missing(Exception):
    """Another host did not do in time what it was waited for."""


class Hosts:
    """One of ``count`` hosts that were started with the same directory."""

    def __init__(self, directory: str, count: int):
        self._folder, self._count = os.path.join(directory, MEETING), count
        self._name = f"{secrets.token_hex(4)}-{socket.gethostname()}-{os.getpid()}"
        self.rank = 0
        self.names: list[str] = []

    def findings(self) -> Iterator[Finding]:
        """What holds between this host and the others."""
        os.makedirs(self._folder, exist_ok=True)
        try:
            self._write(f"here-{self._name}")
            self._meet()
            yield Finding("hosts", GOOD, f"{self._count}: {', '.join(name.split('-', 1)[1] for name in self.names)}")
            yield self._seen()
            yield self._read()
            yield self._locks()
            self._write(f"over-{self.rank}")
            if self.rank == 0:  # it clears up behind all of them
                self._wait_for_all("over")
        except (Missing, FileNotFoundError) as error:
            why = error if isinstance(error, Missing) else "another host gave up, and cleared up"
            left = f"remove {self._folder} if it was left over"
            yield Finding("hosts", WRONG, f"{why}. Is it one directory on all of them, and was this started on all? Else {left}")
        finally:
            if self.rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _meet(self) -> None:
        def here() -> list[str]:
            return sorted(name[5:] for name in os.listdir(self._folder) if name.startswith("here-"))

        self._until(lambda: len(here()) >= self._count, lambda: f"{len(here())} of {self._count} hosts are here")
        self.names = here()
        if len(self.names) > self._count:
            raise Missing(f"{len(self.names)} hosts are here instead of {self._count}")
        self.rank = self.names.index(self._name)

    def _seen(self) -> Finding:
        """How long until a name that one host renamed is seen by another one: half of a way there and back."""
        taken = []
        for turn in range(_ROUNDS):
            begun = time.perf_counter()
            if self.rank == 0:
                self._write(f"ping-{turn}")
            self._wait_for(f"ping-{turn}", 0)
            self._all(f"pong-{turn}")
            taken.append((time.perf_counter() - begun) / 2)
        seconds = statistics.median(taken)
        hint = ": every commit waits for some of these; mount it without attribute caching (NFS: noac, or actimeo=1)"
        return Finding(
            "renames seen", NOTE if seconds > _SLOW else GOOD, f"after {seconds:.3f} s{hint if seconds > _SLOW else ''}"
        )

    def _read(self) -> Finding:
        """Is what one host has written and synced what the others read, once its name is there?"""
        data = secrets.token_bytes(1 << 20)
        self._write(f"data-{self.rank}", data)
        self._write(f"sum-{self.rank}", str(zlib.crc32(data)).encode())
        wrong = []
        for other in range(self._count):
            self._wait_for(f"sum-{other}", other)
            self._wait_for(f"data-{other}", other)
            if str(zlib.crc32(self._content(f"data-{other}"))).encode() != self._content(f"sum-{other}"):
                wrong.append(self.names[other])
        self._all("read")
        if wrong:
            return Finding(
                "data seen", WRONG, f"what {', '.join(wrong)} wrote is read otherwise here: ranks cannot share this store"
            )
        return Finding("data seen", GOOD, "as it was written")

    def _locks(self) -> Finding:
        """Which kinds of locks, held by the first host, keep the others out: else a process of an earlier life may write beside
        a new one."""
        kept = [kind for kind in lock.KINDS if self._keeps_out(kind)]
        if not kept:
            return Finding("locks across hosts", WRONG, "none keeps another host out: two jobs could write to one store")
        if kept[0] != next(iter(lock.KINDS)):
            return Finding("locks across hosts", NOTE, f"only {', '.join(kept)}")
        return Finding("locks across hosts", GOOD, ", ".join(kept))

    def _keeps_out(self, kind: str) -> bool:
        path = os.path.join(self._folder, f"lock-{kind}")
        if self.rank == 0:
            self._write(f"lock-{kind}")
        self._wait_for(f"lock-{kind}", 0)
        fd = os.open(path, os.O_RDWR)
        try:
            if self.rank == 0:
                self._take(kind, fd)
                self._write(f"held-{kind}")
            else:
                self._wait_for(f"held-{kind}", 0)
                self._write(f"got-{kind}-{self.rank}", b"yes" if self._take(kind, fd) else b"no")
            for other in range(1, self._count):
                self._wait_for(f"got-{kind}-{other}", other)
            return all(self._content(f"got-{kind}-{other}") == b"no" for other in range(1, self._count))
        finally:
            os.close(fd)

    def _take(self, kind: str, fd: int) -> bool:
        try:
            lock.KINDS[kind](fd)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)  # a kind that works here not at all keeps nobody out
        return True

    # ---- the meeting ----

    def _write(self, name: str, data: bytes = b"") -> None:
        """A file that appears with its content, as all that ranks tell each other by files does."""
        path = os.path.join(self._folder, name)
        with open(f"{path}.{self._name}.tmp", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(file.name, path)

    def _content(self, name: str) -> bytes:
        with open(os.path.join(self._folder, name), "rb") as file:
            return file.read()

    def _wait_for(self, name: str, whose: int) -> None:
        self._until(lambda: os.path.exists(os.path.join(self._folder, name)), lambda: f"{self.names[whose]} does not answer")

    def _all(self, what: str) -> None:
        """Come to this together."""
        self._write(f"{what}-{self.rank}")
        self._wait_for_all(what)

    def _wait_for_all(self, what: str) -> None:
        for other in range(self._count):
            self._wait_for(f"{what}-{other}", other)

    def _until(self, ready: Callable[[], bool], why: Callable[[], str]) -> None:
        ended = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > ended:
                raise Missing(f"{why()}, {PATIENCE:.0f} s later")
            time.sleep(_LOOK)
