"""Whose directory is this: a store, which one, or something else that nobody may write to."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Sequence
from contextlib import suppress

from fxckpt.engine import io
from fxckpt.errors import Corrupt, NotAStore
from fxckpt.store import names
from fxckpt.store.checks import parse_json
from fxckpt.store.files import read_small, replace_file, sync_ancestors
from fxckpt.store.folder import Folder
from fxckpt.store.lock import holder
from fxckpt.store.record import FORMAT, Record

_STORE_BYTES = 1 << 16  # store.json has under a hundred
NOTES = {b"monitor", b"finishing"}  # what a lock file may say
_TOLERATED = {".gitkeep", ".gitignore", "lost+found"}  # in a directory that otherwise counts as empty


def read_store_id(root: str) -> str | None:
    """The id in ``store.json``; None if the file is missing or damaged. Raises ``NotAStore`` for a newer format."""
    path = os.path.join(root, names.STORE)
    try:
        found = parse_json(read_small(path, _STORE_BYTES), path, depth=2, what=names.STORE)
    except (Corrupt, FileNotFoundError):
        return None
    if type(found) is not dict or type(found.get("store_id")) is not str or type(found.get("format")) is not int:
        return None
    if found["format"] > FORMAT:
        raise NotAStore(f"{path} has format {found['format']}; this fxckpt knows {FORMAT}. Use a newer fxckpt")
    return found["store_id"]


def check_store(root: str) -> None:
    """Raise ``NotAStore`` if ``root`` is there and cannot be a store, or the beginning of one. Missing or empty is fine, damaged
    too. Files of others beside ours are fine as well, unless one has a name that a store gives: that one we would write to or
    rename. A power cut may leave a store with any part of what it first writes, so where ``store.json`` cannot be read, what is
    ours is told by the records of checkpoints, or by there being nothing else."""
    if os.path.lexists(root) and not os.path.isdir(root):
        raise NotAStore(f"{root} is not a directory")
    if not os.path.exists(root) or read_store_id(root) is not None:
        return
    ours, others = _entries(root)
    if not others or _has_checkpoint(root):
        return
    if taken := [name for name in ours if not _is_beginning(root, name)]:
        raise NotAStore(
            f"{root} holds {_some(taken)} and no {names.STORE} that says that a store gave that name: what lies there is "
            "somebody else's. Move it away, or name another directory"
        )


def check_begun(root: str) -> None:
    """Raise ``NotAStore`` if ``root`` is there, has files in it, and none of them is a store's: for who reads. A training may
    begin a store there, but whoever wants something loaded means another directory."""
    check_store(root)
    if os.path.isdir(root) and read_store_id(root) is None:
        ours, others = _entries(root)
        if others and not ours:
            what = f"{root} holds {_some(others)} and no {names.STORE}: it is not a checkpoint store"
            raise NotAStore(f"{what}. Name the directory that was given to compile_step")


def _entries(root: str) -> tuple[list[str], list[str]]:
    """What is in a directory: by names that a store gives, and by others."""
    found = sorted(set(os.listdir(root)) - _TOLERATED)
    return [name for name in found if names.is_given(name)], [name for name in found if not names.is_given(name)]


def _some(found: Sequence[str]) -> str:
    return ", ".join(map(repr, found[:3])) + (" and more" if len(found) > 3 else "")


def _has_checkpoint(root: str) -> bool:
    """Whether one of the records that are there, of checkpoints or of the journal, is whole."""
    for path in [*names.committed(root), *names.recorded(root)]:
        file = os.path.join(path, names.COMMIT)
        with suppress(Corrupt, OSError):
            if Record.from_bytes(read_small(file), file).misplaced(path) is None:
                return True
    return False


def _is_beginning(root: str, name: str) -> bool:
    """Whether an entry is such as a store has before it has a checkpoint: its lock, a ``store.json`` that a power cut emptied,
    slots."""
    path = os.path.join(root, name)
    if name == names.LOCK and holder(root) == os.getpid():
        return True  # and not opened: closing it would end a lock of ours
    if name in (names.NAMED, names.RANKS, names.REPLICAS) or names.is_slot(name):
        if os.path.islink(path) or not os.path.isdir(path):
            return False
        return name != names.NAMED or all(each.endswith(names.UNFINISHED) for each in os.listdir(path))
    with suppress(Corrupt, OSError):
        content = read_small(path, _STORE_BYTES).strip(b"\0")
        return not content or (name.startswith(names.LOCK) and content in NOTES)
    return False


def keep_id(root: str) -> str | None:
    """The store's id, durable from now on: a store that never held a checkpoint is to be known again. None if there is none."""
    found = read_store_id(root) if os.path.isdir(root) else None
    if found is not None:
        folder = Folder.open(root)
        try:
            with folder.opened(names.STORE, os.O_RDONLY) as fd:
                io.fsync(fd)
            folder.sync()
        finally:
            folder.close()
    return found


def identify(root: Folder, records: Sequence[Record]) -> str:
    """The store's id; if ``store.json`` is missing or damaged it is written, with the id of the newest of ``records``."""
    found = read_store_id(root.path)
    if found is None:
        # Edge A: before store.json is there, so that its being there means that all directories above it are durable.
        sync_ancestors(root.path)
        found = max(records, key=lambda record: record.generation).store_id if records else uuid.uuid4().hex
        content = json.dumps({"format": FORMAT, "store_id": found}) + "\n"
        # Not made durable: if it is lost, the id is taken from a record.
        if (there := root.find(names.STORE)) is not None and not stat.S_ISREG(there.st_mode):
            root.put_aside(names.STORE)
        replace_file(root, names.STORE, content.encode(), durable=False)
    return found
