"""Messages between trainer and monitor: a JSON object and bytes, over a stream socket. No pickle here either.

A frame is whole or it does not exist: a process killed inside ``send`` leaves a frame that ends early, which the other
side drops.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

from fxckpt import errors

Message = dict[str, Any]
"""What JSON can say; ``op`` names a request, ``id`` a question and its answer."""

_HEAD = struct.Struct("<IQ")  # bytes of JSON, bytes behind it


def send(sock: socket.socket, message: Message, blobs: Sequence[bytes | memoryview] = ()) -> None:
    """Send one frame. Returns when all of it is the receiver's, who gets it even if this process ends now. Raises ``OSError``
    when the other side is gone."""
    text = json.dumps(message).encode()
    views = [memoryview(blob).cast("B") for blob in blobs if len(blob)]
    sock.sendall(_HEAD.pack(len(text), sum(view.nbytes for view in views)) + text)
    for view in views:
        sock.sendall(view)


def receive(sock: socket.socket) -> tuple[Message, memoryview] | None:
    """The next frame, or None when there will be no whole one any more."""
    head = _exactly(sock, _HEAD.size)
    if head is None:
        return None
    n_text, n_blob = _HEAD.unpack(head)
    text, blob = _exactly(sock, n_text), _exactly(sock, n_blob)
    if text is None or blob is None:
        return None
    return json.loads(bytes(text)), blob


def _exactly(sock: socket.socket, n: int) -> memoryview | None:
    """``n`` bytes, or None if the stream ends before."""
    data = memoryview(bytearray(n))
    at = 0
    while at < n:
        try:
            got = sock.recv_into(data[at:])
        except ConnectionResetError:  # the other side ended without reading all that we sent
            got = 0
        if not got:
            return None
        at += got
    return data


def pack_error(error: BaseException) -> Message:
    """An exception as JSON."""
    fields: Message = {"class": type(error).__name__, "text": str(error)}
    if isinstance(error, errors.SaveFailed):
        fields |= {"save": [error.operation, error.path, error.offset, error.errno], "detail": error.detail}
    elif isinstance(error, OSError) and error.errno is not None:
        name = error.filename
        fields |= {"os": [error.errno, error.strerror, name if isinstance(name, str) else None]}
    elif isinstance(error, errors.StoreLocked):
        fields |= {"monitor": error.monitor}
    return fields


def unpack_error(fields: Message) -> Exception:
    """The exception that :func:`pack_error` was given, of its own class where that is one of ours or an ``OSError``."""
    if "save" in fields:
        operation, path, offset, number = fields["save"]
        return errors.SaveFailed(operation, path, offset, number, fields["detail"])
    if "os" in fields:
        return OSError(*fields["os"])
    known = getattr(errors, fields["class"], None)
    if not (isinstance(known, type) and issubclass(known, errors.FxckptError)) or known is errors.Corrupt:
        return errors.FxckptError(f"{fields['class']}: {fields['text']}")
    error = known(fields["text"])
    if isinstance(error, errors.StoreLocked):
        error.monitor = fields["monitor"]
    return error
