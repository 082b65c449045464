"""All ranks of a job choose one checkpoint: the newest that every rank has, and that verifies on every rank."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from fxckpt.compat.ranks import default_store, rank, world_size
from fxckpt.errors import Corrupt, FxckptError, NoCheckpoint, RanksDisagree
from fxckpt.loading.target import Target
from fxckpt.ranks.agreement import Agreement, Key, described, newest_common
from fxckpt.store.about import life
from fxckpt.store.reader import Candidate, Reader, directory_of

Found = Candidate | Corrupt


def agreement_for(target: Target) -> Agreement | None:
    """How this load is agreed on; None for one process, or for weights that are loaded into no run."""
    found = default_store() if target.run is not None and world_size() > 1 else None
    return None if found is None else Agreement(found[0], rank(), world_size(), found[1])


def choose_together(
    agreement: Agreement, look: Callable[[], Sequence[Found]], directory: str, skipped: list[tuple[str, str]]
) -> tuple[Candidate | None, str]:
    """The checkpoint that all ranks have chosen (None: no rank has any), and the life that begins. What did not verify here is
    added to ``skipped``. Raises RanksDisagree if there is no common one, with what each rank has."""
    mine: dict[Key, Candidate] = {}
    broken, error, own = 0, "", None
    try:
        for each in look():
            if isinstance(each, Corrupt):
                broken += 1
                skipped.append((directory_of(each), str(each)))
            else:
                mine.setdefault((each.record.step, each.record.iteration, life(each.record)), each)
    except FxckptError as failed:  # the others are told before it is raised
        error, own = str(failed), failed
    said = agreement.exchange("has", {"keys": list(mine), "damaged": broken, "error": error, "directory": directory,
                                      "life": uuid.uuid4().hex})  # fmt: skip
    if own is not None and not isinstance(own, NoCheckpoint):
        raise own
    if all(isinstance(each, dict) and not each["keys"] and not each["damaged"] and not each["error"] for each in said):
        return None, said[0]["life"]
    banned: set[Key] = set()
    while (key := newest_common([[tuple(key) for key in each["keys"]] for each in said], banned)) is not None:
        verdict = _verify(mine[key], agreement, skipped)
        if not any(agreement.exchange(f"damaged/{len(banned)}", verdict)):
            return mine[key], said[0]["life"]
        banned.add(key)
    raise RanksDisagree(
        "the ranks have no checkpoint of one step, written in one life of the job, that verifies on all of them:"
        f"{described(said)}\n{len(banned)} common one(s) did not verify. To start over give all of them up with "
        "compile_step(..., fresh=True), on every rank; a larger keep= makes this less likely."
    )


def _verify(found: Candidate, agreement: Agreement, skipped: list[tuple[str, str]]) -> str:
    """What is wrong with it here; empty if nothing is."""
    try:
        Reader(found.path).verify(lambda _: agreement.alive())
    except (Corrupt, NoCheckpoint) as error:
        skipped.append((str(found.path), str(error)))
        return str(error)
    return ""


def all_restored(agreement: Agreement, restore: Callable[[], None]) -> None:
    """Restore here, and hear how it went elsewhere: no rank trains on while another one could not load."""
    own: BaseException | None = None
    try:
        restore()
    except Exception as error:
        own = error
    said = agreement.exchange("restored", "" if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    if failed := [f"\n  rank {at}: {why}" for at, why in enumerate(said) if why]:
        raise RanksDisagree("other ranks could not load, so this one does not train on:" + "".join(failed))
