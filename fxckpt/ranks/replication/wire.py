"""One connection between two ranks: who is there is proved first; then come small JSON objects, and bytes as many as they say.

Both sides prove that they know the job's secret, which itself is never sent. No size that the other side names is allocated:
frames and records have a limit, and files are read piece by piece.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import struct
import time
import weakref
from contextlib import suppress
from typing import Any

from fxckpt.errors import Corrupt, FxckptError
from fxckpt.ranks.replication.hosts import VARIABLE
from fxckpt.store.checks import MAX_BYTES, parse_json

SECRET = 32
"""Bytes of the secret, of each side's random number, and of the proofs."""

GREETING, IDLE, ANSWER = 10.0, 60.0, 600.0
"""Seconds for a connection and its proofs; for the next bytes to come or go; for an answer, before which a whole checkpoint may
be read or synced."""

SLOWEST = 1 << 20
"""Bytes a second that a connection has to carry at least, beside ``IDLE``."""

_FRAME = 1 << 16  # bytes of JSON at most
_HEAD = struct.Struct("<I")
_CLIENT, _SERVER = b"fxckpt replica client", b"fxckpt replica server"


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""Of this process; a forked child closes its copies: it would keep connections open when this process is gone."""


def not_in_children(sock: socket.socket) -> socket.socket:
    """The same socket, which a child that is forked from now on closes."""
    _sockets.add(sock)
    return sock


def _in_child() -> None:
    for sock in list(_sockets):
        sock.close()


os.register_at_fork(after_in_child=_in_child)


class Lost(FxckptError):
    """The connection ended, is too slow, or brings something else than it should."""


class Refused(FxckptError):
    """The other side does not do what it was asked for, and says why."""


class Line:
    """A connection, from either end, in a ``with`` block."""

    def __init__(self, sock: socket.socket):
        self._sock = not_in_children(sock)
        self._deadline = float("inf")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def cut(self) -> None:
        """End it under the hands of the thread that uses it, which then closes it."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it. Idempotent."""
        self.cut()
        self._sock.close()

    # ---- who is there ----

    def prove(self, secret: bytes) -> None:
        """As the one that has connected. Raises ``Lost`` if the other side does not know the secret, or does not believe it."""
        self._limit(GREETING, GREETING)
        its = self._bytes(SECRET)
        mine = secrets.token_bytes(SECRET)
        self._send(mine + _proof(secret, _CLIENT, its, mine))
        if not hmac.compare_digest(self._bytes(SECRET), _proof(secret, _SERVER, its, mine)):
            raise Lost("the other side does not know the job's secret")
        self.allow(0)

    def ask_for_proof(self, secret: bytes) -> None:
        """As the one that was connected to. Raises ``Lost``; who cannot prove it is told nothing."""
        self._limit(GREETING, GREETING)
        mine = secrets.token_bytes(SECRET)
        self._send(mine)
        its, proof = self._bytes(SECRET), self._bytes(SECRET)
        if not hmac.compare_digest(proof, _proof(secret, _CLIENT, mine, its)):
            raise Lost("a stranger connected, who does not know the job's secret")
        self._send(_proof(secret, _SERVER, mine, its))
        self.allow(0)

    # ---- how long it may take ----

    def allow(self, nbytes: int, idle: float = IDLE) -> None:
        """From now on so many bytes come or go, with pauses of ``idle`` seconds at most."""
        self._limit(idle, idle + nbytes / SLOWEST)

    def _limit(self, idle: float, whole: float) -> None:
        self._sock.settimeout(idle)
        self._deadline = time.monotonic() + whole

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise Lost("the other side is too slow")

    # ---- what is said ----

    def say(self, message: dict[str, Any]) -> None:
        """Send a small object. Raises ``Lost``."""
        raw = json.dumps(message).encode()
        assert len(raw) <= _FRAME, message
        self._send(_HEAD.pack(len(raw)) + raw)

    def hear(self) -> dict[str, Any]:
        """The next one. Raises ``Lost`` if it is none, ``Refused`` if it says that."""
        (nbytes,) = _HEAD.unpack(self._bytes(_HEAD.size))
        if nbytes > _FRAME:
            raise Lost(f"a message of {nbytes} bytes, more than the {_FRAME} that any has")
        try:
            found = parse_json(self._bytes(nbytes), "a message", depth=4, what="it")
        except Corrupt as error:
            raise Lost(str(error)) from error
        if type(found) is not dict:
            raise Lost("a message that is no object")
        if "refused" in found:
            raise Refused(str(found["refused"]))
        return found

    def send_record(self, raw: bytes) -> None:
        """A record, behind the message that says how large it is."""
        self.allow(len(raw))
        self._send(raw)

    def record(self, nbytes: object) -> bytes:
        """The same on the other side."""
        if type(nbytes) is not int or not 0 < nbytes <= MAX_BYTES:
            raise Lost(f"a record of {nbytes!r} bytes")
        self.allow(nbytes)
        return self._bytes(nbytes)

    # ---- bytes ----

    def send_file(self, fd: int, nbytes: int, piece: int = 16 << 20) -> None:
        """All of an open file, which has so many bytes, without copying it through this process. Raises ``Lost``."""
        with open(fd, "rb", buffering=0, closefd=False) as file:
            for at in range(0, nbytes, piece):
                self._check_time()
                count = min(piece, nbytes - at)
                try:
                    sent = self._sock.sendfile(file, at, count)
                except OSError as error:
                    raise Lost(_why(error)) from error
                if sent != count:
                    raise Lost("the file was cut while it was sent")

    def read(self, piece: memoryview) -> None:
        """Fill a buffer. Raises ``Lost``."""
        at = 0
        while at < piece.nbytes:
            self._check_time()
            try:
                got = self._sock.recv_into(piece[at:])
            except OSError as error:
                raise Lost(_why(error)) from error
            if not got:
                raise Lost("the other side hung up")
            at += got

    def _bytes(self, n: int) -> bytes:
        data = bytearray(n)
        self.read(memoryview(data))
        return bytes(data)

    def _send(self, data: bytes) -> None:
        self._check_time()
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise Lost(_why(error)) from error


def connected(host: str, port: int) -> Line:
    """A connection to who listens there. Raises ``Lost``."""
    try:
        return Line(socket.create_connection((host, port), GREETING))
    except OSError as error:
        hint = f" (set {VARIABLE} there to how other hosts reach it)" if isinstance(error, socket.gaierror) else ""
        raise Lost(f"{host}, port {port}: {_why(error)}{hint}") from error


def _proof(secret: bytes, side: bytes, server: bytes, client: bytes) -> bytes:
    """That ``side`` knows the secret: of both sides' random numbers, so that none can be used again or sent back."""
    return hmac.digest(secret, side + server + client, "sha256")


def _why(error: OSError) -> str:
    return "it does not answer in time" if isinstance(error, TimeoutError) else str(error.strerror or error)
