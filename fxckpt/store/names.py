"""What a store calls its files, directories and tensors, and what each name means.

``step-000001200``, ``step-000001200-g57`` and ``named/<name>`` are checkpoints; ``slot-3.partial`` and
``named/<name>.partial`` are being written or wait to be; ``….bad`` holds what a failing disk may have garbled.
``journal-000001201`` is a record of the journal, ``journal-slot-3.partial`` a directory for one.
``replicas/rank-00003`` has checkpoints that are another rank's.
"""

from __future__ import annotations

import os
import re

from fxckpt.errors import SetupError

STORE, LOCK, NAMED, RANKS, REPLICAS = "store.json", "lock", "named", "ranks", "replicas"
"""In the store's directory. ``ranks`` has a directory with a lock for each rank that writes beside rank 0, ``replicas`` one for
each rank whose checkpoints are kept here too."""

COMMIT, MODEL, OPTIMIZER, STATE = "commit.json", "model.safetensors", "optimizer.safetensors", "state.safetensors"
"""In a checkpoint's: the record; parameters and buffers; the optimizers' state; everything else that holds tensors."""

OWN, PART, INDEX = "own.safetensors", "part.json", f"{MODEL}.index.json"
"""Where several ranks write one checkpoint: buffers of a rank other than 0; its record; in which file each of the model's tensors
is."""

PARTIAL, BAD, TEMPORARY, SPARE = ".partial", ".bad", ".tmp", ".spare"

UNFINISHED = (PARTIAL, BAD)
"""What ends in one of these is no checkpoint."""

GRADIENTS = "gradients.safetensors"
"""In a record of the journal: the gradients that a step was made with."""

STEPS, RECORDS = "step", "journal"
"""What the directories of checkpoints, and those of records of the journal, begin with."""

_COMMITTED = re.compile(r"(step|journal)-([0-9]{9,18})(?:-g([0-9]{1,18}))?")
_SHARED = re.compile(r"(model|optimizer|state|own|part|gradients)-([0-9]{5,9})-of-([0-9]{5,9})(\.safetensors|\.json)")
_REPLICAS = re.compile(r"rank-([0-9]{5,9})")
_SLOT = re.compile(r"(journal-)?slot-([0-9]{1,9})(?:\.partial|\.bad)")


def state_key(optimizer: int, state: str, parameter: str) -> str:
    """The key of an optimizer's state in its file: ``exp_avg/h.0.weight``; further optimizers of the run get a prefix."""
    return f"{state}/{parameter}" if optimizer == 0 else f"optimizer{optimizer}:{state}/{parameter}"


def of_rank(file: str, rank: int, world: int) -> str:
    """What this rank of so many calls a file that each of them writes: ``model-00001-of-00002.safetensors``."""
    stem, dot, suffix = file.partition(".")
    return f"{stem}-{rank + 1:05d}-of-{world:05d}{dot}{suffix}"


def rank_name(rank: int) -> str:
    """The directory of a rank in ``ranks``."""
    return f"{rank:05d}"


def replicas_name(rank: int) -> str:
    """The directory in ``replicas`` that has a rank's checkpoints."""
    return f"rank-{rank:05d}"


def replicas_rank(name: str) -> int | None:
    """The rank whose checkpoints a directory in ``replicas`` has, or None if its name is none of ours."""
    match = _REPLICAS.fullmatch(name)
    return int(match[1]) if match else None


def written_as(file: str) -> str:
    """What each rank calls a file of its own: ``model.safetensors`` for ``model-00001-of-00002.safetensors``."""
    match = _SHARED.fullmatch(file)
    return file if match is None else match[1] + match[4]


def kind_of(file: str) -> str:
    """What is in a file, by its name where one process writes all. A rank's own buffers are of the model."""
    kind = written_as(file)
    return MODEL if kind == OWN else kind


def step_name(step: int, generation: int | None = None, kind: str = STEPS) -> str:
    """The directory of the checkpoint (or of another ``kind``) of ``step``; with ``generation``, of one beside that."""
    return f"{kind}-{step:09d}" if generation is None else f"{kind}-{step:09d}-g{generation}"


def step_of(name: str, kind: str | None = STEPS) -> int | None:
    """The step that a checkpoint directory's name says, or None if it is not one of this ``kind``; None: of either."""
    match = _COMMITTED.fullmatch(name)
    return int(match[2]) if match and kind in (None, match[1]) else None


def generation_of(name: str) -> int | None:
    """The generation that the name of a checkpoint's or record's directory says, or None if it says none."""
    match = _COMMITTED.fullmatch(name)
    return int(match[3]) if match and match[3] else None


def slot_name(number: int, kind: str = STEPS) -> str:
    """What a slot of this number is called, less its suffix."""
    return f"slot-{number}" if kind == STEPS else f"{kind}-slot-{number}"


def slot_number(name: str, kind: str = STEPS) -> int | None:
    """The number in ``slot-3.partial`` or ``slot-3.bad``, or None if it is no slot of this ``kind``."""
    match = _SLOT.fullmatch(name)
    return int(match[2]) if match and (match[1] is None) == (kind == STEPS) else None


def is_slot(name: str) -> bool:
    """Is it the name of a slot, for checkpoints or for records?"""
    return _SLOT.fullmatch(name) is not None


def is_of_journal(name: str) -> bool:
    """Is a directory of this name for a record of the journal?"""
    return name.startswith(f"{RECORDS}-")


def is_given(name: str) -> bool:
    """Whether a store gives such a name to something in its directory."""
    fixed = (STORE, LOCK, NAMED, RANKS, REPLICAS, STORE + TEMPORARY, LOCK + TEMPORARY)
    return name in fixed or _COMMITTED.fullmatch(name) is not None or is_slot(name) or name.endswith(BAD)


def check_name(name: str) -> None:
    """Refuse a name for a named save that is not a plain directory name, or that would read as something else."""
    plain = type(name) is str and name and name.isprintable() and not set("/\\") & set(name) and not name.startswith(".")
    if not plain or name.endswith((PARTIAL, BAD, TEMPORARY)) or len(os.fsencode(name)) > 200 or _COMMITTED.fullmatch(name):
        raise SetupError(
            f"{name!r} cannot name a checkpoint: it becomes a directory, so it must be 1 to 200 bytes of printable text without "
            f"slashes, not begin with a dot, not end in {PARTIAL}, {BAD} or {TEMPORARY}, and not be called as that of a step is"
        )


def subdirectories(path: str) -> list[str]:
    """Names of the real directories in ``path``, sorted; none if it is no directory. No link in it is followed."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def saved(root: str) -> list[str]:
    """Names of the directories in ``named``, unless that is a link."""
    named = os.path.join(root, NAMED)
    return [] if os.path.islink(named) else subdirectories(named)


def replicated(root: str) -> list[tuple[int, str]]:
    """(rank, path) of all replicas beside the store, whatever is in them, unless ``replicas`` is a link."""
    top = os.path.join(root, REPLICAS)
    of_ranks = [] if os.path.islink(top) else [(replicas_rank(name), os.path.join(top, name)) for name in subdirectories(top)]
    return [
        (rank, os.path.join(path, name))
        for rank, path in of_ranks if rank is not None
        for name in subdirectories(path) if step_of(name) is not None
    ]  # fmt: skip


def is_replica(path: str) -> bool:
    """Is the checkpoint in this directory one that lies beside a store?"""
    return os.path.basename(os.path.dirname(os.path.dirname(path))) == REPLICAS


def recorded(root: str) -> list[str]:
    """Paths of all records of the journal, whatever is in them."""
    return [os.path.join(root, name) for name in subdirectories(root) if step_of(name, RECORDS) is not None]


def committed(root: str) -> list[str]:
    """Paths of all checkpoint directories of the store, named ones too, whatever is in them."""
    steps = [os.path.join(root, name) for name in subdirectories(root) if step_of(name) is not None]
    named = os.path.join(root, NAMED)
    return steps + [os.path.join(named, name) for name in saved(root) if not name.endswith(UNFINISHED)]
