"""Says what runs each optimizer's step, once for each way it runs, and how much memory snapshots may take."""

from __future__ import annotations

import logging

from fxckpt.run.arrangement import Arrangement

log: logging.Logger = logging.getLogger("fxckpt")


class Announcer:
    """Of one run."""

    def __init__(self, arrangement: Arrangement, max_async: int):
        self._arrangement, self._max_async = arrangement, max_async
        self._described: list[tuple[int, str]] = []  # the bindings that were described last
        self._said: set[str] = set()

    def announce(self) -> None:
        """Say what was not said yet."""
        steppers = self._arrangement.steppers
        bound = [(s.bindings.number, s.describe()) for s in steppers]
        self._arrangement.unsaid = False
        if bound == self._described:
            return
        if not self._described and (size := sum(t.nbytes for t in self._arrangement.inventory.buffers.values())) >> 20:
            self._say(f"snapshots of the model's buffers take at most {size * self._max_async >> 20} MiB more")
        self._described = bound
        for i, (_, line) in enumerate(bound):
            if line:
                self._say(line, of=i)
        tensors = [t for s in steppers for _, ts in s.executor.arranged.handed_over for t in ts]
        remote = self._arrangement.emitter.is_remote
        if size := sum(t.nbytes for t in tensors if remote(t) and not t.is_contiguous()) * self._max_async:
            what = "tensors that are not in row-major order are copied on their device first"
            self._say(f"{what}, which takes at most {size / 2**20:.1f} MiB there")

    def _say(self, line: str, of: int = -1) -> None:
        """``of``: the number of the optimizer that it is about; two of one class are two lines."""
        if (key := f"{of} {line}") not in self._said:
            self._said.add(key)
            log.info("fxckpt: %s", line)
