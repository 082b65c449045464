"""Whose directory is this: a store, which one, or something else that nobody may write to."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Sequence

from fxckpt.errors import Corrupt, NotAStore
from fxckpt.store import names
from fxckpt.store.checks import parse_json
from fxckpt.store.files import read_small, replace_file, sync_ancestors
from fxckpt.store.folder import Folder
from fxckpt.store.record import FORMAT, Record

_STORE_BYTES = 1 << 16  # store.json has under a hundred
_FIXED = {names.STORE, names.LOCK, names.NAMED, names.STORE + names.TEMPORARY, names.LOCK + names.TEMPORARY}
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
    """Raise ``NotAStore`` if ``root`` is there and holds something else. Missing or empty is fine, damaged too. A power cut may
    leave a store with any part of what it first writes, so without a readable ``store.json`` a store is a directory in which
    every entry has a name that a store gives."""
    if os.path.lexists(root) and not os.path.isdir(root):
        raise NotAStore(f"{root} is not a directory")
    if not os.path.exists(root) or read_store_id(root) is not None:
        return
    others = set(os.listdir(root)) - _FIXED - _TOLERATED
    foreign = sorted(name for name in others if not names.is_given(name) and not name.endswith(names.BAD))
    if foreign:
        some = ", ".join(map(repr, foreign[:3])) + (" and more" if len(foreign) > 3 else "")
        what = f"{root} holds {some} and no {names.STORE}: it is not a checkpoint store"
        raise NotAStore(f"{what}. Name an empty directory, or one that fxckpt made")


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
