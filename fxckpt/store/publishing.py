"""The last steps of a commit: a slot whose files are durable describes itself, and gets the name that makes it a checkpoint.

What must be on the disk before what is named by letters, in docs/format.md, too.
"""

from __future__ import annotations

import errno
import logging
import stat

from fxckpt.errors import SaveFailed
from fxckpt.store import names
from fxckpt.store.files import replace_file
from fxckpt.store.folder import Folder
from fxckpt.store.pool import Pool
from fxckpt.store.record import Record
from fxckpt.store.slot import Slot

log: logging.Logger = logging.getLogger("fxckpt")

_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV})


def seal(slot: Slot, record: Record) -> None:
    """Step 3: from here the directory describes itself."""
    folder, wanted = slot.held(), {*(file.name for file in record.files), *slot.beside}
    entries = folder.entries()
    for name, found in entries.items():
        if not stat.S_ISREG(found.st_mode):
            folder.put_aside(name, slot.parent)
        elif name not in wanted:
            folder.unlink(name)  # of an earlier plan: nobody would verify it
    for file in record.files:
        slot.check_written(file)
    slot.check_beside(entries)
    # Edge C: the record's bytes, and
    replace_file(folder, names.COMMIT, record.to_bytes(), durable=True)
    # edge S: the names in the slot before its final name, else a checkpoint could lack its record or a file.
    folder.sync()


def publish(slot: Slot, record: Record, pool: Pool) -> None:
    """Step 4: the rename that makes it a checkpoint, and the sync that makes it one for good."""
    kind = names.STEPS if record.journal is None else names.RECORDS
    final = slot.name or names.step_name(record.step, kind=kind)
    if slot.name is None and slot.parent.find(final) is not None:
        final = names.step_name(record.step, record.generation, kind)  # an earlier life, or one rolled back, came past this step
    slot.target = final
    taken = slot.replaces is not None and slot.replaces == slot.parent.inode(final)
    give = slot.parent.exchange if taken else slot.parent.rename  # at no instant nothing has the name
    try:
        give(slot.entry, final)
    except OSError as error:
        if taken and error.errno in _NO_EXCHANGE:
            detail = f"{slot.parent.at(final)} is of an earlier life, and this file system cannot exchange their names: remove it"
            raise SaveFailed("exchange", slot.path, detail=detail) from error
        if error.errno != errno.EXDEV:
            raise
        _move_files(slot, pool)
        give(slot.entry, final)
    before, slot.entry = slot.entry, final
    if not slot.is_itself():
        slot.suspect = True
        raise SaveFailed("rename", slot.path, detail="somebody put another directory in its place while it was written")
    # Edge P: before the caller is told and anything older is given up, else a power cut could take this one back.
    slot.parent.sync()
    if taken:
        _remove(slot.parent, before)


def _remove(parent: Folder, entry: str) -> None:
    """What had the name of a named save before, of which edge P is edge X, too. If it stays, the next ``open`` removes it."""
    try:
        parent.remove_tree(entry)
    except OSError as error:
        log.warning("%s, which another save took the place of, cannot be removed: %s", parent.at(entry), error)


def _move_files(slot: Slot, pool: Pool) -> None:
    """To a new directory: one of a lower layer of an overlay (a container's image) cannot get another name."""
    fresh = pool.make_slot()
    log.info("%s lies in a lower layer of an overlay: its files move to %s", slot.path, fresh.path)
    fresh.enter()
    for name in slot.held().entries():
        slot.held().rename(name, name, fresh.held())
    fresh.held().sync()  # edge S, for these names
    slot.entry, slot.number, fresh.entry, fresh.number = fresh.entry, fresh.number, slot.entry, slot.number
    slot.folder, fresh.folder = fresh.folder, slot.folder
    fresh.leave()
    pool.remove(fresh)
