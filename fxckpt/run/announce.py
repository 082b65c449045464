"""What is said once of how a run's steps run, and of the memory they take."""

from __future__ import annotations

import logging
from typing import Any

from fxckpt.run.arrangement import Arrangement
from fxckpt.run.emitting import Emitter

log: logging.Logger = logging.getLogger("fxckpt")


class Announcer:
    """Says what runs a step, once for each way it runs, and what snapshots may take."""

    def __init__(self, arrangement: Arrangement, emitter: Emitter, max_async: int):
        self._arrangement, self._emitter, self._max_async = arrangement, emitter, max_async
        self._described: list[tuple[int, str]] = []  # the bindings that were described last
        self._said: set[str] = set()

    def announce(self) -> None:
        """Say what was not said yet."""
        steppers = self._arrangement.steppers
        bound = [(s.bound, s.describe()) for s in steppers]
        self._arrangement.unsaid = False
        if bound == self._described:
            return
        if not self._described and (size := sum(t.nbytes for t in self._arrangement.inventory.buffers.values())) >> 20:
            self._say(f"snapshots of the model's buffers take at most {size * self._max_async >> 20} MiB more")
        self._described = bound
        for i, (_, line) in enumerate(bound):
            if line:
                self._say(line, of=i)
        moved = [t for s in steppers for _, ts in s.handed_over() for t in ts if self._is_moved(t)]
        if size := sum(t.nbytes for t in moved) * self._max_async:
            self._say(
                "tensors that are not in row-major order are copied on their device first, which takes at most "
                f"{size / 2**20:.1f} MiB there"
            )

    def _is_moved(self, tensor: Any) -> bool:
        return self._emitter.is_remote(tensor) and not tensor.is_contiguous()

    def _say(self, line: str, of: int = -1) -> None:
        """``of``: the number of the optimizer that it is about; two of one class are two lines."""
        if (key := f"{of} {line}") not in self._said:
            self._said.add(key)
            log.info("fxckpt: %s", line)
