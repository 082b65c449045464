"""The memory that a trainer shares with its monitor (``csrc/monitor/ring.h``), and the two engines on it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fxckpt.engine._lib import failure, load
from fxckpt.engine.checkpoint import Checkpoint
from fxckpt.engine.engine import Engine


class Posted(NamedTuple):
    """A slot that the trainer filled: the plan's ``chunk`` of its checkpoint (``Checkpoint.id``). ``same``: the disk holds
    these bytes already."""

    checkpoint: int
    chunk: int
    slot: int
    same: int


class Ring:
    """``slots`` chunks of shared memory, and two eventfds: the trainer posted a slot, the monitor gave one back.

    The memory is a memfd: it has no name, is no part of ``/dev/shm`` (whose size does not limit it), and is gone with the
    last process that has it mapped. Raises :class:`SaveFailed` when there is not as much.
    """

    def __init__(self, pointer: Any, posted: int, freed: int):
        ffi, lib = load()
        self.fd: Any = lib.fx_ring_fd(pointer)
        self.posted: int = posted
        self.freed: int = freed
        self._pointer = ffi.gc(pointer, lib.fx_ring_free)
        self._finalizer = weakref.finalize(self, _close, posted, freed)
        _rings.add(self)

    @classmethod
    def make(cls, slots: int, slot_bytes: int) -> Ring:
        """New memory, all of it reserved now. ``fd``, ``posted`` and ``freed`` are to be passed on."""
        flags, pointer = os.EFD_CLOEXEC | os.EFD_NONBLOCK, load()[0].new("struct fx_ring **")
        _succeed(load()[1].fx_ring_new, slots, slot_bytes, pointer)
        return cls(pointer[0], os.eventfd(0, flags), os.eventfd(0, flags))

    @classmethod
    def inherit(cls, fd: int, posted: int, freed: int) -> Ring:
        """The memory and descriptors that the trainer passed on."""
        pointer = load()[0].new("struct fx_ring **")
        _succeed(load()[1].fx_ring_open, fd, pointer)
        return cls(pointer[0], posted, freed)

    def next_posted(self) -> Iterator[Posted]:
        """Every slot that is posted now."""
        ffi, lib = load()
        at, found = ffi.new("uint32_t *"), ffi.new("struct fx_posted *")
        while lib.fx_ring_next(self._pointer, at, found):
            yield Posted(found.checkpoint, found.chunk, found.slot, found.same)

    def give_back(self, posted: Posted) -> None:
        """The monitor does not want what is in this slot."""
        load()[1].fx_ring_return(self._pointer, posted.slot, self.freed)


def _succeed(function: Callable[..., int], *arguments: Any) -> None:
    """Call the engine; raises SaveFailed with the error that it fills in."""
    ffi, _ = load()
    error = ffi.new("struct fx_error *")
    if function(*arguments, error):
        raise failure(ffi, error)


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


_rings: weakref.WeakSet[Ring] = weakref.WeakSet()
"""Of this process: a forked child closes the eventfds. What an engine has of a ring is closed in C (``csrc/core/fork.c``)."""


def _in_child() -> None:
    for ring in list(_rings):
        ring._finalizer()


os.register_at_fork(after_in_child=_in_child)


def post_into(engine: Engine, ring: Ring, monitor: int) -> None:
    """The trainer's engine (``mock=True``, ``staging_bytes`` the ring's) fills slots and posts them. ``monitor`` is the
    monitor's pidfd: when it ends, checkpoints that were not posted in full fail with EPIPE."""
    _succeed(load()[1].fx_relay_trainer, engine._pointer, ring._pointer, ring.posted, ring.freed, monitor)
    engine._ring = ring


def release(engine: Engine) -> None:
    """Let go of the memory of an engine that was closed."""
    if load()[1].fx_engine_close(engine._pointer, 0) == 1:
        engine._ring = None


def revive(engine: Engine, monitor: int) -> None:
    """Another monitor took over after the one that ended; ``monitor`` is its pidfd."""
    _succeed(load()[1].fx_relay_revive, engine._pointer, monitor)


def write_from(engine: Engine, ring: Ring) -> None:
    """The monitor's engine writes what :func:`emit_posted` gives it, and gives the slots back."""
    _succeed(load()[1].fx_relay_monitor, engine._pointer, ring._pointer, ring.freed)
    engine._ring = ring


def emit_posted(checkpoint: Checkpoint, posted: Posted) -> bool:
    """Give a posted slot to the monitor's checkpoint; False if it is of no use (the slot is still the caller's)."""
    checkpoint._check()
    ffi, lib = load()
    return bool(lib.fx_emit_posted(checkpoint._pointer, ffi.new("struct fx_posted *", posted)) == 0)
