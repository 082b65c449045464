"""Show what one checkpoint holds: its files, layers and tensors, optimizers, extra state and metrics. Reads the record only."""

from __future__ import annotations

import argparse
from typing import Any

from fxckpt.cli import common
from fxckpt.store import about
from fxckpt.store.record import Record

HELP = "show what one checkpoint holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_store(parser)
    parser.add_argument("which", nargs="?", metavar="WHICH", help=common.WHICH)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def run(args: argparse.Namespace) -> int:
    reader = common.open_checkpoint(args.dir, args.which)
    found = describe(reader.record, str(reader.path))
    if args.json:
        common.print_json(found)
    else:
        _print(found, args.tensors)
    return common.OK


def describe(record: Record, path: str) -> dict[str, Any]:
    """All but the encoded values and the checksums."""
    return {
        "path": path, "step": record.step, "generation": record.generation, "parent": record.parent, "name": record.name,
        "iteration": record.iteration, "updates": record.updates, "time": record.time, "store_id": record.store_id,
        "world_size": record.world_size, "rank": record.rank, "metrics": record.metrics, "lasting": record.lasting,
        "journal": None if record.journal is None else {"base": record.journal.base, "after": record.journal.after,
            "number": record.journal.number, "update": record.journal.update, "digests": dict(record.journal.digests),
            "machine": record.journal.machine},
        "best_by": record.best_by, "began": about.origin(record), "imported": about.imported(record) is not None,
        "ties": record.ties, "extra": extra_names(record),
        "ranks": [{"rank": each.rank, "nbytes": each.nbytes} for each in record.ranks], "diverged": about.diverged(record),
        "optimizers": [_optimizer(each) for each in record.optimizers] if isinstance(record.optimizers, list) else [],
        "files": [{"name": file.name, "nbytes": file.nbytes, "chunk_bytes": file.chunk_bytes, "chunks": len(file.crc32c)}
                  for file in record.files],
        "layers": [{"name": layer.name, "kind": layer.kind, "parameters": layer.parameters, "nbytes": layer.nbytes,
                    "tensors": [{"key": tensor.key, "file": tensor.file, "dtype": tensor.dtype, "shape": tensor.shape,
                                 "begin": tensor.begin, "nbytes": tensor.nbytes,
                                 "boxes": [{"file": box.file, "begin": box.begin, "offset": box.offset, "shape": box.shape}
                                           for box in tensor.pieces]} for tensor in layer.tensors]}
                   for layer in record.layers],
    }  # fmt: skip


def _place(tensor: dict[str, Any]) -> tuple[str, Any]:
    """Where it lies: its file and the offset there, or in how many boxes."""
    boxes = tensor["boxes"]
    return (f"{len(boxes)} boxes, the first in {tensor['file']}", "") if boxes else (tensor["file"], tensor["begin"])


def extra_names(record: Record) -> list[str]:
    """The names given in ``extra=``. A record of another program may have none."""
    state = record.state if isinstance(record.state, dict) else {}
    early, late = state.get("early"), state.get("late")
    early = early.get("extra") if isinstance(early, dict) else None
    return [name for part in (early, late) if isinstance(part, dict) for name in part if name != "!"]


def _optimizer(encoded: Any) -> dict[str, Any]:
    """The class, and of each group the number of parameters and its settings that are plain values."""
    encoded = encoded if isinstance(encoded, dict) else {}
    groups = encoded.get("groups")
    out = []
    for group in groups if isinstance(groups, list) else []:
        settings = group.get("settings", {}) if isinstance(group, dict) else {}
        plain = {name: value for name, value in settings.items() if not isinstance(value, (dict, list))}
        out.append({"parameters": len(group.get("params", [])) if isinstance(group, dict) else 0, "settings": plain})
    return {"class": encoded.get("class"), "groups": out}


def _print(found: dict[str, Any], tensors: bool) -> None:
    parameters = sum(layer["parameters"] for layer in found["layers"])
    common.say(found["path"])
    common.say(f"step {found['step']} (iteration {found['iteration']}, {found['updates']} updates), generation "
          f"{found['generation']}" + (f" after {found['parent']}" if found["parent"] is not None else "")
          + f", written {common.clock(found['time'])}")  # fmt: skip
    common.say(f"{parameters:,} parameters in {len(found['layers'])} layers")
    for optimizer in found["optimizers"]:
        for group in optimizer["groups"]:
            shown = ", ".join(f"{name}={value!r}" for name, value in group["settings"].items() if value is not None)
            common.say(
                f"{optimizer['class'] or 'an optimizer of a class that is not known'}: {group['parameters']} tensors, {shown}"
            )
    for name in ("extra", "metrics", "ties"):
        if found[name]:
            common.say(f"{name}: " + ", ".join(found[name] if isinstance(found[name], list)
                                          else (f"{key}={value}" for key, value in found[name].items())))  # fmt: skip
    if found["began"] is not None:
        common.say(f"{'this is' if found['imported'] else 'its store began'} {common.began(found['began'])}")
    if (journal := found["journal"]) is not None:
        base = f"number {journal['number']} on the checkpoint of generation {journal['base']}"
        common.say(f"a record of the journal: {base}, whose step is made again from it and those before it")
    if found["ranks"]:
        sizes = [common.human(each["nbytes"]) for each in found["ranks"]]
        common.say(f"written by {len(sizes)} ranks together, {', '.join(sizes[:8])}{' ...' if sizes[8:] else ''}")
    tensors_of_all = [tensor for layer in found["layers"] for tensor in layer["tensors"]]
    if boxed := [len(tensor["boxes"]) for tensor in tensors_of_all if tensor["boxes"]]:
        common.say(f"{len(boxed)} of {len(tensors_of_all)} tensors lie in boxes, up to {max(boxed)} each")
    for writer, reader, layers, _ in found["diverged"]:
        common.say(f"rank {reader} had other bits than rank {writer}, which wrote them, in layer {', '.join(layers)}")
    if found["lasting"]:
        common.say(f"kept for good (by {found['lasting']})")
    common.say()
    common.print_table(("FILE", "SIZE", "CHUNKS", "OF"), [
        (file["name"], common.human(file["nbytes"]), file["chunks"], common.human(file["chunk_bytes"]))
        for file in found["files"]], left=(0,))  # fmt: skip
    common.say()
    common.print_table(("LAYER", "KIND", "PARAMETERS", "SIZE", "TENSORS"), [
        (layer["name"] or "(root)", layer["kind"], f"{layer['parameters']:,}", common.human(layer["nbytes"]),
         len(layer["tensors"])) for layer in found["layers"]], left=(0, 1))  # fmt: skip
    if tensors:
        common.say()
        common.print_table(("TENSOR", "TYPE", "SHAPE", "FILE", "OFFSET"), [
            (tensor["key"], tensor["dtype"], "×".join(map(str, tensor["shape"])) or "scalar", *_place(tensor))
            for layer in found["layers"] for tensor in layer["tensors"]], left=(0, 1, 2, 3))  # fmt: skip
