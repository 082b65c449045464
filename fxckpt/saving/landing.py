"""What became of a checkpoint, for records of the journal that build on it; and what such a record says beside its bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxckpt.errors import Cancelled
from fxckpt.saving.digesting import Digesting
from fxckpt.store.record import Journal


@dataclass(eq=False)
class Landing:
    """Of one checkpoint or record: its ``generation`` once it is committed (None where nothing is written), or ``failed``, and
    whether that was because the ranks that write it together did not take it in one way (``unlike``); the bytes of its tensors'
    files, and the seconds from its step until it was durable (0 until then)."""

    generation: int | None = None
    failed: bool = False
    unlike: bool = False
    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Waiting:
    """The gradients of a layer that was updated before its record began; ``copied``: they are this record's own."""

    tensors: Sequence[torch.Tensor]
    copied: bool = False


@dataclass(eq=False)
class Link:
    """What makes a checkpoint in flight a record of the journal. ``order``: the optimizers whose steps it holds, ``groups`` the
    settings of each of these. ``tensors`` go into the file of the extra state; ``waiting`` are gradients of steps before the last
    one, by layer; ``watched`` is the layer that is digested behind its update: its number and name. Of steps on a ``device`` its
    bytes come later (``digesting``), and ``refused`` says, and may wait for the device, why none of them is to be relied on."""

    base: Landing
    after: Landing
    number: int
    update: str | None
    groups: Any
    machine: str
    threads: int
    order: tuple[int, ...]
    strides: dict[str, list[int]] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    waiting: dict[int, Waiting] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)
    watched: tuple[int, str] | None = None
    device: str | None = None
    digesting: tuple[str, Digesting] | None = None
    failure: Exception | None = None  # what the digest could not be begun of
    refused: Callable[[], str | None] = lambda: None

    def check(self) -> None:
        """Raises Cancelled where what it builds on was not committed: nobody could load it. Raises what went wrong with it."""
        if self.base.failed or self.after.failed:
            raise Cancelled("what this record of the journal builds on was not committed")
        if self.failure is not None:
            raise self.failure

    def copied(self, timeout: float) -> bool:
        """Wait until what is digested has come, too; False after ``timeout`` seconds. Raises SaveFailed, Cancelled."""
        return self.digesting is None or self.digesting[1].copied(timeout)

    def take_digest(self) -> None:
        """It has come: note the digest, if the layer is as its step left it, or was when a later step came."""
        if self.digesting is not None and (found := self.digesting[1].result()) is not None:
            self.digests[self.digesting[0]] = found

    def let_go(self, numbers: Collection[int]) -> None:
        """A step is about to change these layers."""
        if self.digesting is not None and self.digesting[1].number in numbers:
            self.digesting[1].let_go()

    def cancel(self) -> None:
        """The record is given up."""
        if self.digesting is not None:
            self.digesting[1].cancel()

    def release(self) -> None:
        """Free the engine's side."""
        if self.digesting is not None:
            self.digesting[1].release()

    def record(self) -> Journal:
        """For the record, once what it builds on is committed. Raises Cancelled where its steps cannot be relied on."""
        if (why := self.refused()) is not None:
            raise Cancelled(why)
        base, after = self.base.generation or 0, self.after.generation or 0
        made = self.digests, self.machine, self.threads, self.order, self.device
        return Journal(base, after, self.number, self.update, self.groups, self.strides, *made)
