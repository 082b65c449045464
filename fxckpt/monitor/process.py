"""The monitor process. Three threads, none of which ever waits for the trainer to do something:

    feeder (main)   gives posted slots to the engine; watches the trainer's pidfd
    clerk           reads the socket: slots of the store, records of checkpoints that were handed over
    committer       waits until a handed-over checkpoint is durable, and commits it; in order

The trainer's end, however it comes, is the end of the socket's stream: what was handed over until then is committed, the
rest is dropped, and the process exits. A forked data loader's worker may hold the socket open after the trainer's death, so
that is learned from the pidfd.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Sequence

from fxckpt.engine.ring import Ring
from fxckpt.monitor.clerk import Clerk

log: logging.Logger = logging.getLogger("fxckpt")

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Sent to whole groups and sessions to end the trainer; the monitor ends by itself right after it."""


def feed(control: socket.socket, ring: Ring, trainer: int) -> None:
    """Work until the trainer is gone and everything that it handed over is committed."""
    wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    clerk = Clerk(control, ring, lambda: os.eventfd_write(wake, 1))
    reader = threading.Thread(target=clerk.read, name="fxckpt-clerk")
    reader.start()
    poll = select.poll()
    for fd in (ring.posted, trainer, wake):
        poll.register(fd, select.POLLIN)
    while not clerk.over:
        for fd, _ in poll.poll():
            if fd != trainer:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                continue
            poll.unregister(fd)
            clerk.stop()
            if clerk.checkpoints is not None:
                clerk.checkpoints.note_finishing()
        if clerk.checkpoints is not None:
            clerk.checkpoints.feed(clerk.over)
    reader.join()
    if clerk.checkpoints is not None:
        clerk.checkpoints.note_finishing()
        clerk.checkpoints.feed(True)
        clerk.checkpoints.finish()


def main(arguments: Sequence[str]) -> int:
    """Descriptors: the socket, the shared memory, its two eventfds, the trainer's pidfd."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="fxckpt monitor: %(message)s")
    control, memory, posted, freed, trainer = map(int, arguments)
    for fd in (control, memory, posted, freed, trainer):
        os.set_inheritable(fd, False)
    ring = Ring.inherit(memory, posted, freed)
    threading.excepthook = lambda args: _end_at_once(args.exc_value)
    try:
        feed(socket.socket(fileno=control), ring, trainer)
    except BaseException as error:
        _end_at_once(error)
    return 0


def _end_at_once(error: BaseException | None) -> None:
    """A thread that fails here is a defect: end the process, which the trainer notices, rather than hang."""
    log.critical("the monitor failed and ends", exc_info=error)
    os._exit(1)
