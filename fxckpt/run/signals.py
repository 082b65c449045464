"""Finish a checkpoint when a signal asks the process to end (SIGTERM of a preemption), then do what was to be done anyway."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import weakref
from types import FrameType
from typing import Any

from fxckpt.errors import FxckptError, SetupError
from fxckpt.run.run import Run

log: logging.Logger = logging.getLogger("fxckpt")

_SOON = 0.001
"""Seconds until the main thread is looked for again where it was inside a step, and could have waited for itself."""


class Finisher:
    """The handler of one signal. Problem: a signal may come between ``opt.step()`` and ``scheduler.step()``, when the state
    belongs to no step, or inside a wait of the engine. So the handler only notes it: the next ``opt.step()`` takes a
    checkpoint, whether or not one is due, and when that step closes by itself the checkpoint is waited for in the main thread,
    and the handler from before is called there. A second signal goes straight to that handler.
    """

    def __init__(self, run: Run, number: int):
        self.number: int = number
        self._run = weakref.ref(run)
        self._waiting = self._closed = False
        try:
            self._before: Any = signal.signal(number, self._arrived)
        except ValueError as error:
            raise SetupError(f"a handler of signal {number} can be installed in the main thread only: {error}") from error

    def _step_closed(self) -> None:
        """The state of a step whose checkpoint was begun after the signal is complete. Called in any thread; in the main one
        nothing is held here that a commit may need."""
        self._closed = True
        if threading.current_thread() is threading.main_thread() and (run := self._run()) is not None:
            self._end(run, self.number, sys._getframe())
        else:
            os.kill(os.getpid(), self.number)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        run = self._run()
        if run is None or not run.status.active:  # shut down, or a forked worker
            self._go_on(number, frame)
            return
        if not self._waiting:
            self._waiting, run.status.ending = True, self._step_closed
            what = "the checkpoint of the next step is taken and finished first; a second signal does not wait"
            log.warning("fxckpt: %s: %s", signal.Signals(number).name, what)
            return
        if self._closed and run.closing.occupied():  # another thread closed the step, and this one is in the next already
            threading.Timer(_SOON, self._step_closed).start()
            return
        self._end(run, number, frame)

    def _end(self, run: Run, number: int, frame: FrameType | None) -> None:
        """Wait for the checkpoint if its step has closed, and go on."""
        closed, self._waiting, self._closed, run.status.ending = self._closed, False, False, None
        if closed:
            try:
                run.saver.flush(None, unclosed=False)  # this thread may be inside a step of its own
            except (FxckptError, TimeoutError, OSError) as error:
                log.error("fxckpt: the last checkpoint before the end failed: %s", error)
        self._go_on(number, frame)

    def _go_on(self, number: int, frame: FrameType | None) -> None:
        """What would have happened without us."""
        if callable(self._before):
            self._before(number, frame)
        elif self._before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
