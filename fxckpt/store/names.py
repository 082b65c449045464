"""Which entry of a store's directory means what.

``step-000001200``, ``step-000001200-g57`` and ``named/<name>`` are checkpoints; ``slot-3.partial`` and
``named/<name>.partial`` are being written or wait to be; ``….bad`` holds what a failing disk may have garbled.
"""

from __future__ import annotations

import os
import re

from fxckpt.errors import Corrupt, NotAStore, SetupError
from fxckpt.store.files import read_small
from fxckpt.store.record import FORMAT, Record
from fxckpt.store.safe_json import parse_json

STORE, LOCK, NAMED, COMMIT, STATE = "store.json", "lock", "named", "commit.json", "state.safetensors"
PARTIAL, BAD, TEMPORARY = ".partial", ".bad", ".tmp"
_STORE_BYTES = 1 << 16  # store.json has under a hundred

_STEP = re.compile(r"step-([0-9]{9,18})(?:-g([0-9]{1,18}))?")
_SLOT = re.compile(r"slot-([0-9]{1,9})(?:\.partial|\.bad)")
_TOLERATED = frozenset({".gitkeep", ".gitignore", "lost+found"})  # in a directory that otherwise counts as empty


def step_name(step: int) -> str:
    """The directory of the checkpoint of ``step``."""
    return f"step-{step:09d}"


def misplaced(path: str, record: Record) -> str | None:
    """Why this record cannot be that of the checkpoint directory ``path``, by the directory's name; None if it can.

    A directory with any other name (a copy somewhere else, a slot) says nothing, so any record can be its own.
    """
    parent, name = os.path.split(path)
    if match := _STEP.fullmatch(name):
        wrong = record.step != int(match[1]) or record.name is not None or match[2] not in (None, str(record.generation))
    else:
        wrong = os.path.basename(parent) == NAMED and not name.endswith((PARTIAL, BAD)) and record.name != name
    if not wrong:
        return None
    whose = f"step {record.step}, generation {record.generation}" + (f", named {record.name!r}" if record.name else "")
    return f"it is the record of another checkpoint ({whose}), not that of {name}"


def step_of(name: str) -> int | None:
    """The step that a checkpoint directory's name says, or None if it is not one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def generation_of(name: str) -> int:
    """The generation that a checkpoint directory's name says, or -1 if it says none."""
    match = _STEP.fullmatch(name)
    return int(match[2]) if match and match[2] else -1


def slot_number(name: str) -> int | None:
    """The number in ``slot-3.partial`` or ``slot-3.bad``, or None if it is neither."""
    match = _SLOT.fullmatch(name)
    return int(match[1]) if match else None


def check_name(name: str) -> None:
    """Refuse a name for a named save that is not a plain directory name, or that would read as something else."""
    plain = type(name) is str and name and name.isprintable() and not set("/\\") & set(name) and not name.startswith(".")
    if not plain or name.endswith((PARTIAL, BAD, TEMPORARY)) or len(os.fsencode(name)) > 200 or step_of(name) is not None:
        raise SetupError(
            f"{name!r} cannot name a checkpoint: it becomes a directory, so it must be 1 to 200 bytes of printable "
            f"text without slashes, not begin with a dot, not end in {PARTIAL}, {BAD} or {TEMPORARY}, and not "
            "be called as the checkpoint of a step is"
        )


def subdirectories(path: str) -> list[str]:
    """Names of the real directories in ``path``, sorted; none if it is not there. Links are not followed."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def committed(root: str) -> list[str]:
    """Paths of all checkpoint directories of the store, those with names included, whatever is in them."""
    steps = [os.path.join(root, name) for name in subdirectories(root) if step_of(name) is not None]
    named = os.path.join(root, NAMED)
    return steps + [os.path.join(named, name) for name in subdirectories(named) if not name.endswith((PARTIAL, BAD))]


def _is_ours(name: str) -> bool:
    """Whether a store could have an entry of this name."""
    fixed = {STORE, LOCK, NAMED, STORE + TEMPORARY} | _TOLERATED
    return name in fixed or step_of(name) is not None or slot_number(name) is not None


def read_store_id(root: str) -> str | None:
    """The id in ``store.json``; None if the file is missing or damaged. Raises ``NotAStore`` for a newer format."""
    path = os.path.join(root, STORE)
    try:
        found = parse_json(read_small(path, _STORE_BYTES), path, depth=2, what=STORE)
    except (Corrupt, FileNotFoundError):
        return None
    if type(found) is not dict or type(found.get("store_id")) is not str or type(found.get("format")) is not int:
        return None
    if found["format"] > FORMAT:
        raise NotAStore(f"{path} has format {found['format']}; this fxckpt knows {FORMAT}. Use a newer fxckpt")
    return found["store_id"]


def check_store(root: str) -> None:
    """Raise ``NotAStore`` if ``root`` is there and holds something else. Missing or empty is fine, damaged too.

    A power cut may leave a store with any part of what it first writes, so without a readable ``store.json`` a store
    is a directory in which every entry has a name that a store gives.
    """
    if os.path.lexists(root) and not os.path.isdir(root):
        raise NotAStore(f"{root} is not a directory")
    if not os.path.exists(root) or read_store_id(root) is not None:
        return
    foreign = sorted(name for name in os.listdir(root) if not _is_ours(name))
    if foreign:
        some = ", ".join(map(repr, foreign[:3])) + (" and more" if len(foreign) > 3 else "")
        raise NotAStore(
            f"{root} holds {some} and no {STORE}: it is not a checkpoint store. Name an empty directory, or one that fxckpt made"
        )
