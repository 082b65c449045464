"""Remove checkpoints that retention would give up, and the slots that wait to be used again.

What stays: the newest --keep that verify, named saves, those kept for good (unless --lasting), and the best by a metric (by
default the one the run kept its best by). What is removed loses its name first, durably. Needs the store's lock: while a
trainer runs it stops with exit status 5, and the trainer prunes by itself. --dry-run needs no lock and changes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from contextlib import suppress
from typing import Any

from fxckpt.cli import common
from fxckpt.errors import Corrupt, NoCheckpoint, SetupError
from fxckpt.store import names
from fxckpt.store.identity import read_store_id
from fxckpt.store.reader import Candidate, directory_of, records
from fxckpt.store.record import MIN
from fxckpt.store.retention import BAD, GOOD, UNKNOWN, CheckpointStatus, Policy, ancestors, excess
from fxckpt.store.slots import Store

HELP = "remove checkpoints that nobody needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="the store")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="good checkpoints to keep (default: 2)")
    parser.add_argument("--keep-best", metavar="METRIC[:max]", help="keep the best by this metric; none: no best one")
    parser.add_argument("--lasting", action="store_true", help="give up those kept for good, too")
    parser.add_argument("--bad", action="store_true", help="remove .bad directories, too (replace the disk first)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


def run(args: argparse.Namespace) -> int:
    if args.keep < 1:
        raise SetupError(f"--keep {args.keep}: at least 1 checkpoint stays")
    common.look(args.dir)  # refuses what is no store before a lock is made in it
    if args.dry_run:
        return _prune(args, None)
    store = Store(args.dir)
    store.open()
    try:
        return _prune(args, store)
    finally:
        store.close()


def _prune(args: argparse.Namespace, store: Store | None) -> int:
    """Decide, then do it."""
    stock, going = _decide(args)
    slots = _with_suffix(args.dir, names.PARTIAL)
    bad = _with_suffix(args.dir, names.BAD) if args.bad else []
    reasons = {**dict(going), **dict.fromkeys(slots, "waiting slot"), **dict.fromkeys(bad, "bad")}
    rows: list[dict[str, Any]] = [{"path": path, "why": why, "nbytes": _size(path)} for path, why in reasons.items()]
    if store is not None:
        store.discard([path for path, _ in going])
        store.remove_bad([os.path.basename(path) for path in bad])
    left = [row for row in rows if store is not None and os.path.lexists(row["path"])]
    rows = [row for row in rows if row not in left]
    if args.json:
        remaining = [row["path"] for row in left]
        common.print_json({"removed": rows, "left": remaining, "dry_run": args.dry_run, "verified": stock.verified})
    else:
        for row in rows:
            did = "would remove" if args.dry_run else "removed"
            common.say(f"{did} {row['path']} ({row['why']}, {common.human(row['nbytes'])})")
        total = common.human(sum(row["nbytes"] for row in rows))
        common.say(f"{total} in {len(rows)} directories" if rows else "nothing to remove")
    for row in left:
        common.say(f"fxckpt: {row['path']} could not be removed", file=sys.stderr)
    return common.FAILED if left else common.OK


def _decide(args: argparse.Namespace) -> tuple[Stock, list[tuple[str, str]]]:
    """What goes, and why. Without the lock a trainer may take back what is being read: then look again."""
    for _ in range(common.LOOKS):
        with suppress(NoCheckpoint):
            stock = Stock(args.dir, args.keep, args.keep_best, args.lasting)
            return stock, stock.excess()
    raise NoCheckpoint(f"{args.dir}: the checkpoints were taken back by the trainer while they were read, again and again")


class Stock:
    """The checkpoints of a store as retention sees them, each with its path."""

    def __init__(self, directory: str, keep: int, best: str | None, lasting: bool):
        self._keep, self._root = keep, os.path.abspath(directory)
        self.verified: int = 0
        own = read_store_id(self._root)
        # Named saves, and what another store wrote, are not ours to give up.
        found = [each for each in common.look(directory) if os.path.dirname(directory_of(each)) == self._root
                 and (isinstance(each, Corrupt) or own in (None, each.record.store_id))]  # fmt: skip
        records = [each.record for each in found if isinstance(each, Candidate)]
        policy = Policy(keep, best=next((record.best_by for record in records), None))  # as the newest run kept its best
        if best is not None:
            metric, _, direction = best.partition(":")
            policy = Policy.make(keep, None, None, None if best == "none" else (metric, direction or MIN))
        self._parents = {record.generation: record.parent for record in records}
        self._paths: dict[int, str] = {}
        self._known: dict[int, CheckpointStatus] = {}
        for number, each in enumerate(found, -len(found)):
            known = CheckpointStatus(number, None, BAD)  # a damaged record: told apart by a number below 0
            if isinstance(each, Candidate):
                record, kept = each.record, each.record.lasting is not None and not lasting
                score = policy.score(record.metrics)
                known = CheckpointStatus(record.generation, record.parent, UNKNOWN, kept, score)
            self._paths[known.generation] = directory_of(each)
            self._known[known.generation] = known

    def excess(self) -> list[tuple[str, str]]:
        """(path, why) of what goes. Raises Corrupt if nothing verifies: then nothing is given up."""
        newest = self._newest_good()
        if newest is None:
            if self._known:
                raise Corrupt(self._root, "no checkpoint verifies, so none is removed")
            return []
        lineage = ancestors(self._parents, newest)
        out = []
        for each in excess(list(self._known.values()), self._keep, lineage, newest, self._examine):
            why = "damaged" if each.trust == BAD else "abandoned" if each.generation not in lineage else "older"
            out.append((self._paths[each.generation], why))
        return [*self._records(dict(out)), *out]

    def _records(self, going: dict[str, str]) -> list[tuple[str, str]]:
        """(path, why) of the records of the journal that go: damaged ones, and those on a checkpoint that goes or has gone."""
        stay = {generation for generation, path in self._paths.items() if path not in going}
        out = []
        for each in records(self._root):
            if isinstance(each, Corrupt):
                out.append((directory_of(each), "damaged"))
            elif each.record.parent not in stay:
                out.append((str(each.path), "on a checkpoint that goes" if each.record.parent in self._paths else "on none"))
        return out

    def _newest_good(self) -> int | None:
        """The generation of the newest one that verifies; what is found on the way is noted."""
        for generation, known in sorted(self._known.items(), reverse=True):
            if known.trust != BAD:
                self._known[generation] = dataclasses.replace(known, trust=self._examine(known))
                if self._known[generation].trust == GOOD:
                    return generation
        return None

    def _examine(self, known: CheckpointStatus) -> str:
        """Read it."""
        self.verified += 1
        try:
            common.verify(self._paths[known.generation])
        except Corrupt:
            return BAD
        return GOOD


def _with_suffix(directory: str, suffix: str) -> list[str]:
    root = os.path.abspath(directory)
    found = os.listdir(root) if suffix == names.BAD else names.subdirectories(root)  # what was put aside may be anything
    return [os.path.join(root, name) for name in sorted(found)
            if name.endswith(suffix) and (suffix == names.BAD or names.is_slot(name))]  # fmt: skip


def _size(path: str) -> int:
    """Bytes of the files in a directory."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return 0
