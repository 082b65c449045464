"""What somebody does to a store while its calls are recorded: through the same table, so that it is in the log of a crash model.

A symbolic link is in no table: a mark in ``acks`` says where one is made. And so does one that a checkpoint is ruined.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, unquote

import instruments

from fxckpt.engine import io
from fxckpt.store.read_back import ReadBack

LINK = "link~"


def link(path: Path, acks: Path, target: Path) -> None:
    """Put a link to ``target`` in the place of ``path``, whatever is there."""
    remove(path)
    io.mkdir(acks / f"{LINK}{quote(f'{path}>{target}', safe='')}")
    path.symlink_to(target)


def with_links(log: list[instruments.Call]) -> list[instruments.Call]:
    """A log in which the links are made where their marks are."""
    return [_as_link(call) if f"/acks/{LINK}" in call.path else call for call in log]


def _as_link(mark: instruments.Call) -> instruments.Call:
    path, _, target = unquote(mark.path.partition(f"/acks/{LINK}")[2]).partition(">")
    return replace(mark, op="symlink", path=path, target=target)


def remove(path: Path) -> None:
    """A file, or a directory with what is in it; fine if it is not there."""
    if path.is_dir() and not path.is_symlink():
        for each in sorted(path.iterdir()):
            remove(each)
        io.rmdir(path)
    elif os.path.lexists(path):
        io.unlink(path)


def change(path: Path, how: Callable[[int], object], flags: int = os.O_RDWR) -> None:
    """Do something to an open file."""
    fd = io.open(path, flags)
    try:
        how(fd)
    finally:
        io.close(fd)


def cut(path: Path) -> None:
    change(path, lambda fd: io.ftruncate(fd, path.stat().st_size // 2))


def rot(path: Path) -> None:
    """Some bytes change."""
    change(path, lambda fd: io.pwrite(fd, b"rotten", path.stat().st_size // 2))


def swap(path: Path) -> None:
    """Another file of the same size is in its place."""
    data = path.read_bytes()
    remove(path)
    change(path, lambda fd: io.pwrite(fd, data[:-6] + b"rotten", 0), os.O_RDWR | os.O_CREAT)


@contextmanager
def locked_for_reading(path: Path) -> Iterator[None]:
    """The lock that anybody who may read the file can take. Kept: to close it would end the lock of a trainer of this process."""
    fd = os.open(path, os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    yield
    os.close(fd)


def rot_when_marked(mark: Path, acks: Path) -> None:
    """Where checkpoints are read back: the one that ``mark`` names, if it is there, has rotted."""
    real = ReadBack.read

    def read(self: ReadBack, busy: Callable[[], bool]) -> object:
        slot = None if self._waiting is None else self._waiting[0]
        name = "" if slot is None else slot.entry if slot.name is None else f"named/{slot.name}"
        if slot is not None and mark.exists() and mark.read_text() == name:
            os.unlink(mark)
            io.mkdir(acks / f"ruined-{slot.generation}-{quote(name, safe='')}")
            rot(Path(slot.path) / "model.safetensors")
        return real(self, busy)

    ReadBack.read = read
