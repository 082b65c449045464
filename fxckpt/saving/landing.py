"""What became of a checkpoint, for records of the journal that build on it; and what such a record says beside its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxckpt.errors import Cancelled
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
    one, by layer; ``watched`` is the layer that is digested behind its update: its number, name and tensors."""

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
    watched: tuple[int, str, Sequence[torch.Tensor]] | None = None

    def check(self) -> None:
        """Raises Cancelled where what it builds on was not committed: nobody could load it."""
        if self.base.failed or self.after.failed:
            raise Cancelled("what this record of the journal builds on was not committed")

    def record(self) -> Journal:
        """For the record, once what it builds on is committed."""
        base, after = self.base.generation or 0, self.after.generation or 0
        made = self.digests, self.machine, self.threads, self.order
        return Journal(base, after, self.number, self.update, self.groups, self.strides, *made)
