"""Read every byte of checkpoints and compare it with the record: all of a store's, or one. Exit status 3 if any is damaged.

Safe while a trainer writes: a checkpoint that it takes back meanwhile is reported as gone, not as damaged.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from fxckpt.cli import common
from fxckpt.errors import Corrupt, NoCheckpoint
from fxckpt.store import about
from fxckpt.store.reader import directory_of

HELP = "read every byte and check it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_store(parser)
    parser.add_argument("which", nargs="?", metavar="WHICH", help="one of them, as for inspect; default: all")
    parser.add_argument(
        "--replay", action="store_true", help="make the steps of the journal again, and compare them with training's"
    )


def run(args: argparse.Namespace) -> int:
    if args.which is not None or common.is_checkpoint(args.dir):
        chosen = [str(common.open_checkpoint(args.dir, args.which).path)]
    else:
        chosen = [directory_of(each) for each in reversed(common.look_at_all(args.dir))]
    results = [_verify(path) for path in chosen]
    if args.replay:
        results += _replay(args.dir, set(chosen))
    if args.json:
        common.print_json({"checkpoints": results})
    else:
        for each in results:
            common.say(f"{each['verdict']:8} {each['path']}" + (f": {each['detail']}" if each["detail"] else ""))
        if (began := next((each["began"] for each in results if each.get("began")), None)) is not None:
            common.say(f"began {common.began(began)}")
        if not results:
            common.say("no checkpoints")
    return common.CORRUPT if any(each["verdict"] == "damaged" for each in results) else common.OK


def _replay(directory: str, chosen: set[str]) -> list[dict[str, Any]]:
    """The verdicts on the steps of the journal, each row once, as far as it is of those that were ``chosen``."""
    from fxckpt.loading.whole import check_again

    out: list[dict[str, Any]] = []
    rows = [row for row in common.steps_of_journal(directory) if any(str(each.path) in chosen for each in row.records)]
    for row in sorted(rows, key=lambda each: each.base.record.generation):
        what = f"steps {row.records[0].record.step} to {row.record.step}, made again"
        found = _verdict(str(row.path), partial(check_again, row))
        out.append({**found, "detail": found["detail"] or what})
    return out


def _verify(path: str) -> dict[str, Any]:
    """The verdict on one checkpoint: good, damaged, or gone."""
    return _verdict(path, lambda: about.origin(common.verify(path)))


def _verdict(path: str, check: Callable[[], Any]) -> dict[str, Any]:
    """What ``check`` raises or returns, in words."""
    try:
        return {"path": path, "verdict": "good", "detail": None, "began": check()}
    except NoCheckpoint as error:
        return {"path": path, "verdict": "gone", "detail": str(error)}
    except Corrupt as error:
        return {"path": path, "verdict": "damaged", "detail": str(error), "file": os.path.basename(error.path),
                "layer": error.layer, "offset": error.offset, "reason": error.reason}  # fmt: skip
