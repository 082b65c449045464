"""What became of a run's checkpoints: counted, and failures reported once."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

log: logging.Logger = logging.getLogger("fxckpt")


@dataclass
class Tally:
    """The counters of ``opt.ckpt.statistics()``, and the first failure that nobody was told of. Steps, seconds."""

    started: int = 0
    committed: int = 0
    skipped: int = 0
    failed: int = 0
    last_handed_over: int | None = None
    last_committed: int | None = None
    last_error: BaseException | None = None
    unreported: BaseException | None = None
    wait_seconds: float = 0.0

    def note_failure(self, step: int, error: BaseException) -> None:
        """A checkpoint failed: say so at once, count it, keep it for ``raise_unreported``."""
        self.failed += 1
        self.last_error = error
        self.unreported = self.unreported or error
        log.error("fxckpt: the checkpoint of step %d failed: %s", step, error)

    def raise_unreported(self) -> None:
        """Raise the first failure that nobody has been told of."""
        error, self.unreported = self.unreported, None
        if error is not None:
            raise error

    def forget(self, error: BaseException) -> None:
        """This failure was raised already."""
        if self.unreported is error:
            self.unreported = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the training thread waits for."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.wait_seconds += time.perf_counter() - started
