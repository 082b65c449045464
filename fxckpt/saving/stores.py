"""What a run asks of a store, and the store that writes nothing.

``writer="thread"`` has ``fxckpt.store.slots.Store``, ``"monitor"`` has ``fxckpt.monitor.client.MonitorStore``, ``"mock"`` the
``NullStore`` of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Protocol

from fxckpt.engine import io
from fxckpt.engine.plan import FileId
from fxckpt.store.commit_loop import OwnSlot
from fxckpt.store.dtypes import Tensor
from fxckpt.store.layout import FileLayout
from fxckpt.store.record import Record


class CheckpointSlot(Protocol):
    """A directory that one checkpoint is written in."""

    @property
    def path(self) -> str:
        """Where it is now; empty if nothing is written."""

    @property
    def generation(self) -> int | None:
        """Of the checkpoint, once it is committed; None where nothing is."""

    @property
    def error(self) -> Exception | None:
        """What ended it in the process that writes, if that is another one."""

    @property
    def below(self) -> int:
        """The descriptor of its directory, for ``Engine.begin``; ``io.CWD`` where this process opens no files of it."""

    def was_replaced(self) -> bool:
        """Does its name lead to another directory than the one that was acquired, as far as this process knows?"""

    def recall(self, token: Hashable) -> Mapping[str, Mapping[int, int]]:
        """What its files hold already, ``{file: {chunk: digest}}``, as remembered with an equal token."""

    def waited(self, file: str) -> FileId | None:
        """Which file that was true of; None: this process need not know."""

    def opened(self, inodes: Mapping[str, int]) -> None:
        """The engine wrote to these files (0: it opened none)."""

    def remember(self, token: Hashable, chunks: Mapping[str, Mapping[int, int]], chunk_bytes: int) -> None:
        """Note what was just written."""

    def ended(self, timeout: float) -> bool:
        """Wait until what was handed to ``commit`` is a checkpoint; False after ``timeout`` seconds. Raises why it failed."""


class CheckpointStore(Protocol):
    """Gives slots out and makes them checkpoints. ``hands_over``: another process does so, and a checkpoint is safe from the end
    of this one once ``commit`` returned. ``part``: which of how many ranks writes through it, each a part of every checkpoint."""

    root: str
    hands_over: bool
    part: tuple[int, int]

    def open(self) -> None:
        """Take the directory, until ``close``. Raises NotAStore, StoreLocked."""

    def close(self) -> None: ...

    def require_loaded(self) -> None:
        """Raise StoreNotLoaded if there are checkpoints that nobody loaded."""

    def mark_loaded(self, generation: int | None) -> None:
        """What comes next continues this checkpoint; None: there was none."""

    def hold(self, generations: Collection[int]) -> Collection[int]:
        """Keep these checkpoints, and those of the last call no longer; returns those that are there."""

    def reserve(self, files: Mapping[str, int], journal: bool = False) -> None:
        """Set space aside for these files (name: bytes) of all slots; of records of the ``journal`` see whether there is enough.
        Raises NoSpace, SaveFailed."""

    def acquire(self, name: str | None = None, journal: bool = False) -> CheckpointSlot:
        """A slot for the next checkpoint, or record of the ``journal``; ``name`` makes it a named save. Raises StoreError,
        SaveFailed, SetupError."""

    def reclaim(self, known: Collection[OwnSlot]) -> None:
        """Take back every slot that was acquired and is none of these; nobody else may be acquiring one."""

    def begin(self, slot: OwnSlot, checkpoint: int, files: Sequence[FileLayout], step: int) -> None:
        """The engine has begun the checkpoint of this ``id``, which goes into the slot."""

    def not_begun(self, step: int, name: str | None, why: str) -> Callable[[], None] | None:
        """A checkpoint could not be begun (``why``; empty: it was interrupted). Returns what tells others who write it, too."""

    def missing(self, slot: OwnSlot, timeout: float) -> Sequence[int]:
        """Those ranks, if any, whose parts are to be committed with this one and are not there after ``timeout`` seconds. Raises
        Cancelled or RanksDisagree if one of them gave it up."""

    def commit(self, slot: OwnSlot, record: Record, state_tensors: Mapping[str, Tensor]) -> object:
        """Make the slot, whose files are durable, a checkpoint, which it is when the slot has ``ended``. ``record``: what the
        run says of it."""

    def abandon(self, slot: OwnSlot, *, bad: bool, why: str = "") -> None:
        """Take a slot back; ``bad``: what it holds is in doubt. ``why``: what its checkpoint failed of; empty: it was dropped."""

    def read_back(self, busy: Callable[[], bool]) -> tuple[int, Exception | None] | None:
        """Read what is due of what was committed, unless ``busy``: the step of what does not verify, and why. No reason is given
        where somebody took its files: that is no failure, but nothing is to build on it."""


class NullSlot:
    """A slot of the ``NullStore``: no directory, and nothing that it could hold."""

    path = ""
    below = io.CWD
    generation = error = None

    def was_replaced(self) -> bool:
        return False

    def recall(self, token: Hashable) -> Mapping[str, Mapping[int, int]]:
        return {}

    def waited(self, file: str) -> None:
        return None

    def ended(self, timeout: float) -> bool:
        return True

    def opened(self, inodes: Mapping[str, int]) -> None: ...
    def remember(self, token: Hashable, chunks: Mapping[str, Mapping[int, int]], chunk_bytes: int) -> None: ...


class NullStore:
    """A store that writes nothing: for ``writer="mock"``, and where fxckpt is turned off."""

    root = ""
    hands_over = False
    part = (0, 1)

    def acquire(self, name: str | None = None, journal: bool = False) -> NullSlot:
        return NullSlot()

    def hold(self, generations: Collection[int]) -> Collection[int]:
        return ()

    def open(self) -> None: ...
    def close(self) -> None: ...
    def require_loaded(self) -> None: ...
    def reclaim(self, known: Collection[NullSlot]) -> None: ...
    def mark_loaded(self, generation: int | None) -> None: ...
    def reserve(self, files: Mapping[str, int], journal: bool = False) -> None: ...
    def read_back(self, busy: Callable[[], bool]) -> None: ...
    def begin(self, slot: NullSlot, checkpoint: int, files: Sequence[FileLayout], step: int) -> None: ...
    def not_begun(self, step: int, name: str | None, why: str) -> None: ...
    def missing(self, slot: NullSlot, timeout: float) -> Sequence[int]:
        return ()

    def commit(self, slot: NullSlot, record: Record, state_tensors: Mapping[str, Tensor]) -> None: ...
    def abandon(self, slot: NullSlot, *, bad: bool, why: str = "") -> None: ...
