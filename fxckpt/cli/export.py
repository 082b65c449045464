"""Write a checkpoint in another format: one file of torch.save, safetensors with a Hugging Face index, a folder for
from_pretrained (hf), or a DCP directory.

Every byte is verified before any is used, and the checkpoint is held, so that a trainer may go on meanwhile. OUT must not
exist; it appears when it is complete. By default only the model is written (with its buffers): --optimizer adds the
optimizer's state dict where the format has a place for it (torch, dcp).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from fxckpt.cli import common
from fxckpt.engine import io
from fxckpt.errors import FxckptError, SaveFailed, SetupError
from fxckpt.store import about
from fxckpt.store.dtypes import DTYPES
from fxckpt.store.files import opened
from fxckpt.store.layout import TensorSpec, lay_out
from fxckpt.store.names import INDEX, MODEL, OPTIMIZER, of_rank, state_key
from fxckpt.store.reader import Reader
from fxckpt.store.record import Record, TensorRecord
from fxckpt.store.typed_json import decode_state

HELP = "write a checkpoint as torch.save file, safetensors, folder for from_pretrained, or DCP"

CONFIG = "config.json"
PIECE = 16 << 20  # bytes copied at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_store(parser)
    parser.add_argument("out", metavar="OUT", help="the file (torch) or directory (all others) to make")
    parser.add_argument("--format", choices=sorted(_FORMATS), required=True, help="what to write")
    parser.add_argument("--which", metavar="WHICH", help=common.WHICH)
    parser.add_argument("--optimizer", action="store_true", help="the optimizer's state too (torch, dcp)")
    config = "hf: a folder with a config.json (and tokenizer), to be copied; default: what the record knows of the model"
    parser.add_argument("--config", metavar="FOLDER", help=config)
    shard = "safetensors, hf: begin a new file after so many bytes (default: 5GB)"
    parser.add_argument("--shard", type=common.amount, default=5 * 10**9, metavar="SIZE", help=shard)


def run(args: argparse.Namespace) -> int:
    if os.path.lexists(args.out):
        raise SetupError(f"{args.out} exists: name a place where nothing is")
    if args.config is not None and args.format != "hf":
        raise SetupError("--config is for --format hf, which writes a config.json")
    if args.optimizer and args.format in ("safetensors", "hf"):
        raise SetupError("a Hugging Face checkpoint has no place for optimizer state: use --format torch or dcp")
    parent = os.path.dirname(os.path.abspath(args.out))
    if not os.path.isdir(parent):
        raise SetupError(f"{parent} is not a directory: make it first")
    with common.whole_checkpoint(args.dir, common.open_checkpoint(args.dir, args.which), parent) as reader:
        return _export(args, reader, parent)


def _export(args: argparse.Namespace, reader: Reader, parent: str) -> int:
    """A whole checkpoint, to a place in ``parent``."""
    # A directory of a name that nobody can guess: no link can wait there for what is written.
    folder = tempfile.mkdtemp(prefix=os.path.basename(os.path.abspath(args.out)) + ".partial-", dir=parent)
    partial = os.path.join(folder, "out")
    try:
        with reader.held(), common.Progress("exporting", 2 * reader.record.nbytes) as progress:
            reader.verify(progress.advance)
            source = Origin(reader, progress)
            try:
                _FORMATS[args.format](source, partial, args)
            except (FxckptError, OSError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # what torch raises when it cannot: a RuntimeError; DCP's is no Exception
                raise SaveFailed("write", partial, detail=str(error).strip().partition("\n")[0]) from error
        _sync(partial)
        os.rename(partial, args.out)
        io.fsync_dir(parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {"out": os.path.abspath(args.out), "format": args.format, "step": reader.record.step, "from": str(reader.path),
             "tensors": source.count, "nbytes": source.nbytes}  # fmt: skip
    if args.json:
        common.print_json(found)
    else:
        size = common.human(found["nbytes"])
        common.say(f"step {found['step']}: {found['tensors']} tensors, {size}, as {args.format} in {args.out}")
    return common.OK


def _sync(path: str) -> None:
    """Make a file, or all that is in a directory, durable before it gets its name."""
    if os.path.isdir(path):
        for name in os.listdir(path):
            _sync(os.path.join(path, name))
        io.fsync_dir(path)
        return
    with opened(path, os.O_RDONLY) as fd:
        io.fsync(fd)


class Origin:
    """A verified checkpoint that is held: its tensors, as bytes and as torch's."""

    def __init__(self, reader: Reader, progress: common.Progress):
        self.record: Record = reader.record
        self._reader, self._progress = reader, progress
        self.count: int = 0
        self.nbytes: int = 0

    def pieces(self, tensor: TensorRecord) -> Iterator[bytes]:
        """The bytes of a tensor, some at a time."""
        self.count += 1
        self.nbytes += tensor.nbytes
        for at in range(0, tensor.nbytes, PIECE):
            piece = self._reader.held_bytes(tensor, at, min(PIECE, tensor.nbytes - at))
            self._progress.advance(len(piece))
            yield piece

    def tensor(self, record: TensorRecord, is_complex: bool = False) -> Any:
        """A new torch tensor. What is stored as pairs of real numbers comes so; a state can be made complex."""
        import torch

        tensor = torch.empty(record.shape, dtype=getattr(torch, DTYPES[record.dtype].torch))
        if raw := bytearray().join(self.pieces(record)):
            tensor = torch.frombuffer(raw, dtype=torch.uint8).view(tensor.dtype).reshape(record.shape)
        return torch.view_as_complex(tensor) if is_complex and not tensor.is_complex() else tensor

    def model(self) -> dict[str, Any]:
        """The state dict: parameters and buffers by name, ties under each of their names, modules' own extra state."""
        found = {record.key: self.tensor(record) for record in self.record.tensors(MODEL)}
        found |= {alias: found[name] for alias, name in self.record.ties.items() if name in found}
        extra = decode_state(self.record.state, self._reader.state_tensors())
        for name, state in extra["early"]["modules"].items():
            found[f"{name}._extra_state" if name else "_extra_state"] = state
        return found

    def optimizers(self) -> list[dict[str, Any]]:
        """For each optimizer its groups (parameters by name) and its state by parameter's name."""
        places = {record.key: record for record in self.record.tensors(OPTIMIZER)}
        found = []
        for index, saved in enumerate(decode_state(self.record.optimizers, self._reader.state_tensors())):
            states: dict[str, dict[str, Any]] = {name: {} for name in saved["state"]}
            for name, described in saved["state"].items():
                for key in described["keys"]:
                    place = places.get(state_key(index, key, name))
                    is_complex = key in described["complex"]
                    states[name][key] = described["plain"][key] if place is None else self.tensor(place, is_complex)
            groups = [{**group["settings"], "params": list(group["params"])} for group in saved["groups"]]
            found.append({"state": states, "param_groups": groups})
        return found


def _torch(source: Origin, path: str, args: argparse.Namespace) -> None:
    """``torch.load(OUT)`` is the model's state dict; with the optimizer: ``{"model": …, "optimizer": …, "step": …}``, as
    ``load_state_dict`` of each takes it (several optimizers: a list)."""
    import torch

    model = source.model()
    if not args.optimizer:
        torch.save(model, path)
        return
    optimizers = [_by_number(each) for each in source.optimizers()]
    optimizer = optimizers[0] if len(optimizers) == 1 else optimizers
    torch.save({"model": model, "optimizer": optimizer, "step": source.record.step}, path)


def _by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """torch numbers the parameters of an optimizer's state dict, over all groups."""
    parameters = [name for group in optimizer["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(parameters)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {numbers[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}


def _dcp(source: Origin, path: str, args: argparse.Namespace) -> None:
    """``torch.distributed.checkpoint``: ``{"model": …}`` and, if asked for, ``"optimizer"`` by parameter names."""
    from torch.distributed.checkpoint.state_dict_saver import save

    state: dict[str, Any] = {"model": source.model()}
    if args.optimizer:
        optimizers = source.optimizers()
        state["optimizer"] = optimizers[0] if len(optimizers) == 1 else dict(enumerate(optimizers))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        save(state, checkpoint_id=path, no_dist=True)


def _safetensors(source: Origin, path: str, args: argparse.Namespace) -> None:
    """``model-00001-of-0000N.safetensors`` and the index that says which file has which tensor. A tie is stored once."""
    os.mkdir(path)
    shards = _shards(source.record.tensors(MODEL), args.shard)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = of_rank(MODEL, number, len(shards))  # called as the part of a rank is
        specs = [TensorSpec(tensor.key, tensor.dtype, tensor.shape, 0) for tensor in shard]
        layout = lay_out(name, specs, {"format": "pt"})  # readers of Hugging Face want to be told that this is PyTorch's
        by_key = {tensor.key: tensor for tensor in shard}
        with open(os.path.join(path, name), "wb") as file:
            file.write(layout.header)
            for placed in layout.tensors:
                file.writelines(source.pieces(by_key[placed.spec.key]))
        index |= dict.fromkeys(by_key, name)
    content = {"metadata": {"total_size": source.nbytes}, "weight_map": dict(sorted(index.items()))}
    with open(os.path.join(path, INDEX), "w", encoding="utf-8") as text:
        text.write(json.dumps(content, indent=2) + "\n")


def _shards(tensors: list[TensorRecord], limit: int) -> list[list[TensorRecord]]:
    """Tensors in order, a new file wherever the next one would make it larger than ``limit``."""
    shards: list[list[TensorRecord]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _hf(source: Origin, path: str, args: argparse.Namespace) -> None:
    """A folder that ``from_pretrained`` opens: weights under the names it looks for, and the model's configuration."""
    config = about.config(source.record) if args.config is None else None
    if args.config is None and config is None:
        raise SetupError(
            "the record does not know the model's configuration, which from_pretrained needs (it is noted of models of "
            "Transformers that are given as model=): name a folder that has it with --config FOLDER, or use --format safetensors"
        )
    _safetensors(source, path, args)
    shards = [name for name in os.listdir(path) if name.endswith(".safetensors")]
    if len(shards) == 1:  # as save_pretrained calls it
        os.rename(os.path.join(path, shards[0]), os.path.join(path, MODEL))
        os.unlink(os.path.join(path, INDEX))
    if config is not None:
        with open(os.path.join(path, CONFIG), "w", encoding="utf-8") as text:
            text.write(json.dumps(json.loads(config), indent=2, sort_keys=True) + "\n")
        return
    for name in _companions(args.config):
        shutil.copyfile(os.path.join(args.config, name), os.path.join(path, name))


def _companions(folder: str) -> list[str]:
    """What lies beside a model's weights: its configuration and tokenizer. Raises SetupError if the first is not there."""
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        raise SetupError(f"--config {folder}: it has no {CONFIG}")
    kinds, found = (".json", ".txt", ".model", ".jinja"), sorted(os.listdir(folder))
    return [name for name in found if name.endswith(kinds) and not name.endswith(".index.json")
            and os.path.isfile(os.path.join(folder, name))]  # fmt: skip


_FORMATS = {"torch": _torch, "safetensors": _safetensors, "hf": _hf, "dcp": _dcp}
