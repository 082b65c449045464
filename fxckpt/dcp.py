"""A store as ``torch.distributed.checkpoint`` reads one: onto any number and layout of ranks, every byte verified.

from torch.distributed.checkpoint import load
from fxckpt.dcp import StoreReader

state = {"model": model.state_dict()}              # of FSDP2, tensor parallel or one process
load(state, storage_reader=StoreReader("checkpoints"))
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, ReadItem, StorageReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from fxckpt.errors import Corrupt, NoCheckpoint
from fxckpt.saving.inventory import TORCH_DTYPES
from fxckpt.store.directory import local_path
from fxckpt.store.names import MODEL, OPTIMIZER, state_key
from fxckpt.store.reader import Candidate, Reader, candidates
from fxckpt.store.record import TensorRecord
from fxckpt.store.typed_json import decode_state

Values = dict[str, "TensorRecord | bytes"]
"""By the names of a state dict that is flattened: tensors where they lie, and other values as ``torch.save`` writes them."""


class StoreReader(StorageReader):
    """Reads one checkpoint of a store for ``torch.distributed.checkpoint.load``.

    What a state dict may ask for, on any number of ranks and in any placement, each with or without the part in brackets:
    ``[model.]h.0.weight``; of a single optimizer ``[optimizer.]state.h.0.weight.exp_avg`` and ``[optimizer.]param_groups`` as
    ``torch.distributed.checkpoint.state_dict`` names them, flattened or not; of the second of several ``optimizer.1.state.…``.
    Only what is asked for is read, in whole chunks, each of which is verified before a byte of it is used.

    Args:
        directory: the store, as given to ``compile_step``.
        step, name: a certain checkpoint, by its step or the name of a named save; by default the newest. While a trainer writes
            there, say which: ranks that look at different moments would find different ones.

    Raises:
        NoCheckpoint: there is none, or none of that step or name. Corrupt: its record does not verify; while it is read, a file
            does not. NotAStore: the directory holds something else.
    """

    def __init__(self, directory: str | os.PathLike[str], *, step: int | None = None, name: str | None = None):
        super().__init__()
        self._reader = Reader(_chosen(local_path(directory), step, name))
        self._values = dict(_values(self._reader))

    @property
    def path(self) -> str:
        """The directory of the checkpoint."""
        return str(self._reader.path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: which checkpoint it is was said when this was made."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return os.path.isdir(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(state_dict_metadata={key: _described(value) for key, value in self._values.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read, verify and hand over each item. Raises Corrupt."""
        for item in plan.items:
            value = self._values[item.storage_index.fqn]
            if isinstance(value, bytes):
                assert item.type is LoadItemType.BYTE_IO
                planner.load_bytes(item, io.BytesIO(value))
                continue
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._part(value, item))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, stored: TensorRecord, item: ReadItem) -> torch.Tensor:
        """The box of a tensor that is asked for."""
        found = torch.empty(item.lengths, dtype=TORCH_DTYPES[stored.dtype])
        box = tuple(item.storage_offsets), tuple(item.lengths)
        self._reader.read_into({stored.place: (found.data_ptr(), None, None)}, boxes={stored.place: box})
        return found


def _chosen(directory: str, step: int | None, name: str | None) -> str:
    """The path of the newest checkpoint that is asked for."""
    found = [each for each in candidates(directory) if isinstance(each, Candidate)]
    for each in found:
        if step in (None, each.record.step) and name in (None, each.record.name):
            return str(each.path)
    there = ", ".join(str(each.record.name or each.record.step) for each in found) or "none"
    raise NoCheckpoint(f"{directory}: there is no such checkpoint; there is: {there}")


def _values(reader: Reader) -> Iterator[tuple[str, TensorRecord | bytes]]:
    """All that can be asked for."""
    record = reader.record
    model = {tensor.key: tensor for tensor in record.tensors(MODEL)}
    model |= {alias: model[key] for alias, key in record.ties.items() if key in model}
    for key, tensor in model.items():
        yield key, tensor
        yield f"model.{key}", tensor
    optimizers = decode_state(record.optimizers, reader.state_tensors())
    if not isinstance(optimizers, list):
        raise Corrupt(reader.path, "its record has no optimizers")
    places = {tensor.key: tensor for tensor in record.tensors(OPTIMIZER)}
    for index, optimizer in enumerate(optimizers):
        for key, value in _of_optimizer(index, optimizer, places):
            for prefix in ("", "optimizer.") if len(optimizers) == 1 else (f"optimizer.{index}.",):
                yield prefix + key, value


def _of_optimizer(
    index: int, saved: dict[str, Any], places: dict[str, TensorRecord]
) -> Iterator[tuple[str, TensorRecord | bytes]]:
    """State and settings of one optimizer."""
    for param, described in saved["state"].items():
        for key in described["keys"]:
            place = places.get(state_key(index, key, param))
            yield f"state.{param}.{key}", _saved(described["plain"][key]) if place is None else place
    groups = [{**group["settings"], "params": list(group["params"])} for group in saved["groups"]]
    yield "param_groups", _saved(groups)
    for group in saved["groups"]:
        for param in group["params"]:
            for setting, value in group["settings"].items():
                yield f"param_groups.{param}.{setting}", _saved(value)


def _saved(value: object) -> bytes:
    """As a planner reads it."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _described(value: TensorRecord | bytes) -> TensorStorageMetadata | BytesStorageMetadata:
    """What the planner is told: each tensor is one box."""
    if isinstance(value, bytes):
        return BytesStorageMetadata()
    size = torch.Size(value.shape)
    whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=TORCH_DTYPES[value.dtype]), size, [whole])
