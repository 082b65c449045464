"""``fxckpt``, also ``python -m fxckpt``: look at, check, compare, import, export and clean up checkpoints, and measure a disk.

One module per command, each with ``HELP``, ``add_arguments`` and ``run``; ``docs/cli.md`` is the manual. torch is imported
by ``import`` and ``export`` for the formats that are torch's, and by ``diff`` where numpy lacks a type; by nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
import os
import sys
from collections.abc import Sequence
from typing import Any

from fxckpt.cli import common
from fxckpt.errors import Corrupt, FxckptError, NoCheckpoint, NotAStore, SetupError, StoreLocked
from fxckpt.store.directory import local_path

COMMANDS = ("ls", "inspect", "verify", "diff", "watch", "plot", "import", "export", "prune", "bench", "doctor")

PATHS = ("dir", "source", "out", "config")
"""Arguments that name a place on the disk, in whatever command."""

EPILOG = f"""exit status: {common.OK} done, {common.FAILED} it failed, {common.USAGE} wrong usage,
{common.CORRUPT} stored bytes do not verify, {common.NOTHING} no such checkpoint or not a store,
{common.IN_USE} a trainer writes to the store"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="fxckpt", description="Checkpoints of fxckpt: look at them, check them, use them.",
                                  epilog=EPILOG)  # fmt: skip
    version: str = importlib.import_module("fxckpt").__version__
    top.add_argument("--version", action="version", version=f"fxckpt {version}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"fxckpt.cli.{name}{'_' * keyword.iskeyword(name)}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__, epilog=EPILOG,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    top = parser()
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help()
        return common.OK
    try:
        for name in PATHS:
            if getattr(args, name, None) is not None:
                setattr(args, name, local_path(getattr(args, name)))
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read us has seen enough. The interpreter flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return common.OK
    except KeyboardInterrupt:
        return 130
    except (FxckptError, OSError) as error:
        return _failed(error, args.json)


def _failed(error: Exception, as_json: bool) -> int:
    """Say what went wrong, and with which exit status."""
    if as_json:
        found: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
        if isinstance(error, Corrupt):
            found |= {"path": error.path, "layer": error.layer, "offset": error.offset, "reason": error.reason}
        common.print_json({"error": found})
    common.say(f"fxckpt: {error}", file=sys.stderr)
    return next((status for kind, status in _STATUS if isinstance(error, kind)), common.FAILED)


_STATUS = ((Corrupt, common.CORRUPT), ((NoCheckpoint, NotAStore), common.NOTHING), (StoreLocked, common.IN_USE),
           (SetupError, common.USAGE))  # fmt: skip
