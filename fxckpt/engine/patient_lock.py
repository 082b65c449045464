"""A lock that is waited for in slices and not for ever, and that Ctrl-C cannot leave taken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fxckpt.engine._lib import Patience

if TYPE_CHECKING:

    class _Lock:
        """What the class below is, which may be derived from, though type checkers take it for final."""

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
        def release(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

else:
    _Lock = type(threading.RLock())


class PatientLock(_Lock):
    """``with lock:`` raises what ``hangs`` makes once it was waited for as many seconds as ``patience`` says.

    A handler of a signal, Python's own for Ctrl-C among them, may raise between any two instructions of Python. So the way out
    is the C function of the class below, with no instruction between the end of a block and the release; a generator with
    ``@contextmanager``, or an ``__exit__`` in Python, would have some. No thread may take it twice.
    """

    def __init__(self, patience: Callable[[], float], hangs: Callable[[], Exception]):
        super().__init__()
        self._patience, self._hangs = patience, hangs

    def __enter__(self) -> Any:
        try:
            if Patience(self._patience()).until(lambda slice: self.acquire(timeout=slice)):
                return self
        except BaseException:
            if is_owned(self):
                self.release()
            raise
        raise self._hangs()


def is_owned(lock: Any) -> bool:
    """Does this thread hold it, an ``RLock``?"""
    return bool(lock._is_owned())  # as threading.Condition asks it


class Latch:
    """Something that happens once, and is waited for: ``threading.Event`` without a lock that Ctrl-C could leave taken inside
    ``set``."""

    def __init__(self) -> None:
        self._happened = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """It has happened. Idempotent."""
        self._happened = True
        try:
            self._lock.release()
        except RuntimeError:  # by another thread already
            return

    def is_set(self) -> bool:
        return self._happened

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has, for so many seconds at most; has it?"""
        if not self._happened and self._lock.acquire(timeout=-1 if timeout is None else timeout):
            self.set()  # for the next one who waits
        return self._happened
