"""A second thread for calls that keep one core busy each.

PyTorch's kernels use all cores for a large tensor and one for a small one, and let go of the GIL either way. So the
updates of many small tensors run on two threads at once, with the very calls, and the bits, of one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from fxckpt.compat.threads import one_core
from fxckpt.engine import _lib

Call = Callable[[Any], None]


class HelperThread:
    """Takes calls from the same pile as its caller. It starts with the first pile, and again in a forked child."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._piles: SimpleQueue[_Pile] = SimpleQueue()

    def run(self, calls: Sequence[Call], values: Any) -> None:
        """Make all calls, each with ``values`` and without gradients, in no order; raises what one of them raised.

        Returns, or raises, only when no call runs any more.
        """
        if self._thread is None or not self._thread.is_alive():
            self._piles = SimpleQueue()
            self._thread = threading.Thread(target=_help, args=(self._piles,), name="fxckpt-update", daemon=True)
            self._thread.start()
        pile = _Pile(calls, values)
        self._piles.put(pile)
        try:
            pile.work()
        finally:
            failed = pile.wait()
        if failed is not None:
            raise failed


class _Pile:
    """Calls that two threads take from; ``deque.popleft`` gives each to one of them."""

    def __init__(self, calls: Sequence[Call], values: Any):
        self.left, self.values = deque(calls), values
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()
        ffi, lib = _lib.load()
        self.float_mode = ffi.new("char[]", lib.FX_FLOAT_MODE)
        lib.fx_float_mode(self.float_mode)

    def work(self) -> None:
        """Take calls until none is left; after an error in one of them nobody takes another."""
        try:
            with one_core():
                while True:
                    try:
                        call = self.left.popleft()
                    except IndexError:
                        return
                    call(self.values)
        except BaseException:
            self.left.clear()
            raise

    def wait(self) -> BaseException | None:
        """Wait for the helper, also through Ctrl-C, which is raised afterwards; returns the helper's error."""
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                failed = self.ended.get()
            except KeyboardInterrupt as error:
                interrupted = error
                continue
            if interrupted is not None:
                raise interrupted
            return failed


def _help(piles: SimpleQueue[_Pile]) -> None:
    """The helper's life. Rounding and denormals are a thread's own: it takes over its caller's for each pile."""
    _, lib = _lib.load()
    while True:
        pile, failed = piles.get(), None
        try:
            lib.fx_float_mode_use(pile.float_mode)
            with torch.no_grad():
                pile.work()
        except BaseException as error:
            failed = error
        pile.ended.put(failed)
        del pile, failed  # or tensors live until the next one comes


helper: HelperThread = HelperThread()
"""The one of this process: steps of one process run one after the other."""
