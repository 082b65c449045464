"""The monitor process, with every file operation recorded: run in the place of ``python -m fxckpt.monitor``.

``python recorded_monitor.py LOG DESCRIPTORS…``: it appends to the log that the trainer's process records to. Changes that
Python makes to the disk without the table, so that they are in no log, go to ``LOG.behind``. While ``LOG.interrupt`` is there,
the next sync of ``named/`` removes it and fails, for lack of file descriptors; the checkpoint that ``LOG.rot`` names has rotted
when it is read back.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import instruments
from trespass import rot_when_marked

from fxckpt.engine import io
from fxckpt.monitor.process import main

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod", "os.utime")


def watch(base: str, behind: Path) -> None:
    """Note what is changed below ``base`` behind the table's back."""
    found = os.open(behind, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def hook(event: str, arguments: tuple) -> None:
        path = arguments[0] if arguments and isinstance(arguments[0], (str, bytes, os.PathLike)) else None
        if path is None or not os.path.abspath(os.fsdecode(path)).startswith(base + "/"):
            return
        if event in CHANGES or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            os.write(found, f"{event} {arguments}\n".encode())

    sys.addaudithook(hook)


def interruptible(marker: Path) -> None:
    """Have the sync of ``named/`` fail when the test asks for it."""
    real = io.fsync_dir

    def fsync_dir(path: str, *below: int) -> None:
        if os.path.basename(path) == "named" and marker.exists():
            os.unlink(marker)
            instruments.fail(1, errno.EMFILE, "open")
        real(path, *below)

    io.fsync_dir = fsync_dir


if __name__ == "__main__":
    log, *descriptors = sys.argv[1:]
    instruments.record(log, append=True)
    watch(os.path.join(os.path.dirname(log), "disk"), Path(log + ".behind"))
    interruptible(Path(log + ".interrupt"))
    rot_when_marked(Path(log + ".rot"), Path(log).parent / "acks")
    sys.exit(main(descriptors))
