"""What users are told of a checkpoint: the public part of its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fxckpt.store.record import LayerRecord, Record


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a checkpoint.

    Attributes:
        checkpoint_id: the generation of its checkpoint.
        name: the module's, in the model.
        kind: ``"update"`` (parameters that an optimizer updates, with their state), ``"frozen"`` or ``"buffers"``.
        step: the training step that it is of.
        offset: of its first tensor, in bytes, in that tensor's file.
        nbytes: of all its tensors.
        parameters: elements of its parameters, without optimizer state.
        keys, files, shapes, dtypes: of each tensor; safetensors names of types.
        timestamp: when it was recorded, in seconds since 1970.
    """

    checkpoint_id: int
    name: str
    kind: str
    step: int
    offset: int
    nbytes: int
    parameters: int
    keys: tuple[str, ...]
    files: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    timestamp: float


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint.

    Attributes:
        step: ``opt.step()`` attempts before it.
        generation: its id in the store, which orders all that were ever written there.
        time: when its step closed, in seconds since 1970.
        nbytes: of all its files but the record.
        path: its directory.
        name: of a named save, or None.
        layers: in the order of the record.
        metrics: as noted with ``opt.ckpt.note``.
        lasting: why retention keeps it for good (``"steps"``, ``"minutes"``), or None.
    """

    step: int
    generation: int
    time: float
    nbytes: int
    path: Path
    name: str | None
    layers: tuple[LayerInfo, ...]
    metrics: Mapping[str, float]
    lasting: str | None


def describe(path: Path, record: Record) -> CheckpointInfo:
    """What the listing says of a checkpoint."""
    layers = tuple(_describe_layer(record.generation, layer) for layer in record.layers)
    return CheckpointInfo(
        record.step, record.generation, record.time, record.nbytes, path, record.name, layers, record.metrics, record.lasting
    )


def _describe_layer(generation: int, layer: LayerRecord) -> LayerInfo:
    """What the listing says of a layer."""
    tensors = layer.tensors
    return LayerInfo(
        generation, layer.name, layer.kind, layer.step, layer.offset, layer.nbytes, layer.parameters,
        tuple(each.key for each in tensors), tuple(each.file for each in tensors), tuple(each.shape for each in tensors),
        tuple(each.dtype for each in tensors), layer.time,
    )  # fmt: skip
