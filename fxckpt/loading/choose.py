"""Which checkpoint of a store a load means: the newest, or that of a step or name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from fxckpt.errors import Corrupt, NoCheckpoint
from fxckpt.store import names
from fxckpt.store.reader import Candidate

log: logging.Logger = logging.getLogger("fxckpt")

Found = Candidate | Corrupt


def choose(found: Sequence[Found], step: int | None, name: str | None, directory: str) -> Sequence[Found]:
    """Those to try, in order, of a listing that is newest first: all, or the newest of the step or name that was asked for.

    Raises NoCheckpoint if there is none of that step or name, saying what there is.
    """
    if step is None and name is None:
        return found
    chosen = [each for each in found if _is_meant(each, step, name, directory)]
    if not chosen:
        there = ", ".join(str(each.record.name or each.record.step) for each in found if isinstance(each, Candidate)) or "none"
        raise NoCheckpoint(
            f"{directory}: no checkpoint {f'of step {step}' if name is None else f'named {name!r}'}; there is: {there}"
        )
    newest = max(chosen, key=_generation)
    for each in chosen:
        if isinstance(each, Corrupt) and each is not newest:
            log.warning("fxckpt: another checkpoint of step %s is damaged: %s", step, each)
    return [newest]


def _is_meant(each: Found, step: int | None, name: str | None, directory: str) -> bool:
    """Is it of this step and name? Of a damaged record, its directory tells."""
    if isinstance(each, Candidate):
        return step in (None, each.record.step) and name in (None, each.record.name)
    at = os.path.relpath(os.path.dirname(each.path), os.path.abspath(directory))
    return at == os.path.join(names.NAMED, name) if name is not None else names.step_of(at) == step


def _generation(each: Found) -> int:
    """To find the newest of one step. Of a damaged one its directory's name tells, where it was not the first of its step."""
    if isinstance(each, Candidate):
        return each.record.generation
    found = names.generation_of(os.path.basename(os.path.dirname(each.path)))
    return -1 if found is None else found
