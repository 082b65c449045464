"""The thread that sends this rank's checkpoints to the rank that keeps them: one at a time, and of those that wait the newest."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxckpt.errors import FxckptError, NoCheckpoint
from fxckpt.ranks.choice import Key
from fxckpt.ranks.replication.transfer import give
from fxckpt.ranks.replication.wire import Line
from fxckpt.store.reader import Reader

log: logging.Logger = logging.getLogger("fxckpt")

Done = Callable[[Key, bool], None]
"""Told what became of one: is it durable there?"""


@dataclass
class Tally:
    """What became of this rank's replicas, for ``opt.ckpt.statistics()``. ``last``: the newest step that is durable there."""

    sent: int = 0
    failed: int = 0
    last: int | None = None

    def counts(self) -> tuple[int, int, int | None]:
        """All three."""
        return self.sent, self.failed, self.last


@dataclass(frozen=True)
class _Job:
    """One checkpoint to be sent; see ``Sender.send``."""

    key: Key
    held: Sequence[Key]
    done: Done


class Sender:
    """To one ``keeper``, a rank. ``connect``: to it, its proofs done; ``find``: where a checkpoint of this rank lies."""

    def __init__(self, keeper: int, connect: Callable[[int], Line], find: Callable[[Key], str | None]):
        self.keeper: int = keeper
        self.tally: Tally = Tally()
        self._connect, self._find = connect, find
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._line: Line | None = None  # that of what is under way
        self._ended = self._failing = False
        self._thread = threading.Thread(target=self._run, name="fxckpt-sender", daemon=True)

    def start(self) -> None:
        """Send from now on what is given to it."""
        self._thread.start()

    def send(self, key: Key, held: Sequence[Key], done: Done) -> None:
        """This checkpoint next, in place of any that waits. ``held``: which replicas are not to be given up for it."""
        self._jobs.put(_Job(key, held, done))

    def close(self) -> None:
        """No more; what is under way ends half done."""
        self._ended = True
        self._jobs.put(None)
        if (line := self._line) is not None:
            line.cut()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            while not self._jobs.empty():
                newer = self._jobs.get()
                if newer is None:
                    return
                job = newer
            good = self._send(job)
            if not self._ended:
                job.done(job.key, good)

    def _send(self, job: _Job) -> bool:
        """Is it durable there now? Says the first failure of several in a row, and their end."""
        try:
            if (path := self._find(job.key)) is None:
                raise NoCheckpoint("it was given up meanwhile")
            reader = Reader(path)
            with self._connect(self.keeper) as line:
                self._line = line
                line.say({"op": "put"})
                give(line, reader, job.held)
        except (FxckptError, OSError) as error:
            if not self._ended:
                self.tally.failed += 1
                if not self._failing:
                    log.warning(
                        "fxckpt: step %d has no replica with rank %d: %s. Unless the job is ending: checkpoints go on, and later "
                        "ones are sent again", job.key[0], self.keeper, error,
                    )  # fmt: skip
                self._failing = True
            return False
        finally:
            self._line = None
        self.tally.sent += 1
        self.tally.last = job.key[0]
        if self._failing:
            log.warning("fxckpt: replicas lie with rank %d again, from step %d on", self.keeper, job.key[0])
        self._failing = False
        return True
