"""What a run asks of an engine, which copies tensors out of live memory and writes them: ``fxckpt.engine.Engine`` is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from fxckpt.engine import EngineStatistics, Plan, Sources

Streams = Mapping[int, int]
"""The stream that each CUDA device trains on: device number -> the driver's handle."""


class EngineCopy(Protocol):
    """One checkpoint, as the engine knows it: emit each layer once, then wait. Every wait returns False after its timeout,
    and raises SaveFailed if the checkpoint failed, Cancelled if it was given up."""

    @property
    def id(self) -> int:
        """A number of its own in the engine."""

    def emit(self, layer: int, sources: Sources, streams: Streams | None = None) -> None:
        """Hand a layer over; its memory must not change before a fence on it returned True."""

    def emitted(self) -> int:
        """Layers emitted so far."""

    def copied(self, timeout: float) -> bool:
        """Wait until every layer is copied."""

    def durable(self, timeout: float) -> bool:
        """Wait until every file is synced; where another process writes, until it has every byte."""

    def settled(self, timeout: float) -> bool:
        """Wait until no thread will touch its files again."""

    def crcs(self, file: int) -> list[int]:
        """CRC-32C of each chunk of a file, once durable."""

    def cancel(self) -> None:
        """Give it up. Returns when no thread reads the emitted memory any more."""

    def release(self) -> None:
        """Free it."""


class CheckpointEngine(Protocol):
    """Copies and writes the layers of checkpoints, on threads of its own. Sizes are in bytes; ``memory_bytes`` is what it may
    allocate, ``staging_bytes`` the part of it that takes copies which no thread writes yet."""

    memory_bytes: int
    staging_bytes: int

    def plan(self, files: Sequence[tuple[int, bytes]], tensors: Sequence[tuple[int, int, int, int, int]], layers: int) -> Plan:
        """The geometry of a checkpoint's files: (bytes, header) each; (layer, file, offset, bytes, item size) each."""

    def begin(
        self, plan: Plan, directory: str, names: Sequence[str], known: Sequence[Mapping[int, int]] | None = None
    ) -> EngineCopy:
        """Open the files and start a checkpoint into them. ``known``: CRCs of what the disk holds already. Raises SaveFailed."""

    def pending(self) -> bool:
        """Is any emitted piece of any checkpoint not copied yet? One atomic read."""

    def fence(self, layer: int, timeout: float, streams: Streams | None = None) -> bool:
        """Wait until the layer's memory (-1: all layers') may change; False after ``timeout`` seconds."""

    def open_device(self, ordinal: int, driver: str | None = None) -> None:
        """Make ready to copy from this CUDA device. Raises SetupError."""

    def statistics(self) -> EngineStatistics:
        """What it did so far."""

    def trace(self, capacity: int) -> None:
        """Record spans of time, so many at most; 0 stops."""

    def take_spans(self) -> tuple[list[tuple[int, ...]], int]:
        """The spans recorded since the last call, and how many found no room."""

    def close(self) -> None:
        """Cancel what is in flight and end the threads. Idempotent."""
