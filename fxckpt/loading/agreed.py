"""All ranks of a job choose one checkpoint: the newest that every rank has, and that verifies on every rank."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fxckpt.compat.ranks import default_store, launched, rank, world_size
from fxckpt.errors import Corrupt, FxckptError, NoCheckpoint, RanksDisagree, SetupError
from fxckpt.loading.replicated import Kept, Places
from fxckpt.loading.target import Target
from fxckpt.ranks import Agreement, Key, Said, described, newest_common, none_was_common, safe, stores_digest
from fxckpt.ranks.replication import Replication
from fxckpt.store.about import Job, job, known_as, newest_life
from fxckpt.store.identity import keep_id
from fxckpt.store.reader import Candidate, Reader, directory_of
from fxckpt.store.record import Record

log: logging.Logger = logging.getLogger("fxckpt")

Found = Candidate | Corrupt


@dataclass(frozen=True)
class Chosen:
    """What all ranks have chosen (None: all begin anew), and the life that begins. ``safe``: the steps that are on two disks of
    every rank, oldest first, with their generations in this rank's store (None: it is not in there)."""

    found: Candidate | None
    begins: Job
    safe: Mapping[Key, int | None] = field(default_factory=dict)


def agreement_for(target: Target, asked: bool) -> Agreement | None:
    """How this load is agreed on; None for one process, or for weights that are loaded into no run. ``asked``: the script says
    which checkpoint. Raises SetupError if there are other ranks that cannot be asked, or whose checkpoints will not meet."""
    if target.run is None:
        return None
    target.run.saver.ranks.check_schedule()
    if (found := default_store()) is not None:
        return Agreement(found[0], rank(), world_size(), found[1]) if world_size() > 1 else None
    name, size = launched()
    size = max(size, world_size())
    if size > 1 and not asked:
        raise SetupError(
            f"this is one of {size} ranks ({name or 'torch.distributed'} says so), and they cannot agree on a step to start "
            "from: there is no process group with a store. Call torch.distributed.init_process_group() before fxckpt.load(), or "
            "name the step on every rank with load(step=...). If each process is a training of its own, set WORLD_SIZE=1"
        )
    return None


def choose_together(
    agreement: Agreement,
    look: Callable[[], Sequence[Found]],
    kept: Sequence[Kept],
    replication: Replication | None,
    target: Target,
    directory: str,
    skipped: list[tuple[str, str]],
) -> Chosen:
    """The checkpoint that all ranks begin with. What did not verify here is added to ``skipped``. ``kept``: what lies on this
    disk, where there are replicas. Raises RanksDisagree if there is no common one, with what each rank has."""

    def is_mine(record: Record) -> bool:  # disks may have changed places; of a rank that there was not, anyone's is as good
        return replication is None or record.rank == agreement.rank or agreement.rank >= record.world_size

    mine, own, error = _look(look, is_mine, target, directory, skipped)
    own["kept"], own["number"] = kept, max([own["number"], *(number for *_, number, _ in kept)])
    said: list[Said] = agreement.exchange("has", own)
    if error is not None and not isinstance(error, NoCheckpoint):
        raise error
    stores, number = stores_digest([each["store"] for each in said]), 1 + max(each["number"] for each in said)
    begins = Job(said[0]["life"], stores, number=number)
    if not any(each["keys"] or each["kept"] or each["damaged"] or each["error"] for each in said):
        return Chosen(None, begins)
    places, banned = Places(mine, said, agreement.rank, replication), set[Key]()
    while (key := newest_common(said, banned)) is not None:
        chosen, verdict = places.first_good(key, lambda found: _verify(found, skipped, agreement))
        if not any(agreement.exchange(f"damaged/{len(banned)}", verdict)):
            on_two = {each: mine[each].record.generation if each in mine else None for each in safe(said, key)}
            return Chosen(chosen, begins, on_two)
        banned.add(key)
    if none_was_common(said):
        log.warning("fxckpt: all ranks start from the beginning: an earlier life of this job ended before every rank had "
                    "committed its first checkpoint. What some have is given up:%s", described(said))  # fmt: skip
        return Chosen(None, begins)
    raise RanksDisagree(
        "the ranks have no checkpoint of one step, written in one life of the job, that verifies on all of them:"
        f"{described(said)}\n{len(banned)} common one(s) did not verify. To start over give all of them up with "
        "compile_step(..., fresh=True), on every rank; a larger keep= makes this less likely."
    )


def _look(
    look: Callable[[], Sequence[Found]],
    is_mine: Callable[[Record], bool],
    target: Target,
    directory: str,
    skipped: list[tuple[str, str]],
) -> tuple[dict[Key, Candidate], Said, FxckptError | None]:
    """What this rank has, what it says of it, and the error that the others are told of before it is raised."""
    mine: dict[Key, Candidate] = {}
    damaged, failed, run = 0, None, target.run
    elsewhere = run is None or os.path.realpath(directory) != os.path.realpath(run.directory)
    try:
        for each in look():
            if isinstance(each, Corrupt):
                damaged += 1
                skipped.append((directory_of(each), str(each)))
            elif is_mine(each.record):
                mine.setdefault(key_of(each), each)
    except FxckptError as error:
        failed = error
    beside = sorted({job(each.record).stores for each in mine.values()})
    store = None if run is None else keep_id(run.directory)
    common = any(job(each.record).common is not None for each in mine.values())
    said: Said = {
        "keys": list(mine), "kept": [], "damaged": damaged, "directory": directory, "elsewhere": elsewhere,
        "store": store or "", "beside": beside, "common": common, "life": uuid.uuid4().hex,
        "number": newest_life(each.record for each in mine.values()), "error": "" if failed is None else str(failed),
    }  # fmt: skip
    return mine, said, failed


def key_of(found: Candidate) -> Key:
    """By which it is known on all ranks."""
    return known_as(found.record)


def _verify(found: Candidate, skipped: list[tuple[str, str]], agreement: Agreement) -> str:
    """What is wrong with it here; empty if nothing is. Of one that several ranks wrote together each looks at some parts."""
    parts = range(agreement.rank, len(found.record.ranks), agreement.world)
    try:
        reader = Reader(found.path)
        for part in parts if found.record.ranks else (None,):
            reader.verify(part=part)
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
