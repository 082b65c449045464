"""What is done when the process ends: each run finishes what it has started."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
from multiprocessing import util

from fxckpt.run.run import live_runs

log: logging.Logger = logging.getLogger("fxckpt")

BEFORE_ALL_ELSE = 1000
"""Exit priority in a child of multiprocessing: its queues and pools are there still when a loader is asked for its state."""


def finish_at_exit() -> None:
    """From now on this process ends its runs when it ends by itself. Problem: a child of multiprocessing leaves by ``os._exit``,
    and what ``atexit`` knows is not run there; multiprocessing has finalizers of its own, and a child begins with none of its
    parent's. Where both are run, the second finds nothing to do."""
    _register(os.getpid())


@functools.cache
def _register(pid: int) -> None:
    """Once for each process: a forked child has this memory, and another number."""
    util.Finalize(None, _end_runs, exitpriority=BEFORE_ALL_ELSE)


def _end_runs() -> None:
    """Finish what was started; those of a parent end nothing."""
    failed = _failed()
    for run in list(live_runs):
        try:
            run.end(failed)
        except Exception as error:
            log.error("fxckpt: at exit: %s", error)


def _failed() -> bool:
    """Does the process end with an exception? The interpreter keeps that of a script. In a child of multiprocessing it is under
    way while finalizers run (but is said already from Python 3.14 on), perhaps as the cause of a ``sys.exit``, which is what
    ``torch.multiprocessing`` makes of it."""
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit):
        error = error.__context__
    return error is not None or getattr(sys, "last_value", None) is not None


atexit.register(_end_runs)
