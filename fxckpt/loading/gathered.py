"""The records of the ranks that wrote a checkpoint: each is read by one of those that load it, which sends it to all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from fxckpt.errors import Corrupt, NoCheckpoint
from fxckpt.loading.phases import Phases
from fxckpt.store.journaled import Journaled, Loadable
from fxckpt.store.reader import record_bytes


def records_of(found: Loadable, phases: Phases) -> Callable[[str], bytes]:
    """What gives the content of each, by its path, for ``Reader``: there as many as ranks, in a checkpoint and in each record of
    a journal. One that its rank could not read all others try to read."""
    if phases.group is None:
        return record_bytes
    row = [found.base, *found.records] if isinstance(found, Journaled) else [found]
    files = [os.path.join(each.path, part.name) for each in row for part in each.record.parts or ()]
    mine: dict[str, bytes] = {}
    for file in files[phases.rank :: phases.world]:
        with suppress(Corrupt, NoCheckpoint, OSError):
            mine[file] = record_bytes(file)
    phases.all()  # none waits inside a collective for one that reads, or cannot
    said: list[dict[str, bytes]] = [{} for _ in range(phases.world)]
    dist.all_gather_object(said, mine, phases.group)
    known = {file: raw for each in said for file, raw in each.items()}
    return lambda file: known[file] if file in known else record_bytes(file)
