"""Where the next checkpoint is written: space set aside for it, and a slot got ready before it begins."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterator

from fxckpt.errors import FxckptError, NoSpace, SaveFailed
from fxckpt.saving.in_flight import InFlight
from fxckpt.saving.plan import Layout
from fxckpt.saving.stores import CheckpointSlot, CheckpointStore
from fxckpt.store.commit_loop import CommitLoop

log: logging.Logger = logging.getLogger("fxckpt")


class SlotSupply:
    """Asks the store for slots. ``ready`` is one that the committer has prepared: training need not wait for its syncs."""

    def __init__(self, store: CheckpointStore):
        self.ready: CheckpointSlot | None = None
        self._store = store
        # Held while the store is asked for a slot and until that slot's checkpoint is in flight: the store counts what it hands
        # out, and refuses more than max_async.
        self._lock = threading.Lock()
        self._reserved: dict[str, int] | None = None  # what the store has set space aside for

    @contextlib.contextmanager
    def held(self, loop: CommitLoop[InFlight]) -> Iterator[None]:
        """Around the beginning of a checkpoint. Raises SaveFailed if the loop's thread hangs while it prepares a slot."""
        if not self._lock.acquire(timeout=2 * loop.stuck_after):
            raise SaveFailed("wait", self._store.root, detail=f"the disk hangs: getting a slot ready{loop.operation()}")
        try:
            yield
        finally:
            self._lock.release()

    def take(self, layout: Layout, name: str | None) -> CheckpointSlot:
        """The slot that was prepared, or a new one, with space for these files; it is ``held``."""
        self._reserve(layout)
        slot, self.ready = self.ready, None
        if slot is not None and slot.error is None:  # else it went with its monitor
            if name is None:
                return slot
            self._store.abandon(slot, bad=False)
        return self._store.acquire(name)

    def _reserve(self, layout: Layout) -> None:
        """Have disk space set aside, at the first checkpoint and when the files' sizes changed. Raises NoSpace at the
        first one: a run that does not fit is a wrong setup. Later it is a failed save."""
        files = {file.name: file.nbytes for file in layout.files}
        if files == self._reserved:
            return
        try:
            self._store.reserve(files)
        except NoSpace as error:
            if self._reserved is None:
                raise
            raise SaveFailed("fallocate", self._store.root, None, errno.ENOSPC, str(error)) from error
        self._reserved = files

    def prepare(self, wanted: Callable[[], bool]) -> None:
        """Get the next slot ready now, on the thread that commits."""
        with self._lock:
            if self.ready is not None or not wanted():
                return
            try:
                self.ready = self._store.acquire()
            except (OSError, FxckptError) as error:
                log.debug("no slot prepared: %s", error)  # begin() asks again, and fails the checkpoint if it must
