"""List the checkpoints of a store, oldest first, or one of them. Reads the records only; ``verify`` reads everything."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fxckpt.cli import common
from fxckpt.errors import Corrupt
from fxckpt.store import about, names
from fxckpt.store.reader import Candidate, directory_of, read_record
from fxckpt.store.retention import Policy

HELP = "list the checkpoints of a store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_store(parser)


def run(args: argparse.Namespace) -> int:
    found = _found(args.dir)
    damaged = [each for each in found if isinstance(each, Corrupt)]
    base = os.path.dirname(os.path.abspath(args.dir)) if common.is_checkpoint(args.dir) else args.dir
    rows = [_row(each, base) for each in found]
    _mark_best(found, rows)
    others = _others(args.dir)
    origins = [began for each in found if isinstance(each, Candidate) and (began := about.origin(each.record)) is not None]
    began = origins[-1] if origins else None
    if args.json:
        common.print_json({"directory": os.path.abspath(args.dir), "checkpoints": rows, "began": began, **others})
    else:
        _print(rows, others)
        if began is not None:
            common.say(f"began {common.began(began)}")
    return common.CORRUPT if damaged else common.OK


def _found(directory: str) -> list[Candidate | Corrupt]:
    """Oldest first; of the directory of a checkpoint, that one."""
    if not common.is_checkpoint(directory):
        return common.look_at_all(directory)[::-1]
    path = os.path.abspath(directory)
    try:
        return [Candidate(Path(path), read_record(path))]
    except Corrupt as error:
        return [error]


def _row(each: Candidate | Corrupt, directory: str) -> dict:
    """One checkpoint, or what is wrong with its record."""
    if isinstance(each, Corrupt):
        path = os.path.relpath(directory_of(each), os.path.abspath(directory))
        step = names.step_of(os.path.basename(directory_of(each)), None)
        return {"path": path, "step": step, "damaged": each.reason}
    record, kept = each.record, "named" if each.record.name is not None else each.record.lasting
    if record.journal is not None:
        kept = f"journal {record.journal.number}, on {record.journal.base}"
    return {"path": os.path.relpath(each.path, os.path.abspath(directory)), "step": record.step,
            "generation": record.generation, "parent": record.parent, "time": record.time, "name": record.name,
            "nbytes": record.nbytes, "layers": len(record.layers),
            "kept": kept, "metrics": record.metrics, "damaged": None,
            "journal": None if record.journal is None else
            {"base": record.journal.base, "number": record.journal.number}}  # fmt: skip


def _mark_best(found: list[Candidate | Corrupt], rows: list[dict]) -> None:
    """The best one, by what the newest record says that its run keeps the best by."""
    records = [each.record for each in found if isinstance(each, Candidate) and each.record.name is None]
    policy = Policy(best=max(records, key=lambda record: record.generation).best_by if records else None)
    scores = {record.generation: score for record in records if (score := policy.score(record.metrics)) is not None}
    best = min(scores, key=lambda generation: (scores[generation], generation), default=None)
    for row in rows:
        row["best"] = not row["damaged"] and row["name"] is None and row["generation"] == best


def _others(directory: str) -> dict:
    """Slots that wait or are being written, and bad ones."""
    inside = [name for folder in (directory, os.path.join(directory, names.NAMED)) for name in names.subdirectories(folder)]
    return {"partial": sum(name.endswith(names.PARTIAL) for name in inside),
            "bad": sorted({name for name in [*inside, *os.listdir(directory)] if name.endswith(names.BAD)})}  # fmt: skip


def _print(rows: list[dict], others: dict) -> None:
    lines = []
    for row in rows:
        if row["damaged"]:
            lines.append((row["step"] if row["step"] is not None else "?", "?", "?", "?", "damaged", "", row["path"]))
        else:
            metrics = ", ".join(f"{name}={value:.6g}" for name, value in row["metrics"].items())
            lines.append((row["step"], row["generation"], common.clock(row["time"]), common.human(row["nbytes"]),
                          "best" if row["best"] else row["kept"] or "", metrics, row["path"]))  # fmt: skip
    if lines:
        common.print_table(("STEP", "GENERATION", "TIME", "SIZE", "KEPT", "METRICS", "PATH"), lines, left=(4, 5, 6))
    else:
        common.say("no checkpoints")
    for row in rows:
        if row["damaged"]:
            common.say(f"damaged: {row['path']}: {row['damaged']}")
    if others["bad"]:
        common.say(f"{len(others['bad'])} put aside: {', '.join(others['bad'])}")
