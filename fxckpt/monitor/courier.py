"""The thread that sends a trainer's frames to its monitor: one that Ctrl-C cannot leave half sent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from fxckpt.engine import Latch
from fxckpt.monitor import wire


class Frame:
    """One frame on its way: ``sent`` when it was, or could not be, because of ``error``."""

    def __init__(self, message: wire.Message, blobs: Sequence[bytes | memoryview]):
        self.message: wire.Message = message
        self.blobs: Sequence[bytes | memoryview] = blobs
        self.sent: Latch = Latch()
        self.error: OSError | None = None


class Courier:
    """Sends frames in the order in which they are given to it. A handler of a signal runs in the main thread, and may raise in
    the middle of what is sent there; behind half a frame nothing can follow. ``stuck`` is called where one remained half sent.
    """

    def __init__(self, control: socket.socket, stuck: Callable[[], None]):
        self._control, self._stuck = control, stuck
        self._frames: SimpleQueue[Frame | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fxckpt-courier", daemon=True)
        self._thread.start()

    def take(self, message: wire.Message, blobs: Sequence[bytes | memoryview]) -> Frame:
        """It goes behind all others, whatever becomes of the caller."""
        frame = Frame(message, blobs)
        self._frames.put(frame)
        return frame

    def end(self) -> None:
        """Nothing can be sent any more: every frame that is left, and that comes yet, fails."""
        self._frames.put(None)

    def alive(self) -> bool:
        """Is there anybody who sends?"""
        return self._thread.is_alive()

    def _run(self) -> None:
        while (frame := self._frames.get()) is not None:
            try:
                wire.send(self._control, frame.message, frame.blobs)
            except OSError as error:
                frame.error = error
                if isinstance(error, BlockingIOError):
                    self._stuck()
            frame.sent.set()
            del frame  # what it holds goes
