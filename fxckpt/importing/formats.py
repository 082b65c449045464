"""The formats that can be imported, told apart by what is there and not by how it is called.

Nothing that is read may run: torch.save files and values of DCP go through ``weights_only``, DCP's metadata through an unpickler
that knows torch's own classes only. Large tensors stay in their files until they are written.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

from fxckpt.engine import io
from fxckpt.errors import Corrupt, FxckptError, SetupError
from fxckpt.importing import state_dicts
from fxckpt.importing.source import KNOWN, PIECE, Source, Stored, later, plain_names
from fxckpt.store import names
from fxckpt.store.checks import parse_json
from fxckpt.store.files import read_small
from fxckpt.store.layout import header_bytes, parse_header

TORCH, SAFETENSORS, HUGGING_FACE, DCP = "torch.save", "safetensors", "Hugging Face", "DCP"

CONFIG = "config.json"
CONFIG_BYTES = 64 << 10
"""A larger one would make every record of the store longer."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_METADATA = ".metadata"  # by which a directory of DCP is known


def read(path: str) -> Source:
    """What is at ``path``. Raises SetupError for what is none of the formats, Corrupt for what is damaged."""
    if not os.path.exists(path):
        raise SetupError(f"there is nothing at {path}")
    try:
        source = _directory(path) if os.path.isdir(path) else _file(path)
        if not source.model:
            raise SetupError(f"{path} has no tensors in it")
        plain_names(source)
    except (FxckptError, OSError, MemoryError):
        raise
    except Exception as error:  # what is read may be of any types in any place
        raise Corrupt(path, f"it does not hold what its format says: {type(error).__name__}: {str(error)[:300]}") from error
    return source


def _directory(path: str) -> Source:
    if os.path.lexists(os.path.join(path, _METADATA)):
        return _dcp(path)
    if os.path.lexists(os.path.join(path, names.COMMIT)) or os.path.lexists(os.path.join(path, names.STORE)):
        raise SetupError(f"{path} is a store of fxckpt: fxckpt.load({path!r}, model=model) reads it as it is")
    return _hugging_face(path)


def _file(path: str) -> Source:
    with open(path, "rb") as file:
        begin = file.read(9)
    if begin[:4] == b"PK\x03\x04" or begin[:1] == b"\x80":  # a zip archive, or a pickle: what torch.save wrote before 1.6
        return _torch(path, Source(TORCH))
    if len(begin) == 9 and begin[8:] == b"{":
        source = Source(SAFETENSORS)
        for name, value in _safetensors(path).items():
            source.add(name, value)
        return source
    raise SetupError(f"{path} is neither a file of torch.save nor one of safetensors")


# ---- torch.save ----


def _torch(path: str, source: Source) -> Source:
    try:
        state_dicts.take(_unpickled(path), source)
    except SetupError as error:
        raise SetupError(f"{path}: {error}") from error
    return source


def _unpickled(path: str) -> Any:
    """What ``torch.load`` makes of it, mapped into memory where the file allows that. Raises SetupError for what only unpickling
    could make, which runs what it is told to."""
    import torch

    from fxckpt.compat.pickles import BoundedFile

    with open(path, "rb") as file:
        mappable = file.read(2) == b"PK"
    try:
        if mappable:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with BoundedFile(path) as bounded:
            return torch.load(bounded, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
        raise SetupError(
            "it is damaged, or holds objects that only unpickling can make, which runs code of the file and is not done: "
            f"{(why or str(error))[:300]} Save what state_dict() gives in its place"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever damaged bytes make torch say
        raise Corrupt(path, f"torch.load cannot read it: {str(error).strip().partition(chr(10))[0][:300]}") from error


# ---- safetensors, and folders of Hugging Face ----


def _safetensors(path: str) -> dict[str, Stored]:
    """The tensors of a file, which stay there. Raises Corrupt unless its header covers the file exactly."""
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        end = header_bytes(file.read(8), nbytes, path)
        file.seek(0)
        placed = parse_header(file.read(end), nbytes, path)
    found = {}
    for name, each in placed.items():
        dtype, shape = each.spec.dtype, each.spec.shape
        is_complex = dtype == "C64"
        dtype, shape = ("F32", (*shape, 2)) if is_complex else (dtype, shape)
        if dtype not in KNOWN:
            raise SetupError(f"{path}: cannot import {name!r}, of type {dtype}: a checkpoint's tensors are of {', '.join(KNOWN)}")
        found[name] = Stored(dtype, shape, partial(_pieces, path, each.begin, each.nbytes), is_complex)
    return found


def _pieces(path: str, begin: int, nbytes: int) -> Iterator[memoryview]:
    """Bytes of a file, some at a time. Raises Corrupt if it has become shorter."""
    with open(path, "rb") as file:
        for at in range(0, nbytes, PIECE):
            piece = io.pread(file.fileno(), min(PIECE, nbytes - at), begin + at)
            if len(piece) != min(PIECE, nbytes - at):
                raise Corrupt(path, "it was cut off while it was read", offset=begin + at)
            yield memoryview(piece)


def _hugging_face(path: str) -> Source:
    """A folder as ``save_pretrained`` writes it. Raises SetupError if there is no one set of weights in it."""
    source = Source(HUGGING_FACE)
    source.config = _config(path, source)
    for weights in _WEIGHTS:
        index = os.path.join(path, f"{weights}.index.json")
        if os.path.exists(index):
            return _sharded(path, index, source)
        if os.path.exists(os.path.join(path, weights)):
            return _one_file(path, weights, source)
    there = sorted(name for name in os.listdir(path) if name.endswith((".safetensors", ".bin", ".pt", ".pth")))
    if len(there) != 1:
        what = f"has {', '.join(there)}: name one of them" if there else "is no store, and has no weights in it"
        raise SetupError(f"{path} {what}. Expected were {', '.join(_WEIGHTS)}, each or as *.index.json, or DCP's {_METADATA}")
    return _one_file(path, there[0], source)


def _one_file(folder: str, name: str, source: Source) -> Source:
    """Weights of a folder, of either kind."""
    path = os.path.join(folder, name)
    if not name.endswith(".safetensors"):
        return _torch(path, source)
    for key, value in _safetensors(path).items():
        source.add(key, value)
    return source


def _sharded(folder: str, index: str, source: Source) -> Source:
    """The files that an index names, each of which must have what the index says of it. Raises Corrupt."""
    found = parse_json(read_small(index), index, depth=8, what="the index")
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise Corrupt(index, "it has no weight_map from tensors to files")
    for file in sorted(set(places.values())):
        if os.path.basename(file) != file or file in ("", ".", ".."):
            raise Corrupt(index, f"it names {file!r}, which is not a file of this folder")
        if not os.path.exists(os.path.join(folder, file)):
            raise Corrupt(index, f"it names {file}, which is not there")
        part = _one_file(folder, file, Source(HUGGING_FACE))
        if lacking := [name for name, place in places.items() if place == file and name not in part.model]:
            raise Corrupt(index, f"it says that {lacking[0]!r} is in {file}, which has no such tensor")
        for name, value in part.model.items():
            if places.get(name) == file:
                source.model[name] = value
            else:
                source.left_out[name] = f"it is in {file}, and not in the index"
        source.left_out |= part.left_out
    return source


def _config(folder: str, source: Source) -> str | None:
    """The text of config.json, if there is one that a record can have. Raises Corrupt if it is none."""
    path = os.path.join(folder, CONFIG)
    if not os.path.exists(path):
        return None
    if os.path.getsize(path) > CONFIG_BYTES:
        source.left_out[CONFIG] = f"it has more than the {CONFIG_BYTES} bytes that a record keeps of one"
        return None
    found = parse_json(read_small(path, CONFIG_BYTES), path, depth=64, what=CONFIG)
    if not isinstance(found, dict):
        raise Corrupt(path, "it is not an object")
    return json.dumps(found)


# ---- torch.distributed.checkpoint ----


def _dcp(path: str) -> Source:
    """A directory of DCP, whose keys are put together to the dict that was saved."""
    from fxckpt.compat.dcp import Directory

    directory, source = Directory(path), Source(DCP)
    whole: dict[Any, Any] = {}
    for key, steps in directory.paths.items():
        if key in directory.tensors:
            value = later(*directory.tensors[key], key, partial(directory.value, key))
        else:
            try:
                value = directory.value(key)
            except SetupError as error:
                source.left_out[key] = str(error)
                continue
        _put(whole, steps, value)
    state_dicts.take(_lists(whole), source)
    return source


def _put(whole: dict[Any, Any], steps: tuple[Any, ...], value: Any) -> None:
    """Set a value in nested dicts; an index of a list is a key like others."""
    for step in steps[:-1]:
        inside = whole.setdefault(step, {})
        if not isinstance(inside, dict):
            return
        whole = inside
    whole[steps[-1]] = value


def _lists(value: Any, key: Any = None) -> Any:
    """The same with lists where all keys are indexes of one; not where an optimizer's state goes by the numbers of parameters."""
    if not isinstance(value, dict):
        return value
    inner = {name: _lists(each, name) for name, each in value.items()}
    if key != "state" and inner and set(inner) == set(range(len(inner))):
        return [inner[at] for at in range(len(inner))]
    return inner
