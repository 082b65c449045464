"""Every error fxckpt raises. Each message says what was expected, what was found, where, and what to do next."""

from __future__ import annotations

import os

from fxckpt.terminal import plain


class FxckptError(Exception):
    """Base class of all errors of this package."""

    def __str__(self) -> str:
        return plain(super().__str__())


class EngineMissing(FxckptError, ImportError):
    """The C engine is not built, or cannot be loaded."""


class SetupError(FxckptError, ValueError):
    """Wrong arguments or an environment that cannot work; raised at once, whatever ``on_error`` says."""


class NoSpace(SetupError):
    """The disk, or the quota, has no room for the checkpoints of the run; raised at its first one, with the numbers."""


class StateError(FxckptError, TypeError):
    """A value in the extra state cannot be stored without pickle; the message names the path to it."""


class LayoutMismatch(FxckptError):
    """A checkpoint and the live model or optimizer differ; the message lists names and shapes side by side."""


class StoreError(FxckptError):
    """Base class of errors about a checkpoint directory."""


class NotAStore(StoreError):
    """The directory holds something else, so nothing is written to or read from it."""


class StoreLocked(StoreError):
    """Another process writes to this store.

    Attributes:
        monitor: ``"monitor"`` if that is one, ``"finishing"`` if its trainer is gone, so that it ends by itself; else empty.
    """

    monitor = ""


class StoreNotLoaded(StoreError):
    """Checkpointing would start over a store that has checkpoints which were not loaded."""


class NoCheckpoint(StoreError):
    """The step or name that was asked for is not there."""


class RanksDisagree(StoreError):
    """The ranks of a job cannot start from one step, or one of them is dead; the message names each."""


class Diverged(RanksDisagree):
    """Replicas of one training have other bits in place of the same tensor (``on_divergence="raise"``)."""


class Corrupt(StoreError):
    """Stored bytes do not verify.

    Attributes:
        path: the file.
        layer: the layers that lie in the damaged bytes, joined by commas; None if it is not known.
        offset: where the damage begins, in bytes; None if it is not known.
        reason: what was expected and what was found.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, *, layer: str | None = None, offset: int | None = None) -> None:
        self.path: str = os.fspath(path)
        self.reason: str = reason
        self.layer: str | None = layer
        self.offset: int | None = offset
        where = self.path + (f", {_some(layer)}" if layer is not None else "")
        where += f", offset {offset}" if offset is not None else ""
        super().__init__(f"{where}: {reason}")


def _some(layer: str) -> str:
    """The layers of a damaged chunk for a message: of many, their number and the first ones."""
    names = layer.split(", ")
    return f"layer {layer!r}" if len(names) <= 3 else f"{len(names)} layers ({', '.join(names[:3])}, …)"


class SaveFailed(FxckptError):
    """A checkpoint could not be written.

    Attributes:
        operation: the call that failed, such as ``"pwrite"`` or ``"fsync"``, or what was waited for.
        path: the file or directory.
        offset: where in the file, in bytes; None if there is no place.
        errno: the system's number of the error; None if it was no system call.
        detail: what else is known, or empty.
    """

    def __init__(
        self, operation: str, path: str | os.PathLike[str], offset: int | None = None, errno: int | None = None, detail: str = ""
    ) -> None:
        self.operation: str = operation
        self.path: str = os.fspath(path)
        self.offset: int | None = offset
        self.errno: int | None = errno
        self.detail: str = detail
        at = f" at offset {offset}" if offset is not None else ""
        why = f": [errno {errno}] {os.strerror(errno)}" if errno else ""
        super().__init__(f"{operation} {self.path}{at}{why}{': ' + detail if detail else ''}")


class Cancelled(FxckptError):
    """A checkpoint was given up before it was complete (an exception in ``opt.step()``, a shutdown, a fork)."""
