"""Reading a directory of ``torch.distributed.checkpoint`` without running what is in it.

Its ``.metadata`` is a pickle, and values that are no tensors are files of ``torch.save``: torch reads both with an unpickler that
calls whatever it is told to. Here the first may name nothing but the classes that torch writes there, which are private in part,
and the second goes through ``weights_only``. Tensors torch itself reads with ``weights_only``.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fxckpt.compat.pickles import BoundedFile, BoundedUnpickler
from fxckpt.errors import Corrupt, SetupError

METADATA = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
                                     "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip
"""What ``.metadata`` of torch 2.3 to 2.14 is made of; and ``torch.float32`` and the other types of elements."""


class _Unpickler(BoundedUnpickler):
    """Makes only what is allowed; none of it does anything but hold its arguments."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name. Raises UnpicklingError for any other."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no metadata of torch.distributed.checkpoint does")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """torch's reader, but for the metadata, which is read once."""

    def __init__(self, path: str):
        super().__init__(path)
        self.found: Metadata = read_metadata(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.found


@dataclass
class _Refused:
    """In place of a value that only unpickling could make."""

    why: str


class _Planner(DefaultLoadPlanner):
    """torch's planner, but for values that are no tensors. Keys are those of the metadata."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        try:
            found = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = _Refused(str(error).partition("\n")[0])
        self.state_dict[read_item.dest_index.fqn] = found


def read_metadata(directory: str) -> Metadata:
    """``.metadata`` of a directory. Raises Corrupt if it is something else, or names files outside of the directory."""
    path = os.path.join(directory, METADATA)
    try:
        with BoundedFile(path) as file:
            found = _Unpickler(file).load()
        entries, places = dict(found.state_dict_metadata), dict(found.storage_data)
        names = {os.fspath(place.relative_path) for place in places.values()}
    except MemoryError:
        raise
    except Exception as error:  # whatever damaged bytes make the classes say
        raise Corrupt(path, f"it is no metadata of torch.distributed.checkpoint: {str(error)[:300]}") from error
    if not isinstance(found, Metadata) or not all(isinstance(key, str) for key in entries):
        raise Corrupt(path, "it is no metadata of torch.distributed.checkpoint")
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata) and not _is_covered(entry):
            raise Corrupt(path, f"the pieces of {key!r} are not the whole of it")
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise Corrupt(path, f"it says that data lie in {name!r}, which is not a file of this directory")
    return found


def _is_covered(tensor: TensorStorageMetadata) -> bool:
    """Whether a tensor's pieces lie in it and are as many elements as it has. What no piece covers would be left as the memory
    was."""
    try:
        for piece in tensor.chunks:
            if not len(piece.offsets) == len(piece.sizes) == len(tensor.size):
                return False
            if not all(0 <= at <= at + n <= size for at, n, size in zip(piece.offsets, piece.sizes, tensor.size)):
                return False
        return sum(math.prod(piece.sizes) for piece in tensor.chunks) == math.prod(tensor.size)
    except (TypeError, AttributeError):
        return False


class Directory:
    """One such directory: ``paths`` says for each key where in the nested dict its value was, ``tensors`` which are tensors."""

    def __init__(self, directory: str):
        self._reader = _Reader(directory)
        found = self._reader.found
        self.tensors: dict[str, tuple[torch.Size, torch.dtype]] = {
            key: (each.size, each.properties.dtype)
            for key, each in found.state_dict_metadata.items()
            if isinstance(each, TensorStorageMetadata)
        }
        known = found.planner_data if isinstance(found.planner_data, dict) else {}
        self.paths: dict[str, tuple[Any, ...]] = {key: tuple(known.get(key, (key,))) for key in found.state_dict_metadata}

    def value(self, key: str) -> Any:
        """A tensor, put together of its pieces, or what else was saved. Raises Corrupt."""
        size, dtype = self.tensors.get(key, (None, None))
        try:
            state: dict[str, Any] = {key: None if size is None else torch.empty(size, dtype=dtype)}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
                load(state, storage_reader=self._reader, planner=_Planner(), no_dist=True)
        except MemoryError:
            raise
        except Exception as error:
            raise Corrupt(self._reader.path, f"{key!r} cannot be read: {type(error).__name__}: {str(error)[:300]}") from error
        except BaseException as error:  # DCP's own is no Exception
            if type(error).__name__ != "CheckpointException":
                raise
            raise Corrupt(self._reader.path, f"{key!r} cannot be read: {str(error).strip().splitlines()[-1][:300]}") from error
        if isinstance(state[key], _Refused):
            raise SetupError(f"{key!r} is no plain value, and is not unpickled: {state[key].why[:300]}")
        return state[key]
