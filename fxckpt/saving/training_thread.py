"""The thread that trains, as the thread that commits sees it: TrainingThread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

LONGEST, SLOWEST = 0.02, 1e9
"""An operation on a tensor has ended after so many seconds, and one more for each ``SLOWEST`` bytes, where nothing says that
it has."""


class TrainingThread:
    """Which thread trains, and whether it came by: ``progress_ticks`` counts how often it did so, between two operations."""

    def __init__(self) -> None:
        self.thread: threading.Thread = threading.current_thread()  # that of the last step
        self.progress_ticks = 0
        self._inside = 0  # it waits in our code

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait of whatever thread."""
        trains = threading.current_thread() is self.thread
        self._inside += trains
        try:
            yield
        finally:
            self._inside -= trains

    def let_come_by(self, nbytes: int) -> None:
        """Wait until no operation in place that began before can be under way: it counts itself in the tensor's version when it
        ends. ``nbytes``: the largest tensor's."""
        ended, before = time.monotonic() + LONGEST + nbytes / SLOWEST, self.progress_ticks
        while self.progress_ticks == before and not self._inside and time.monotonic() < ended:
            time.sleep(0.001)
