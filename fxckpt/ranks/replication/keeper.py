"""Takes in other ranks' checkpoints that are sent to this one, and gives out what lies here: threads that listen and answer."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fxckpt.errors import Corrupt, FxckptError, NoCheckpoint
from fxckpt.ranks.choice import Key
from fxckpt.ranks.replication.hosts import LOOPBACK
from fxckpt.ranks.replication.transfer import give, key_in, rank_of, take
from fxckpt.ranks.replication.wire import Line, Lost, Refused, not_in_children
from fxckpt.store.reader import Reader
from fxckpt.store.replica_folder import ReplicaFolder

log: logging.Logger = logging.getLogger("fxckpt")

MOST = 64
"""Connections at a time. A rank has one, but at a load many may ask for what lies here."""

Find = Callable[[int, Key], "str | None"]
"""Where this disk has a rank's checkpoint, its own or a replica."""


class Keeper:
    """Listens on ``port``, from ``start`` to ``close``, for ranks that know the ``secret``. ``alone``: they are all on this host,
    and nobody else can connect."""

    def __init__(self, folder: ReplicaFolder, find: Find, alone: bool):
        self._folder, self._find, self._secret = folder, find, b""
        self._listener = not_in_children(socket.create_server((LOOPBACK, 0)) if alone else _everywhere())
        self._over = False
        self.port: int = self._listener.getsockname()[1]
        self._lines: set[Line] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="fxckpt-replicas", daemon=True)

    def start(self, secret: bytes) -> None:
        """Answer from now on."""
        self._secret = secret
        self._thread.start()

    def close(self) -> None:
        """No more, and what is under way ends. Idempotent."""
        self._over = True
        with suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            line.cut()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _listen(self) -> None:
        while not self._over:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._over:  # too many open files, for a while
                    log.warning("fxckpt: a replica cannot be taken in: %s", error)
                    time.sleep(1.0)
                continue
            with suppress(OSError):  # it is gone already
                line = Line(sock)
                with self._lock:
                    welcome = len(self._lines) < MOST
                    self._lines |= {line} if welcome else set()
                if welcome:
                    threading.Thread(target=self._serve, args=(line,), name="fxckpt-replica", daemon=True).start()
                else:
                    line.close()

    def _serve(self, line: Line) -> None:
        """One request. Whatever is wrong with it is this connection's end, and no more."""
        try:
            line.ask_for_proof(self._secret)
            self._answer(line)
        except Corrupt as error:
            log.error("fxckpt: a replica is not taken in: %s", error)
        except (FxckptError, OSError) as error:  # what the other side was told, it says
            log.info("fxckpt: a replica's transfer ended: %s", error)
        finally:
            line.close()
            with self._lock:
                self._lines.discard(line)

    def _answer(self, line: Line) -> None:
        line.allow(0)
        said = line.hear()
        if said.get("op") == "put":
            take(line, self._folder)
            return
        if said.get("op") != "get":
            raise Lost(f"it asks for {str(said.get('op'))[:40]!r}")
        rank, key = rank_of(said), key_in(said.get("key"))
        try:
            path = self._find(rank, key)
            if path is None:
                raise NoCheckpoint(f"no checkpoint of rank {rank}, step {key[0]}, lies here")
            reader = Reader(path)
        except (Corrupt, NoCheckpoint) as error:
            line.say({"refused": str(error)[:1000]})
            return
        line.say({"answer": "found"})
        with suppress(Refused):  # the other side says what it does not take
            give(line, reader)


def _everywhere() -> socket.socket:
    """Listens on every address of this machine, of whichever kinds it has."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
